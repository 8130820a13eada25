"""The vision encoder of EXAONE 4.5: pre-norm blocks with window or full attention, rotary over rows and columns.

Several images of any size go through as one packed sequence of patches. Positions, windows and
frames are computed from `image_grid_thw` by arithmetic on patch numbers, so that the graph has no
loop over images and assumes no window to be full.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model import ops
from model.config import VisionConfig
from model.numerics import PLAIN, Numerics
from model.text import GatedMLP, RMSNorm, ScaledLinear, count_of

EPSILON = 1e-6  # fixed in transformers' Exaone4_5 vision blocks, not part of the configuration


@dataclass(frozen=True)
class PatchLayout:
    """Where each patch stands.

    Attributes:
        row, column: int64 [patches], inside its frame.
        frame: int64 [patches], counted over all images.
        slot: int64 [patches], its place in the row of all windows laid end to end (window * cells + cell).
        window: int64 [patches], counted over all frames.
        rank: int64 [patches], its place when patches are sorted by their windows, and inside a window left as they are.
        cells: int64 [windows, cells], the patch in each cell of each window; patch 0 where a cell is empty.
        filled: bool [windows, cells], whether there is a patch in it.
    """

    row: Tensor
    column: Tensor
    frame: Tensor
    slot: Tensor
    window: Tensor
    rank: Tensor
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
    # In front of it: whole frames, whole rows of windows, windows of its row, and in its window rows of merged units.
    top, left = row // side * side, column // side * side
    tall, wide = torch.clamp(height - top, max=side), torch.clamp(width - left, max=side)
    before = number - local + frame * height * width + top * width + tall * left
    unit = (row - top) // merge * (wide // merge) + (column - left) // merge
    rank = before + unit * (merge * merge) + inside
    slot = window * (side * side) + (row % side) * side + column % side
    count = count_of(windows.sum())
    cells = torch.zeros(count * side * side, dtype=torch.int64, device=grid_thw.device)
    cells = cells.scatter(0, slot, number + 1).view(count, side * side)  # 0 stays where there is no patch
    filled = cells > 0
    cells = torch.clamp(cells - 1, min=0)
    frame = (frames.cumsum(0) - frames)[image] + frame
    return PatchLayout(row, column, frame, slot, window, rank, cells, filled)


def by_window(layout: PatchLayout) -> tuple[PatchLayout, Tensor]:
    """The layout of the patches sorted by their windows, and which patch stands at each place, int64 [patches].

    What is of a patch is sorted; `rank` remains each patch's place among them, in the order of the input.
    """
    number = torch.arange(layout.rank.shape[0], device=layout.rank.device)
    order = torch.zeros_like(layout.rank).scatter(0, layout.rank, number)
    row, column, frame, window = (x[order] for x in (layout.row, layout.column, layout.frame, layout.window))
    return replace(layout, row=row, column=column, frame=frame, window=window), order


def _inverse_frequencies(layout: PatchLayout, head_dim: int, theta: float) -> Tensor:
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float, device=layout.row.device) / (head_dim // 2)
    return 1.0 / (theta**exponents)


def axial_rope_by_table(
    layout: PatchLayout, grid_thw: Tensor, head_dim: int, theta: float, factor: float
) -> tuple[Tensor, Tensor]:
    """`axial_rope` times a factor, from a table with one row for each row or column there is.

    Cosines and sines have no kernel on the device: the table is small, and looking it up has one.
    """
    sides = torch.arange(count_of(grid_thw[:, 1:].amax((0, 1))), device=layout.row.device)
    angles = sides.unsqueeze(1).float() * _inverse_frequencies(layout, head_dim, theta)
    cos, sin = (
        torch.cat((table[layout.row], table[layout.column]), dim=-1)
        for table in (angles.cos() * factor, angles.sin() * factor)
    )
    return cos, sin


def axial_rope(layout: PatchLayout, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [patches, head_dim / 2]: the first half turns with the row, the second with the column."""
    inverse = _inverse_frequencies(layout, head_dim, theta)
    angles = torch.cat(
        (layout.row.unsqueeze(1).float() * inverse, layout.column.unsqueeze(1).float() * inverse), dim=-1
    )
    return angles.cos(), angles.sin()


