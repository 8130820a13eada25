"""The vision encoder of EXAONE 4.5: pre-norm blocks with window or full attention, rotary over rows and columns.

Several images of any size go through as one packed sequence of patches. Positions, windows and
frames are computed from `image_grid_thw` by arithmetic on patch numbers, so that the graph has no
loop over images and assumes no window to be full.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import ops
from model.config import VisionConfig
from model.text import GatedMLP, RMSNorm, count_of

EPSILON = 1e-6  # fixed in transformers' Exaone4_5 vision blocks, not part of the configuration


@dataclass(frozen=True)
class PatchLayout:
    """Where each patch stands.

    Attributes:
        row, column: int64 [patches], inside its frame.
        frame: int64 [patches], counted over all images.
        slot: int64 [patches], its place in the row of all windows laid end to end (window * cells + cell).
        cells: int64 [windows, cells], the patch in each cell of each window; patch 0 where a cell is empty.
        filled: bool [windows, cells], whether there is a patch in it.
    """

    row: Tensor
    column: Tensor
    frame: Tensor
    slot: Tensor
    cells: Tensor
    filled: Tensor


def patch_layout(grid_thw: Tensor, patches: int, merge: int, side: int) -> PatchLayout:
    """Lays out the packed patches of several images.

    Args:
        grid_thw: int64 [images, 3], frames, rows and columns of patches; rows and columns are multiples of `merge`.
        patches: their total number.
        merge: patches along the side of a merged unit; patches come in the order (row and column of
            the unit, row and column inside it).
        side: patches along the side of a window.
    """
    frames, rows, columns = grid_thw.unbind(1)
    ends = (frames * rows * columns).cumsum(0)
    number = torch.arange(patches, device=grid_thw.device)
    image = (number.unsqueeze(1) >= ends.unsqueeze(0)).long().sum(1)
    height, width = rows[image], columns[image]
    local = number - (ends - frames * rows * columns)[image]
    frame, inside = local // (height * width), local % (height * width)
    # One row of merged units holds merge * width patches, one unit merge * merge.
    unit_row, inside = inside // (merge * width), inside % (merge * width)
    unit_column, inside = inside // (merge * merge), inside % (merge * merge)
    row, column = unit_row * merge + inside // merge, unit_column * merge + inside % merge

    across, down = (columns + side - 1) // side, (rows + side - 1) // side
    windows = frames * across * down
    window = (windows.cumsum(0) - windows)[image] + frame * (across * down)[image]
    window = window + (row // side) * across[image] + column // side
    slot = window * (side * side) + (row % side) * side + column % side
    count = count_of(windows.sum())
    cells = torch.zeros(count * side * side, dtype=torch.int64, device=grid_thw.device)
    cells = cells.scatter(0, slot, number + 1).view(count, side * side)  # 0 stays where there is no patch
    filled = cells > 0
    cells = torch.clamp(cells - 1, min=0)
    return PatchLayout(row, column, (frames.cumsum(0) - frames)[image] + frame, slot, cells, filled)


def axial_rope(layout: PatchLayout, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [patches, head_dim / 2]: the first half turns with the row, the second with the column."""
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float, device=layout.row.device) / (head_dim // 2)
    inverse = 1.0 / (theta**exponents)
    angles = torch.cat(
        (layout.row.unsqueeze(1).float() * inverse, layout.column.unsqueeze(1).float() * inverse), dim=-1
    )
    return angles.cos(), angles.sin()


class VisionAttention(nn.Module):
    """Grouped heads from one packed projection (queries, keys, values); `full` decides what a patch sees."""

    def __init__(self, config: VisionConfig, full: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.full = full
        self.widths = [config.hidden_size, *[config.num_kv_heads * config.head_dim] * 2]
        self.qkv = nn.Linear(config.hidden_size, sum(self.widths))
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, layout: PatchLayout, rope: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.qkv(x).split(self.widths, dim=-1)
        query, key = (
            ops.rotary(part.float(), *rope, heads).to(x.dtype)
            for part, heads in ((query, self.num_heads), (key, self.num_kv_heads))
        )
        if self.full:
            out = ops.segment_attention(query, key, value, layout.frame, self.num_heads, self.num_kv_heads)
        else:
            visible = layout.filled.unsqueeze(1).unsqueeze(1)
            # An empty cell takes any patch's row: as a key it is masked, as a query nobody reads its result.
            query, key, value = (part[layout.cells] for part in (query, key, value))
            windows = ops.attention(query, key, value, visible, self.num_heads, self.num_kv_heads)
            out = windows.flatten(0, 1)[layout.slot]
        return self.proj(out)


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig, full: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, EPSILON)
        self.norm2 = RMSNorm(config.hidden_size, EPSILON)
        self.attn = VisionAttention(config, full)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, layout: PatchLayout, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), layout, rope)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, hence one linear map of a flattened patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.hidden_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values)


class PatchMerger(nn.Module):
    """Joins merge x merge neighbouring patches into one image token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, EPSILON)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionEncoder(nn.Module):
    """Patches of any number of images in, image tokens out, in the order of the prompt's placeholders."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(
            VisionBlock(config, full=i in config.fullatt_block_indexes) for i in range(config.depth)
        )
        self.merger = PatchMerger(config)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Encodes images.

        Args:
            pixel_values: float [patches, patch_dim], images one after the other.
            image_grid_thw: int64 [images, 3], frames, rows and columns of patches of each.

        Returns:
            image_features [patches / merge^2, out_hidden_size].
        """
        config = self.config
        layout = patch_layout(image_grid_thw, pixel_values.shape[0], config.spatial_merge_size, config.window_side)
        rope = axial_rope(layout, config.head_dim, config.rope_theta)
        x = self.patch_embed(pixel_values)
        for block in self.blocks:
            x = block(x, layout, rope)
        return self.merger(x)
