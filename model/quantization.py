"""What a checkpoint's configuration says about its quantized weights (no torch, no numpy).

    compressed-tensors   quantization_config of llm-compressor: pack-quantized, int-quantized, float-quantized
    gptq                 AutoGPTQ and GPTQModel; formerly in quantize_config.json
    awq                  AutoAWQ, version gemm; formerly in quant_config.json
    fp8, fbgemm_fp8      transformers and vLLM: 8-bit floats with scales per tensor, row or block

Which weights are quantized is told by the checkpoint's tensors; the configuration is checked against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UsageError
from model.jsonfile import read_json_object
from model.reader import Reader

COMPRESSED_TENSORS, GPTQ, AWQ, FP8, FBGEMM_FP8 = "compressed-tensors", "gptq", "awq", "fp8", "fbgemm_fp8"
INT, FLOAT = "int", "float"
OLD_FILES = {"quantize_config.json": GPTQ, "quant_config.json": AWQ}
_KEYS = ("quantization_config", "compression_config")
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision")
_SUPPORTED = (
    "Supported are compressed-tensors (int4, int8, FP8), GPTQ and AWQ (gemm) of 4 or 8 bits, and FP8; "
    "or export the unquantized checkpoint"
)


@dataclass(frozen=True)
class WeightScheme:
    """How some of the weights are stored.

    Attributes:
        bits: of a code or an 8-bit float.
        kind: "int" or "float".
        group_size: columns of a row that share a scale; 0 is all of them.
        symmetric: whether the zero point is ``2**(bits - 1)`` everywhere.
        act_order: whether columns belong to groups in another order than they stand.
        block: rows and columns that share a scale, where scales are two-dimensional.
    """

    bits: int
    kind: str = INT
    group_size: int = 0
    symmetric: bool = True
    act_order: bool = False
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's quantization.

    Attributes:
        method: "compressed-tensors", "gptq", "awq", "fp8" or "fbgemm_fp8".
        schemes: those that occur; every quantized weight follows one of them.
        zero_points_less_one: whether stored zero points are one too small (GPTQ's first format).
        overrides: whether single modules may differ from the schemes (GPTQModel's ``dynamic``).
        activations: whether activations or the cache are quantized too, which is not taken over.
    """

    method: str
    schemes: tuple[WeightScheme, ...]
    zero_points_less_one: bool = False
    overrides: bool = False
    activations: bool = False


def find_quantization(raw: Mapping[str, Any], where: str = "config.json") -> Quantization | None:
    """The quantization that a model's configuration speaks of, at the top or in ``text_config``; None for none.

    Raises:
        UsageError: a method, format or number of bits that cannot be imported.
        CheckpointError: a key is missing or of the wrong kind.
    """
    text = raw.get("text_config")
    places = [(raw, "")] + ([(text, "text_config.")] if isinstance(text, dict) else [])
    for place, prefix in places:
        reader = Reader(place, prefix, where)
        for key in _KEYS:
            if reader.has(key):
                return parse_quantization(reader.child(key))
    return None


def find_old_quantization(folder: Path) -> Quantization | None:
    """The quantization that older repositories keep in a file of its own. Raises as `find_quantization`."""
    for name, method in OLD_FILES.items():
        if (folder / name).exists():
            raw = read_json_object(folder / name)
            return parse_quantization(Reader({"quant_method": method} | raw, "", name))
    return None


def parse_quantization(reader: Reader) -> Quantization:
    """Parses the object itself. Raises as `find_quantization`."""
    method = reader.raw.get("quant_method")
    if method is None and "config_groups" in reader.raw:
        method = COMPRESSED_TENSORS
    parsers = {
        COMPRESSED_TENSORS: _compressed_tensors,
        GPTQ: _gptq,
        AWQ: _awq,
        FP8: _fp8,
        FBGEMM_FP8: _fp8,
    }
    parse = parsers.get(method) if isinstance(method, str) else None
    if parse is None:
        raise _unsupported(reader, "quant_method", method)
    return parse(reader, str(method))


def _compressed_tensors(reader: Reader, method: str) -> Quantization:
    _check_format(reader)
    for key, good in (("sparsity_config", "dense"), ("transform_config", None)):
        if not isinstance(reader.raw.get(key), dict):
            continue
        inner = reader.child(key)
        if inner.raw.get("config_groups") or (good and inner.raw.get("format", good) != good):
            raise _unsupported(reader, key, inner.raw.get("format", "weights that need transformed inputs"))
    groups = reader.child("config_groups") if reader.has("config_groups") else None
    schemes, activations = [], reader.has("kv_cache_scheme")
    for name in groups.raw if groups is not None else ():
        group = groups.child(name) if groups is not None else reader
        _check_format(group)
        activations |= group.has("input_activations") or group.has("output_activations")
        if group.has("weights"):
            schemes.append(_arguments(group.child("weights")))
    return Quantization(method, tuple(dict.fromkeys(schemes)), activations=activations)


