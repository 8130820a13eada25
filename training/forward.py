"""The model on batches of equally large images and padded texts: the same modules, attention by masks.

`VisionEncoder` and `Decoder` take one packed sequence and a cache; training wants batches and neither. That both
compute the same is tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import rotate
from model.text import Decoder, DecoderLayer
from model.vision import VisionBlock, VisionEncoder, axial_rope, patch_layout


@dataclass(frozen=True)
class ImageGeometry:
    """One image size: rotary tables [patches, head_dim / 2] and who sees whom in a window block [patches, patches]."""

    cos: Tensor
    sin: Tensor
    same_window: Tensor | None


@lru_cache(maxsize=256)
def image_geometry(encoder: VisionEncoder, rows: int, columns: int) -> ImageGeometry:
    """For an image of rows x columns patches; computed once a size."""
    config = encoder.config
    grid = torch.tensor([[1, rows, columns]], device=encoder.patch_embed.proj.weight.device)
    layout = patch_layout(grid, rows * columns, config.spatial_merge_size, config.window_side)
    cos, sin = axial_rope(layout, config.head_dim, config.rope_theta)
    window = layout.slot // config.window_side**2
    same = window[:, None] == window[None, :]
    return ImageGeometry(cos, sin, None if bool(same.all()) else same)


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """`RMSNorm` in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], module.weight, module.epsilon)  # type: ignore[arg-type]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, sequence, heads, width] each, key and value with fewer heads -> [batch, sequence, heads * width]."""
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (key, value))
    # Written out: on short sequences the fused kernel's backward pass costs more than everything else.
    scores = (query.transpose(1, 2) * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    scores = scores.float() if mask is None else scores.float().masked_fill(~mask, -1e4)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def encode_images(encoder: VisionEncoder, patches: Tensor, rows: int, columns: int) -> Tensor:
    """Image tokens of a batch of images of one size.

    Args:
        encoder: the vision encoder.
        patches: [batch, rows * columns, C*P*P], without the repetition in time.
        rows, columns: of patches.

    Returns:
        [batch, rows * columns / 4, hidden].
    """
    config, geometry = encoder.config, image_geometry(encoder, rows, columns)
    cos, sin = geometry.cos[:, None], geometry.sin[:, None]
    frames = (config.in_channels, config.temporal_patch_size, config.patch_size**2)
    # A still fills all frames of a patch, so their weights may be added up first.
    x = F.linear(patches, encoder.patch_embed.proj.weight.unflatten(1, frames).sum(2).flatten(1)).float()
    for block in encoder.blocks:
        assert isinstance(block, VisionBlock)
        attention = block.attn
        parts = attention.qkv(norm(block.norm1, x)).split(attention.widths, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, attention.head_dim)) for part in parts)
        query, key = rotate(query.float(), cos, sin), rotate(key.float(), cos, sin)
        mask = None if attention.full else geometry.same_window
        x = x + attention.proj(attend(query, key, value, mask))
        x = x + block.mlp(norm(block.norm2, x))
    merger = encoder.merger
    return merger.mlp(norm(merger.ln_q, x).view(x.shape[0], -1, merger.width)).float()


@lru_cache(maxsize=512)
def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [length, length]: which keys a query sees."""
    at = torch.arange(length, device=device)
    visible = at[None, :] <= at[:, None]
    return visible if window is None else visible & (at[None, :] > at[:, None] - window)


def decoder_layer(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One decoder layer on x [batch, sequence, hidden], no cache."""
    attention = layer.self_attn
    query = norm(attention.q_norm, attention.q_proj(x).unflatten(-1, (attention.num_heads, -1)))
    key = norm(attention.k_norm, attention.k_proj(x).unflatten(-1, (attention.num_kv_heads, -1)))
    value = attention.v_proj(x).unflatten(-1, (attention.num_kv_heads, -1))
    if attention.rotary:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    out = attention.o_proj(attend(query, key, value, causal_mask(x.shape[1], attention.window, x.device)))
    x = x + norm(layer.post_attention_layernorm, out)
    return x + norm(layer.post_feedforward_layernorm, layer.mlp(x))


def decode(decoder: Decoder, x: Tensor, probe: int) -> tuple[Tensor, Tensor]:
    """Hidden states after the final norm, and after `probe` layers; x [batch, sequence, hidden]."""
    cos, sin = decoder.cos[: x.shape[1], None], decoder.sin[: x.shape[1], None]
    probed = x
    for number, layer in enumerate(decoder.layers, start=1):
        assert isinstance(layer, DecoderLayer)
        x = decoder_layer(layer, x, cos, sin)
        if number == probe:
            probed = x
    return norm(decoder.norm, x), probed
