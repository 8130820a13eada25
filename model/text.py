"""The text decoder of EXAONE 4.0 and 4.5.

Post-norm blocks, RMS-normalised queries and keys, grouped heads; in hybrid models window layers rotate
queries and keys and global layers do not (Exaone4 in transformers is the reference implementation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ops, rotary
from model.config import TextConfig
from model.numerics import PLAIN, Numerics

Cache = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain.

    Args:
        width: of what is normalised.
        epsilon: added to its mean square.
        fraction: of its values that the input holds; the result is the same.
        factor: that the result is multiplied by.
        wide: whether the result is float32, whatever the input is.
    """

    def __init__(
        self, width: int, epsilon: float, *, fraction: float = 1.0, factor: float = 1.0, wide: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32 if wide else None))
        self.epsilon = epsilon * fraction**2
        self.factors = {"weight": factor}

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, scaled(self, "weight"), self.epsilon)


def scaled(module: nn.Module, name: str) -> Tensor:
    """A parameter times its factor in `module.factors`; the exporter multiplies the weight that it stores instead."""
    parameter, factors = cast(Tensor, getattr(module, name)), cast(dict[str, float], module.factors)
    return parameter if factors[name] == 1.0 or torch.compiler.is_exporting() else parameter * factors[name]


class ScaledLinear(nn.Linear):
    """A linear layer whose input holds a fraction of its values, and its output likewise."""

    def __init__(self, width: int, outputs: int, bias: bool = True, fraction: float = 1.0) -> None:
        super().__init__(width, outputs, bias=bias)
        self.factors = {"bias": fraction}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, scaled(self, "bias") if self.bias is not None else None)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Args:
        width, inner: of x, and of the product.
        bias: whether the layers have one.
        numerics: how it computes.
        fraction: of its values that x holds; the result holds its square.
    """

    def __init__(
        self, width: int, inner: int, bias: bool = False, numerics: Numerics = PLAIN, fraction: float = 1.0
    ) -> None:
        super().__init__()
        self.gate_proj = ScaledLinear(width, inner, bias, fraction)
        self.up_proj = ScaledLinear(width, inner, bias, fraction)
        self.down_proj = ScaledLinear(inner, width, bias, fraction**2)
        self.device, self.fraction = numerics.device, fraction

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        opened = ops.gated(gate, 1 / self.fraction) if self.device else F.silu(gate)
        return self.down_proj(opened * self.up_proj(x))


def rope_tables(config: TextConfig) -> tuple[Tensor, Tensor]:
    """`model.rotary.rope_tables` as tensors; without values where new tensors have none (tracing, "meta")."""
    probe = torch.empty(0)
    if probe.is_meta or type(probe) is not Tensor:
        shape = (config.max_position_embeddings, config.head_dim // 2)
        return torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.float32)
    cos, sin = rotary.rope_tables(config)
    return torch.from_numpy(cos), torch.from_numpy(sin)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys; window and rotation are fixed when built."""

    def __init__(
        self,
        config: TextConfig,
        window: int | None,
        rotary: bool,
        window_cache: bool = False,
        numerics: Numerics = PLAIN,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.window, self.rotary = window, rotary
        self.window_cache = window_cache and window is not None
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, fraction=numerics.fraction)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, fraction=numerics.fraction)

    def forward(
        self, x: Tensor, past: Cache, lengths: Tensor, total: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Cache]:
        query = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2)
        key = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))).flatten(-2)
        out, present = ops.group_query_attention(
            query,
            key,
            self.v_proj(x),
            past,
            lengths,
            total,
            rope,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            window=self.window,
            rotary=self.rotary,
            window_cache=self.window_cache,
        )
        return self.o_proj(out), present


class DecoderLayer(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)): normalisation comes after each branch."""

    def __init__(
        self,
        config: TextConfig,
        window: int | None,
        rotary: bool,
        window_cache: bool = False,
        numerics: Numerics = PLAIN,
    ) -> None:
        super().__init__()
        width, epsilon, fraction = config.hidden_size, config.rms_norm_eps, numerics.fraction
        self.wide = numerics.wide
        self.self_attn = Attention(config, window, rotary, window_cache, numerics)
        self.mlp = GatedMLP(width, config.intermediate_size, numerics=numerics, fraction=fraction)
        self.post_attention_layernorm = RMSNorm(width, epsilon, fraction=fraction, factor=fraction, wide=self.wide)
        self.post_feedforward_layernorm = RMSNorm(width, epsilon, fraction=fraction**2, factor=fraction, wide=self.wide)

    def forward(
        self, x: Tensor, past: Cache, lengths: Tensor, total: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Cache]:
        attended, present = self.self_attn(self._narrow(x), past, lengths, total, rope)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self._narrow(x))), present

    def _narrow(self, x: Tensor) -> Tensor:
        """The residual stream in the weights' type."""
        return x.to(self.self_attn.q_proj.weight.dtype) if self.wide else x


