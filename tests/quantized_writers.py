"""Tiny checkpoints in every published quantized format, each with the float checkpoint that it stands for.

What is written follows the tools that write such files, not what reads them here; see `quantized_writers_packing`.
The float twin holds ``(code - zero point) * scale`` in float32, exactly.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny
from tests.quantized_writers_packing import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    AnyArray,
    Draws,
    Floats,
    Layer,
    awq_gemm,
    float8,
    gptq,
    int_quantized,
    make_grid,
    pack_quantized,
)

Pack = Callable[[Floats, Draws], Layer]


@dataclass(frozen=True)
class Format:
    """One way to store a checkpoint.

    Attributes:
        pack: quantizes a weight [N, K].
        config: quantization_config for the given modules left in float, under their names in the file.
        dtype: of everything that is not quantized.
        extra: tensors beside a layer's own that a reader has to accept, such as scales of activations.
    """

    pack: Pack
    config: Callable[[Sequence[str]], dict[str, Any]]
    dtype: str = "bf16"
    extra: Mapping[str, AnyArray] | None = None


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint written twice.

    Attributes:
        folder: the quantized one.
        plain: its float twin: same configuration without quantization, float32.
        layers: module's name in the file ("model.layers.0.mlp.up_proj") → what was written for it.
    """

    folder: Path
    plain: Path
    layers: Mapping[str, Layer]