def _check_format(reader: Reader) -> None:
    form = reader.raw.get("format")
    if form is not None and form not in _FORMATS:
        raise _unsupported(reader, "format", form)


def _arguments(reader: Reader) -> WeightScheme:
    """The arguments of one group's weights, as compressed-tensors' QuantizationArgs defines them."""
    kind = str(reader.raw.get("type") or INT).lower()
    bits = reader.integer("num_bits", 8, high=64)
    if (kind, bits) not in ((INT, 4), (INT, 8), (FLOAT, 8)):
        raise _unsupported(reader, "num_bits", f"{bits}-bit {kind[:20]}")
    group = reader.integer("group_size", 0, low=-1)
    strategy = reader.raw.get("strategy") or ("group" if group > 0 else "channel" if group < 0 else "tensor")
    if strategy not in ("tensor", "channel", "group", *(("block",) if kind == FLOAT else ())):
        raise _unsupported(reader, "strategy", strategy)
    block = None
    if strategy == "block":
        block = _block(reader, "block_structure")
        if block is None:
            raise reader.fail("block_structure", "the key is missing")
    order = reader.raw.get("actorder")
    return WeightScheme(
        bits=bits,
        kind=kind,
        group_size=reader.integer("group_size") if strategy == "group" else 0,
        symmetric=reader.boolean("symmetric", True),
        act_order=order is True or str(order).lower() in ("group", "dynamic"),
        block=block,
    )


def _gptq(reader: Reader, method: str) -> Quantization:
    form = str(reader.raw.get("checkpoint_format") or reader.raw.get("format") or GPTQ).lower()
    if form not in (GPTQ, "gptq_v2") or reader.boolean("is_marlin_format", False):
        raise _unsupported(reader, "checkpoint_format", form if form != GPTQ else "marlin")
    if reader.raw.get("pack_dtype") not in (None, "int32"):
        raise _unsupported(reader, "pack_dtype", reader.raw["pack_dtype"])
    scheme = WeightScheme(
        bits=_bits(reader, "bits", (4, 8)),
        group_size=_group_size(reader, "group_size"),
        symmetric=reader.boolean("sym", True),
        act_order=reader.boolean("desc_act", False),
    )
    return Quantization(method, (scheme,), zero_points_less_one=form == GPTQ, overrides=bool(reader.raw.get("dynamic")))


def _awq(reader: Reader, method: str) -> Quantization:
    version = str(reader.raw.get("version") or reader.raw.get("format") or "gemm").lower()
    if version != "gemm":
        raise _unsupported(reader, "version", version)
    bits, group = ("w_bit", "q_group_size") if "w_bit" in reader.raw else ("bits", "group_size")
    scheme = WeightScheme(
        bits=_bits(reader, bits, (4,)),
        group_size=_group_size(reader, group),
        symmetric=not reader.boolean("zero_point", True),
    )
    return Quantization(method, (scheme,))


def _fp8(reader: Reader, method: str) -> Quantization:
    scheme = WeightScheme(8, FLOAT, block=_block(reader, "weight_block_size"))
    return Quantization(method, (scheme,), activations=True)


def _bits(reader: Reader, key: str, allowed: tuple[int, ...]) -> int:
    bits = reader.integer(key, 4, high=64)
    if bits not in allowed:
        raise _unsupported(reader, key, f"{bits} bits")
    return bits


def _group_size(reader: Reader, key: str) -> int:
    size = reader.integer(key, 128, low=-1)
    if size == 0:
        raise reader.fail(key, "0 is neither a number of columns nor -1 for all")
    return max(size, 0)


def _block(reader: Reader, key: str) -> tuple[int, int] | None:
    """Rows and columns of a block: a list of two, or "128x128"."""
    value = reader.raw.get(key)
    if value is None:
        return None
    parts = value.lower().split("x") if isinstance(value, str) else value
    if isinstance(parts, list) and len(parts) == 2 and all(str(part).isdecimal() and int(part) for part in parts):
        return int(parts[0]), int(parts[1])
    raise reader.fail(key, f"{str(value)[:40]!r} is no number of rows and columns")


def _unsupported(reader: Reader, key: str, value: object) -> UsageError:
    shown = str(value)[:60]
    return UsageError(
        "cannot export",
        f"{reader.where}: {reader.prefix}{key}",
        f"quantization {shown!r} cannot be imported",
        _SUPPORTED,
    )