def kept_rows(hidden: Tensor, lengths: Tensor, total: Tensor, keep: Tensor) -> Tensor:
    """The last `keep` valid positions of every row of hidden [batch, sequence, width]; keep 0 is all of them.

    Args:
        hidden: [batch, sequence, width].
        lengths: int32 [batch], valid tokens of each row after this pass, less one.
        total: int32 scalar, the longest row's.
        keep: int64 [1].
    """
    batch, sequence, _ = hidden.shape
    count = torch.where(keep > 0, torch.clamp(keep, max=sequence), sequence)
    # Row b's last valid position inside this pass; with keep 0 all rows start at their first.
    last = torch.where(keep > 0, lengths.long() - (total.long() - sequence), sequence - 1)
    offsets = torch.arange(count_of(count), device=hidden.device)
    index = torch.clamp(last.unsqueeze(1) - count + 1 + offsets, 0, sequence - 1)
    # Rows of the flattened batch, so that no index tensor of the hidden size is made.
    first = torch.arange(batch, device=hidden.device).unsqueeze(1) * sequence
    return hidden.flatten(0, 1)[first + index]


def count_of(count: Tensor) -> int:
    """A tensor of one element as a size (symbolic while tracing)."""
    value = cast(int, count.item())  # int() would ask for a number while tracing
    torch._check(value >= 0)
    return value


class LayerStack(nn.Module):
    """What decoder and draft head share: layers over a cache, a final norm, a head, and the rotary tables.

    A subclass sets `layers`, `norm` and `lm_head`, in the order in which it wants its parameters, and `numerics`.
    """

    numerics: Numerics
    layers: nn.ModuleList
    norm: RMSNorm
    lm_head: nn.Linear
    cos: Tensor
    sin: Tensor

    def add_rope_tables(self, config: TextConfig) -> None:
        """Registers `cos` and `sin`, which no checkpoint holds."""
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def widen(self, x: Tensor) -> Tensor:
        """Embeddings as the residual stream holds them."""
        return x.float() * self.numerics.fraction if self.numerics.wide else x

    def run(
        self, x: Tensor, attention_mask: Tensor, past: Sequence[Cache], logits_to_keep: Tensor
    ) -> tuple[Tensor, Tensor, list[Cache]]:
        """From embeddings [batch, sequence, hidden] to logits, hidden states and cache; see `Decoder.forward`."""
        lengths, total = cache_lengths(attention_mask)
        kept = [cast(DecoderLayer, layer).self_attn.window_cache for layer in self.layers]
        windowed = window_lengths(lengths, x.shape[1], past[kept.index(True)][0].shape[2]) if any(kept) else lengths
        present: list[Cache] = []
        x = self.widen(x)
        for layer, cache, window_cache in zip(self.layers, past, kept, strict=True):
            own = windowed if window_cache else lengths
            x, extended = layer(x, cache, own, total, (self.cos, self.sin))
            present.append(extended)
        hidden = self.norm(x)
        return self.lm_head(kept_rows(hidden, lengths, total, logits_to_keep)), hidden, present


class Decoder(LayerStack):
    """Embeddings (or ids) and a cache in, logits and the extended cache out.

    Args:
        config: the text model.
        embeds: whether the decoder embeds `input_ids` itself (text-only models).
        window_cache: whether caches of window layers are buffers that hold the window only.
        numerics: how it computes.
    """

    def __init__(
        self, config: TextConfig, embeds: bool = False, window_cache: bool = False, numerics: Numerics = PLAIN
    ) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics
        window_cache = window_cache and config.cached_window is not None
        if embeds:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, config.window(i), config.uses_rope(i), window_cache, numerics)
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, fraction=numerics.fraction)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if embeds and config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.add_rope_tables(config)

    def forward(
        self, inputs: Tensor, attention_mask: Tensor, past: Sequence[Cache], logits_to_keep: Tensor
    ) -> tuple[Tensor, Tensor, list[Cache]]:
        """One pass over new tokens.

        Args:
            inputs: inputs_embeds float [batch, sequence, hidden], or input_ids int64 [batch, sequence].
            attention_mask: int64 [batch, past + sequence], ones then padding zeros on the right.
            past: keys and values of each layer, [batch, num_kv_heads, past, head_dim]; where a layer keeps its window
                only, a buffer of one size for all such layers, see `model.ops.group_query_attention`.
            logits_to_keep: int64 [1], positions to give logits for, counted from the end; 0 for all.

        Returns:
            logits [batch, kept, vocab], hidden states after the final norm [batch, sequence, hidden], the new cache.
        """
        x = self.embed_tokens(inputs) if inputs.dim() == 2 else inputs
        return self.run(x, attention_mask, past, logits_to_keep)

    def empty_cache(self, batch: int = 1) -> list[Cache]:
        """A cache of no tokens."""
        shape = (batch, self.config.num_kv_heads, 0, self.config.head_dim)
        weight = self.lm_head.weight
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers]


def window_lengths(lengths: Tensor, sequence: int, capacity: int) -> Tensor:
    """Row lengths for the layers whose cache holds a window only, int32 [batch].

    The kernel takes no rows of different lengths there. Where nothing is evicted, padding may count as tokens: no
    token sees it, and later ones are written over it. Longer passes are left to the kernel to refuse.
    """
    most = torch.full((), sequence - 1, dtype=torch.int32, device=lengths.device)
    room = torch.full((), capacity, dtype=torch.int32, device=lengths.device)
    return torch.where(most < room, torch.maximum(lengths, most), lengths)


def cache_lengths(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """GroupQueryAttention's bookkeeping: int32 [batch] row lengths less one, int32 scalar longest length."""
    lengths = (attention_mask.sum(1) - 1).to(torch.int32)
    total = torch.full((), attention_mask.shape[1], dtype=torch.int32, device=attention_mask.device)
    return lengths, total