def make_quantized(
    folder: Path,
    form: Format,
    kind: str,
    seed: int = 0,
    *,
    keep: Callable[[str], bool] = lambda name: not name.startswith(("model.layers.", "model.language_model.layers.")),
    **overrides: Any,
) -> QuantizedCheckpoint:
    """Writes ``folder/quantized`` and ``folder/plain``.

    Args:
        folder: created if it is not there.
        form: the format.
        kind: as `tiny.make_checkpoint`.
        seed: of the weights.
        keep: of a module's name: whether it stays float. By default all but the decoder layers do: embedding, head,
            vision encoder and draft head.
        **overrides: as `tiny.make_checkpoint`.
    """
    config = tiny.make_config(kind, **overrides)
    values = np.random.default_rng(seed + 1)
    stored: dict[str, AnyArray] = {}
    plain: dict[str, AnyArray] = {}
    layers: dict[str, Layer] = {}
    kept: list[str] = []
    for name, value in tiny.make_tensors(config, seed, dtype=form.dtype).items():
        module = name.removesuffix(".weight")
        linear = value.ndim == 2 and "embed_tokens" not in name
        if not linear or keep(module):
            stored[name], plain[name] = value, value.astype(np.float32)
            kept += [module] if linear else []
            continue
        draws = Draws(values, np.random.default_rng(zlib.crc32(_input_of(module).encode())))
        layer = layers[module] = form.pack(value.astype(np.float32), draws)
        for suffix, tensor in {**layer.tensors, **(form.extra or {})}.items():
            stored[f"{module}.{suffix}"] = np.array(tensor, order="C")  # files hold an array's memory as it lies
        plain[name] = layer.weight
    for part, tensors in (("quantized", stored), ("plain", plain)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        tiny.save_tensors(folder / part, tensors)
        tiny.write_assets(folder / part, vision=kind == "vlm")
        raw = config | ({"quantization_config": form.config(kept)} if part == "quantized" else {})
        (folder / part / "config.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    return QuantizedCheckpoint(folder / "quantized", folder / "plain", layers)


def _input_of(module: str) -> str:
    """A name for what a linear layer reads: query, key and value the same, and both halves of a gated MLP."""
    return re.sub(r"[qkv]_proj$", "qkv_proj", re.sub(r"(gate|up)_proj$", "gate_up_proj", module))


# compressed-tensors


def compressed_integers(
    bits: int, group: int, *, symmetric: bool = True, shuffled: bool = False, scale_type: Any = BFLOAT16
) -> Format:
    """Packed integers ("pack-quantized"); `group` -1 is a scale a row, `shuffled` is act-order by groups."""

    def pack(weight: Floats, draws: Draws) -> Layer:
        grid = make_grid(
            weight, bits, group, symmetric=symmetric, scale_type=scale_type, draws=draws, shuffled=shuffled
        )
        return pack_quantized(grid, scale_type, symmetric=symmetric, shuffled=shuffled)

    weights = _arguments(bits, "int", "channel" if group == -1 else "group", symmetric=symmetric)
    weights |= {"group_size": None if group == -1 else group, "actorder": "group" if shuffled else None}
    return Format(pack, lambda kept: _compressed("pack-quantized", weights, None, kept))


def compressed_bytes() -> Format:
    """int8 weights with a scale a row, activations quantized on the fly ("int-quantized", W8A8)."""

    def pack(weight: Floats, draws: Draws) -> Layer:
        return int_quantized(make_grid(weight, 8, -1, symmetric=True, scale_type=BFLOAT16, draws=draws), BFLOAT16)

    weights = _arguments(8, "int", "channel")
    activations = _arguments(8, "int", "token") | {"dynamic": True, "observer": None}
    return Format(pack, lambda kept: _compressed("int-quantized", weights, activations, kept))


def compressed_floats(strategy: str) -> Format:
    """FP8 ("float-quantized") with a scale a "tensor", "channel" or "block" of 128 x 128."""
    block, axes = {"tensor": ((-1, -1), 1), "channel": ((1, -1), 2), "block": ((128, 128), 2)}[strategy]

    def pack(weight: Floats, draws: Draws) -> Layer:
        return float8(weight, block, suffix="weight_scale", scale_type=BFLOAT16, axes=axes)

    weights = _arguments(8, "float", strategy) | {"block_structure": list(block) if strategy == "block" else None}
    static = strategy == "tensor"
    activations = _arguments(8, "float", "tensor" if static else "token") | {"dynamic": not static}
    extra = {"input_scale": np.array([0.125], BFLOAT16)} if static else None
    return Format(pack, lambda kept: _compressed("float-quantized", weights, activations, kept), extra=extra)


def _arguments(bits: int, kind: str, strategy: str, *, symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": symmetric,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _compressed(
    form: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None, kept: Sequence[str]
) -> dict[str, Any]:
    # llm-compressor lists every linear layer that it left alone; the draft head, which it never saw, by pattern.
    ignored = [name for name in kept if not name.startswith("mtp.")]
    ignored += ["re:^mtp.*"] if len(ignored) < len(kept) else []
    group = {
        "targets": ["Linear"],
        "weights": dict(weights),
        "input_activations": None if activations is None else dict(activations),
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.13.0",
    }


# AutoAWQ, GPTQ and fine-grained FP8


def awq(group: int = 128) -> Format:
    """AutoAWQ, 4 bits with zero points."""

    def pack(weight: Floats, draws: Draws) -> Layer:
        return awq_gemm(make_grid(weight, 4, group, symmetric=False, scale_type=FLOAT16, draws=draws))

    def config(kept: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["visual"] if any(".visual." in name for name in kept) else None,
        }

    return Format(pack, config, dtype="fp16")


def gptq_format(
    bits: int, group: int, *, symmetric: bool, act_order: bool, version: int = 1, named: bool = True
) -> Format:
    """GPTQ as AutoGPTQ (`named` False: it does not say which format it writes) or GPTQModel store it."""

    def pack(weight: Floats, draws: Draws) -> Layer:
        grid = make_grid(weight, bits, group, symmetric=symmetric, scale_type=FLOAT16, draws=draws, shuffled=act_order)
        return gptq(grid, version)

    def config(kept: Sequence[str]) -> dict[str, Any]:
        common = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "desc_act": act_order,
            "sym": symmetric,
            "true_sequential": True,
            "damp_percent": 0.01,
        }
        if not named:
            return common | {"static_groups": False, "model_name_or_path": None, "model_file_base_name": None}
        own = {"checkpoint_format": "gptq" if version == 1 else "gptq_v2", "lm_head": False, "pack_dtype": "int32"}
        return common | own | {"meta": {"quantizer": ["gptqmodel:4.0.0"]}}

    return Format(pack, config, dtype="fp16")


def fine_grained(block: tuple[int, int] | None, scale_type: Any = FLOAT32) -> Format:
    """transformers' "fp8": a factor a block called weight_scale_inv; without blocks one for the whole weight."""

    def pack(weight: Floats, draws: Draws) -> Layer:
        axes = 0 if block is None else 2
        return float8(weight, block or (-1, -1), suffix="weight_scale_inv", scale_type=scale_type, axes=axes)

    def config(kept: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": None if block is None else list(block),
            "modules_to_not_convert": list(kept),
        }

    return Format(pack, config)


FORMATS: dict[str, Format] = {
    "compressed-int4-g128": compressed_integers(4, 128),
    "compressed-int4-g32": compressed_integers(4, 32, scale_type=FLOAT16),
    "compressed-int4-g128-asym": compressed_integers(4, 128, symmetric=False),
    "compressed-int4-g32-asym": compressed_integers(4, 32, symmetric=False),
    "compressed-int4-channel": compressed_integers(4, -1),
    "compressed-int4-channel-asym": compressed_integers(4, -1, symmetric=False),
    "compressed-int4-g128-actorder": compressed_integers(4, 128, shuffled=True),
    "compressed-int4-g32-asym-actorder": compressed_integers(4, 32, symmetric=False, shuffled=True),
    "compressed-int8-g128": compressed_integers(8, 128),
    "compressed-int8-channel-asym": compressed_integers(8, -1, symmetric=False),
    "compressed-int8-bytes": compressed_bytes(),
    "compressed-fp8-tensor": compressed_floats("tensor"),
    "compressed-fp8-channel": compressed_floats("channel"),
    "compressed-fp8-block": compressed_floats("block"),
    "awq-g128": awq(128),
    "awq-g32": awq(32),
    "gptq-int4-g128": gptq_format(4, 128, symmetric=True, act_order=False, named=False),
    "gptq-int4-g32-asym": gptq_format(4, 32, symmetric=False, act_order=False),
    "gptq-int4-g128-actorder": gptq_format(4, 128, symmetric=True, act_order=True),
    "gptq-int4-g32-asym-actorder": gptq_format(4, 32, symmetric=False, act_order=True),
    "gptq-v2-int4-g128-asym": gptq_format(4, 128, symmetric=False, act_order=False, version=2),
    "gptq-int8-g128": gptq_format(8, 128, symmetric=True, act_order=False),
    "gptq-v2-int8-g32-asym-actorder": gptq_format(8, 32, symmetric=False, act_order=True, version=2),
    "fp8-block": fine_grained((128, 128)),
    "fp8-block-bf16": fine_grained((128, 128), BFLOAT16),
    "fp8-tensor": fine_grained(None),
}