class VisionAttention(nn.Module):
    """Grouped heads from one packed projection (queries, keys, values); `full` decides what a patch sees."""

    def __init__(self, config: VisionConfig, full: bool, numerics: Numerics = PLAIN) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.full, self.device = full, numerics.device
        self.widths = [config.hidden_size, *[config.num_kv_heads * config.head_dim] * 2]
        fraction = numerics.fraction**2
        self.qkv = ScaledLinear(config.hidden_size, sum(self.widths), fraction=fraction)
        self.proj = ScaledLinear(config.hidden_size, config.hidden_size, fraction=fraction)

    def forward(self, x: Tensor, layout: PatchLayout, rope: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.qkv(x).split(self.widths, dim=-1)
        query, key = (
            ops.rotary(part.float(), *rope, heads).to(x.dtype)
            for part, heads in ((query, self.num_heads), (key, self.num_kv_heads))
        )
        if self.full or self.device:
            segments = layout.frame if self.full else layout.window
            out = ops.segment_attention(query, key, value, segments, self.num_heads, self.num_kv_heads)
        else:
            visible = layout.filled.unsqueeze(1).unsqueeze(1)
            # An empty cell takes any patch's row: as a key it is masked, as a query nobody reads its result.
            query, key, value = (part[layout.cells] for part in (query, key, value))
            windows = ops.attention(query, key, value, visible, self.num_heads, self.num_kv_heads)
            out = windows.flatten(0, 1)[layout.slot]
        return self.proj(out)


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Where numerics has a fraction, x holds its square: what goes into the first branch is normalised to the square too,
    and into the second to the fraction, whose product is squared by itself. Rotation gives queries and keys back whole.
    """

    def __init__(self, config: VisionConfig, full: bool, numerics: Numerics = PLAIN) -> None:
        super().__init__()
        width, fraction, square = config.hidden_size, numerics.fraction, numerics.fraction**2
        self.norm1 = RMSNorm(width, EPSILON, fraction=square, factor=square)
        self.norm2 = RMSNorm(width, EPSILON, fraction=square, factor=fraction)
        self.attn = VisionAttention(config, full, numerics)
        self.mlp = GatedMLP(width, config.intermediate_size, bias=True, numerics=numerics, fraction=fraction)

    def forward(self, x: Tensor, layout: PatchLayout, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), layout, rope).to(x.dtype)
        return x + self.mlp(self.norm2(x)).to(x.dtype)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, hence one linear map of a flattened patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.hidden_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values)


class PatchMerger(nn.Module):
    """Joins merge x merge neighbouring patches into one image token."""

    def __init__(self, config: VisionConfig, numerics: Numerics = PLAIN) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, EPSILON, fraction=numerics.fraction**2)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionEncoder(nn.Module):
    """Patches of any number of images in, image tokens out, in the order of the prompt's placeholders."""

    def __init__(self, config: VisionConfig, numerics: Numerics = PLAIN) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(
            VisionBlock(config, full=i in config.fullatt_block_indexes, numerics=numerics) for i in range(config.depth)
        )
        self.merger = PatchMerger(config, numerics)

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
        if self.numerics.device:
            return self._by_window(pixel_values, image_grid_thw, layout)
        rope = axial_rope(layout, config.head_dim, config.rope_theta)
        x = self.patch_embed(pixel_values)
        for block in self.blocks:
            x = block(x, layout, rope)
        return self.merger(x)

    def _by_window(self, pixel_values: Tensor, image_grid_thw: Tensor, layout: PatchLayout) -> Tensor:
        """The same with patches sorted by their windows, so that those that see each other always stand together."""
        config, square, unit = self.config, self.numerics.fraction**2, self.config.spatial_merge_size**2
        layout, order = by_window(layout)
        rope = axial_rope_by_table(layout, image_grid_thw, config.head_dim, config.rope_theta, 1 / square)
        x = self.patch_embed(pixel_values[order])
        if self.numerics.wide:
            x = x.float() * square
        for block in self.blocks:
            x = block(x, layout, rope)
        # Merged units stayed together.
        return self.merger(x)[layout.rank.view(-1, unit)[:, 0] // unit]
