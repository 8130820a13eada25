"""The fused operations of the models, each with its plain PyTorch meaning.

Under ``torch.export`` a call becomes one opaque operator ``exaone::<name>``, which the exporter maps to
one ONNX Runtime kernel; everywhere else (eager runs, training, parity tests) the plain code below
runs and can be differentiated. The operator's own implementation is that same code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED_ROTARY = 16  # ONNX Runtime's attention rotates heads whose width is a multiple of this; others turn before it


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(weight.dtype)


def _gated(gate: Tensor, alpha: float) -> Tensor:
    return gate * torch.sigmoid(alpha * gate)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of x [..., head_dim] by angles given as cos, sin [..., head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    return rotate(x.unflatten(-1, (num_heads, -1)), cos.unsqueeze(-2), sin.unsqueeze(-2)).flatten(-2)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    lengths: Tensor,
    total: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    rotary: bool,
    window_cache: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, sequence = query.shape[0], query.shape[1]
    q, k, v = _heads(query, num_heads), _heads(key, num_kv_heads), _heads(value, num_kv_heads)
    # A first pass starts every row at 0; later passes append behind each row's own last token.
    first = int(total) == sequence
    start = (torch.zeros_like(lengths) if first else lengths + 1 - sequence).long()
    positions = start[:, None] + torch.arange(sequence, device=query.device)
    if rotary:
        angles = cos[positions][:, None], sin[positions][:, None]
        q, k = rotate(q, *angles), rotate(k, *angles)
    if window_cache:
        seen, (k, v), present = _window_rows((k, v), (past_key, past_value), start, window)
    else:
        if past_key.shape[2]:
            room = max(past_key.shape[2], int(total))
            slots = positions[:, None, :, None].expand_as(k)
            k = F.pad(past_key, (0, 0, 0, room - past_key.shape[2])).scatter(2, slots, k)
            v = F.pad(past_value, (0, 0, 0, room - past_value.shape[2])).scatter(2, slots, v)
        seen, present = torch.arange(k.shape[2], device=query.device).expand(batch, -1), (k, v)
    visible = (seen[:, None, :] >= 0) & (seen[:, None, :] <= positions[:, :, None])
    if window > 0:
        visible &= seen[:, None, :] > positions[:, :, None] - window
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=num_heads != num_kv_heads)
    return out.transpose(1, 2).reshape(batch, sequence, -1), *present


def resident_tokens(tokens: Tensor, capacity: int, window: int) -> Tensor:
    """Tokens that a window-sized cache holds after `tokens`: evicting makes room for capacity - window + 1 at once."""
    room = capacity - window + 1
    return tokens - room * torch.clamp(-torch.div(capacity - tokens, room, rounding_mode="floor"), min=0)


def _window_rows(
    new: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor], start: Tensor, window: int
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Positions [batch, rows] (negative: none) of cached and new rows side by side, those rows, and the new cache."""
    capacity, sequence = past[0].shape[2], new[0].shape[2]
    slots, start = torch.arange(capacity, device=start.device), start[:, None]
    held = resident_tokens(start, capacity, window)
    old = torch.where(slots < held, start - held + slots, -1)
    seen = torch.cat((old, start + torch.arange(sequence, device=start.device)), 1)
    key, value = (torch.cat(parts, 2) for parts in zip(past, new, strict=True))
    # Row i of the new cache is the token at position end - left + i; rows beyond have no meaning.
    end = start + sequence
    left = resident_tokens(end, capacity, window)
    wanted = end - left + slots
    source = torch.where(wanted < start, wanted - start + held, capacity + wanted - start)
    index = torch.where(slots < left, source, 0)[:, None, :, None].expand_as(past[0])
    return seen, (key, value), (key.gather(2, index), value.gather(2, index))


def _attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    q, k, v = _heads(query, num_heads), _heads(key, num_kv_heads), _heads(value, num_kv_heads)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=num_heads != num_kv_heads)
    return out.transpose(-3, -2).flatten(-2)


def _segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, num_heads: int, num_kv_heads: int
) -> Tensor:
    lengths: list[int] = torch.unique_consecutive(segments, return_counts=True)[1].tolist()
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    out = []
    for parts_qkv in parts:
        q, k, v = (_heads(x, n) for x, n in zip(parts_qkv, (num_heads, num_kv_heads, num_kv_heads), strict=True))
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=num_heads != num_kv_heads)
        out.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat(out)


# The signatures torch.library infers its schemas from, and the shapes under tracing.
rms_norm_op = torch.library.custom_op("exaone::rms_norm", _rms_norm, mutates_args=())
gated_op = torch.library.custom_op("exaone::gated", _gated, mutates_args=())
rotary_op = torch.library.custom_op("exaone::rotary", _rotary, mutates_args=())
attention_op = torch.library.custom_op("exaone::attention", _attention, mutates_args=())
segment_attention_op = torch.library.custom_op("exaone::segment_attention", _segment_attention, mutates_args=())


