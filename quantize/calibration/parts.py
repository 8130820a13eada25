"""The modules that the model is run as, step by step: its own over whole prompts, and what is between them.

A linear layer whose result nobody needs is an Identity here, whose input tells the same: heads are large.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.text import DecoderLayer, RMSNorm
from model.vision import PatchEmbed, PatchMerger, VisionBlock, axial_rope, patch_layout


class Patches(nn.Module):
    """The vision encoder's first step."""

    def __init__(self, embed: PatchEmbed) -> None:
        super().__init__()
        self.proj = embed.proj

    def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """[patches, width] of pixels float [patches, patch_dim]."""
        return self.proj(pixels)


class Block(nn.Module):
    """A block of the vision encoder, with the positions that its images give."""

    def __init__(self, block: VisionBlock, merge: int, side: int, theta: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = block.norm1, block.norm2, block.attn, block.mlp
        self._merge, self._side, self._theta = merge, side, theta

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        """[patches, width] of x [patches, width]; grid int64 [images, 3]."""
        layout = patch_layout(grid, x.shape[0], self._merge, self._side)
        rope = axial_rope(layout, self.attn.head_dim, self._theta)
        x = x + self.attn(self.norm1(x), layout, rope)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """The vision encoder's last step."""

    def __init__(self, merger: PatchMerger) -> None:
        super().__init__()
        self.ln_q, self.mlp, self._width = merger.ln_q, merger.mlp, merger.width

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        """[image tokens, hidden] of x [patches, width]."""
        return self.mlp(self.ln_q(x).view(-1, self._width))


class Lookup(nn.Module):
    """Rows of the embedding, those of images replaced by their features.

    Args:
        ids: int64 [rows], the tokens that there are rows of, ascending.
        table: float [rows, hidden].
        media: token ids that stand for images.
    """

    def __init__(self, ids: Tensor, table: Tensor, media: tuple[int, ...]) -> None:
        super().__init__()
        self._ids, self._table, self._media = ids, table, media

    def forward(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """[tokens, hidden] of ids int64 [tokens] and features [image tokens, hidden]."""
        x = self._table[torch.searchsorted(self._ids, ids)]
        if features is not None:
            media = torch.isin(ids, torch.tensor(self._media, device=ids.device))
            x[media] = features[: int(media.sum())]
        return x


class Layer(nn.Module):
    """A layer of the decoder or of the draft head over whole prompts."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.post_feedforward_layernorm = layer.post_feedforward_layernorm

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[tokens, hidden] of x [tokens, hidden]."""
        count = x.shape[0]
        attention = self.self_attn
        none = x.new_zeros((1, attention.num_kv_heads, 0, attention.head_dim))
        lengths = torch.full((1,), count - 1, dtype=torch.int32, device=x.device)
        total = torch.full((), count, dtype=torch.int32, device=x.device)
        attended, _ = attention(x[None], (none, none), lengths, total, rope)
        x = x + self.post_attention_layernorm(attended[0])
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Head(nn.Module):
    """The final norm, and where a head reads it."""

    def __init__(self, norm: RMSNorm, heads: tuple[str, ...]) -> None:
        super().__init__()
        self.norm = norm
        for name in heads:
            self.add_module(name, nn.Identity())
        self._heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [tokens, hidden]."""
        x = self.norm(x)
        for name in self._heads:
            x = self.get_submodule(name)(x)
        return x


class DraftInput(nn.Module):
    """What goes into the draft head's layers: the next token's embedding and this one's hidden state."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(width, epsilon)
        self.pre_fc_norm_hidden = RMSNorm(width, epsilon)

    def forward(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """[tokens - 1, hidden] of both [tokens, hidden]."""
        joined = (self.pre_fc_norm_embedding(embeds[1:]), self.pre_fc_norm_hidden(hidden[:-1]))
        return self.fc(torch.cat(joined, dim=-1))