@torch.library.custom_op("exaone::group_query_attention", mutates_args=())
def group_query_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    lengths: Tensor,
    total: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    rotary: bool,
    window_cache: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Opaque form of `group_query_attention`."""
    out, present_key, present_value = _group_query_attention(
        query,
        key,
        value,
        past_key,
        past_value,
        lengths,
        total,
        cos,
        sin,
        num_heads,
        num_kv_heads,
        window,
        rotary,
        window_cache,
    )
    # An operator may not return its inputs or views of them.
    return out.contiguous(), present_key.clone(), present_value.clone()


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x, dtype=weight.dtype)


@gated_op.register_fake
def _(gate: Tensor, alpha: float) -> Tensor:
    return torch.empty_like(gate)


@rotary_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(x)


@attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    return torch.empty_like(query)


@segment_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    return torch.empty_like(query)


@group_query_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    lengths: Tensor,
    total: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    rotary: bool,
    window_cache: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, past, width = past_key.shape
    shape = (batch, kv_heads, past if window_cache else past + query.shape[1], width)
    return torch.empty_like(query), past_key.new_empty(shape), past_value.new_empty(shape)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square normalisation over the last axis, statistics in float32 (Zhang & Sennrich, 2019).

    The result has the gain's type, which may be another than that of x.
    """
    if torch.compiler.is_exporting():
        return rms_norm_op(x, weight, epsilon)
    return _rms_norm(x, weight, epsilon)


def gated(gate: Tensor, alpha: float) -> Tensor:
    """gate * sigmoid(alpha * gate) in one node: SiLU of alpha * gate, divided by alpha."""
    run = gated_op if torch.compiler.is_exporting() else _gated
    return run(gate, alpha)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Half-split rotary embedding of the heads of x float32 [tokens, heads * head_dim].

    Args:
        x: queries or keys of a packed sequence.
        cos, sin: float32 [tokens, head_dim / 2].
        num_heads: of x.
    """
    run = rotary_op if torch.compiler.is_exporting() else _rotary
    return run(x, cos, sin, num_heads)


def _rotate_rows(x: Tensor, heads: int, lengths: Tensor, total: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates x [batch, sequence, heads * head_dim] by each token's own position in its row."""
    sequence = x.shape[1]
    start = torch.where(total == sequence, torch.zeros_like(lengths), lengths + 1 - sequence).long()
    positions = start.unsqueeze(1) + torch.arange(sequence, device=x.device)
    cos, sin = (table[positions].unsqueeze(2) for table in rope)
    return rotate(x.unflatten(-1, (heads, -1)), cos, sin).flatten(-2)


def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor],
    lengths: Tensor,
    total: Tensor,
    rope: tuple[Tensor, Tensor],
    *,
    num_heads: int,
    num_kv_heads: int,
    window: int | None,
    rotary: bool,
    window_cache: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal attention with a key/value cache, as ONNX Runtime's GroupQueryAttention defines it.

    With `window_cache` the cache is a buffer of fixed size that keeps the last tokens only, in order and from its
    first row on (`resident_tokens`); a first pass then has no padding, see `model.text.window_lengths`.

    Args:
        query: [batch, sequence, num_heads * head_dim], already normalised.
        key, value: [batch, sequence, num_kv_heads * head_dim].
        past: cached keys and values, each [batch, num_kv_heads, past, head_dim]; past may be 0, but with
            `window_cache` it is the buffer's size, at least `window`.
        lengths: int32 [batch], each row's valid tokens after this pass, less one. Padding is on the right.
        total: int32 scalar, the longest row's tokens after this pass.
        rope: cosines and sines of every position, each [positions, head_dim / 2].
        num_heads, num_kv_heads: head counts.
        window: keys visible to a query, itself included; None for all.
        rotary: whether queries and keys are rotated; a NoPE layer's are not.
        window_cache: whether the cache holds a window only.

    Returns:
        [batch, sequence, num_heads * head_dim], and the present keys (rotated) and values.
    """
    if rotary and past[0].shape[-1] % FUSED_ROTARY:
        query = _rotate_rows(query, num_heads, lengths, total, rope)
        key = _rotate_rows(key, num_kv_heads, lengths, total, rope)
        rotary = False
    arguments = (
        query,
        key,
        value,
        *past,
        lengths,
        total,
        *rope,
        num_heads,
        num_kv_heads,
        window or -1,
        rotary,
        window_cache,
    )
    run = group_query_attention_op if torch.compiler.is_exporting() else _group_query_attention
    out, present_key, present_value = run(*arguments)
    return out, (present_key, present_value)


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Attention without a cache: query [batch, sequence, heads * head_dim], visible bool [batch, 1, 1, keys]."""
    run = attention_op if torch.compiler.is_exporting() else _attention
    return run(query, key, value, visible, num_heads, num_kv_heads)


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, num_heads: int, num_kv_heads: int
) -> Tensor:
    """Attention inside segments of one packed sequence: query [tokens, heads * head_dim], segments int64 [tokens].

    Tokens of one segment stand together. Exported, no tokens x tokens matrix exists.
    """
    run = segment_attention_op if torch.compiler.is_exporting() else _segment_attention
    return run(query, key, value, segments, num_heads, num_kv_heads)
