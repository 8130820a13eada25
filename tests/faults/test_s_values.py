"""S26 to S28: weights that are no numbers, too large, or so small that a scale vanishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import exaone_export as ee
from quantize import rtn
from quantize.lazy import LazyWeight, Source
from quantize.pack import unpack_codes
from quantize.scheme import Quantized, Scheme
from tests import tiny
from tests.faults.harness import Case, accepted, bad, refuses
from tests.faults.spoil import poisoned, weights
from tests.unit.onnx_kernels import Array, gather_block_quantized, matmul_nbits

UP = "model.layers.2.mlp.up_proj.weight"
NAN, INF = float("nan"), float("inf")
QUANTIZE = "--quantize"


def no_number(name: str, tensor: str, value: float, place: tuple[int, ...], *options: str, **more: Any) -> Case:
    spoil = poisoned(tensor, value, place, dtype=more.pop("dtype", "fp32"))
    words = (tensor, "1 value is NaN or infinite", f"the first at {list(place)}")
    return bad(f"s26 {name}", spoil, *words, code=7, traces=True, options=options, **more)


test_s26_nan_and_infinity = refuses(
    *(no_number(f"{value} in a projection", UP, value, (3, 5)) for value in (NAN, INF, -INF)),
    no_number("the first value", UP, NAN, (0, 0)),
    no_number("the last value", UP, NAN, (127, 63)),
    no_number("the head", "lm_head.weight", NAN, (511, 63)),
    no_number("the embedding", "model.embed_tokens.weight", NAN, (100, 7)),
    no_number("a tied embedding", "model.embed_tokens.weight", INF, (100, 7), kind="dense"),
    no_number("a norm", "model.norm.weight", NAN, (63,)),
    no_number("a norm of queries", "model.layers.0.self_attn.q_norm.weight", -INF, (0,)),
    no_number("a bias", "model.visual.blocks.0.attn.qkv.bias", NAN, (9,), kind="vlm"),
    no_number("patches", "model.visual.patch_embed.proj.weight", NAN, (5, 2, 1, 13, 0), kind="vlm"),
    no_number("a draft head", "mtp.fc.weight", NAN, (1, 100), kind="vlm"),
    no_number("bf16", UP, NAN, (3, 5), dtype="bf16"),
    no_number("infinite bf16", UP, INF, (3, 5), dtype="bf16"),
    no_number("fp16", UP, NAN, (3, 5), dtype="fp16"),
    no_number("fp16 to fp16", UP, INF, (3, 5), "--dtype", "fp16", dtype="fp16"),
    no_number("fp32 to bf16", UP, NAN, (3, 5), "--dtype", "bf16"),
    *(no_number(f"{recipe} of a projection", UP, NAN, (3, 5), QUANTIZE, recipe) for recipe in ("int8", "int4")),
    *(no_number(f"{recipe} of infinity", UP, -INF, (90, 63), QUANTIZE, recipe) for recipe in ("int8", "int4")),
    no_number("int4 of the head", "lm_head.weight", NAN, (511, 63), QUANTIZE, "int4"),
    no_number("int4 of the embedding", "model.embed_tokens.weight", NAN, (100, 7), QUANTIZE, "int4"),
    no_number("int4 of a tied embedding", "model.embed_tokens.weight", NAN, (0, 0), QUANTIZE, "int4", kind="dense"),
    no_number("int4 of bf16", UP, NAN, (3, 5), QUANTIZE, "int4", dtype="bf16"),
    no_number("int4 in fp16", UP, NAN, (3, 5), QUANTIZE, "int4", "--dtype", "fp16"),
    bad(
        "s26 several", poisoned(UP, NAN, (7, 1), (3, 60), (127, 0)), UP, "3 values are", "the first at [3, 60]",
        code=7, traces=True,
    ),
    bad(
        "s26 all", weights(lambda t: t[UP].fill(NAN)), UP, "8192 values are", "the first at [0, 0]",
        code=7, traces=True, options=(QUANTIZE, "int4"),
    ),
)  # fmt: skip


def too_large(name: str, value: float, *options: str, tensor: str = UP, dtype: str = "fp32") -> Case:
    place = (5,) if "norm" in tensor else (5, 7)
    spoil = poisoned(tensor, value, place, dtype=dtype)
    words = (tensor, "--dtype fp32")
    return bad(f"s27 {name}", spoil, *words, code=7, traces=True, options=("--dtype", *options))


test_s27_too_large_for_the_type = refuses(
    too_large("1e5 in fp16", 1e5, "fp16"),
    too_large("-1e5 in fp16", -1e5, "fp16"),
    too_large("the first number that rounds up", 65520.0, "fp16"),
    too_large("bf16 in fp16", 1e30, "fp16", dtype="bf16"),
    too_large("a norm in fp16", 1e5, "fp16", tensor="model.norm.weight"),
    too_large("an embedding in fp16", 1e5, "fp16", tensor="model.embed_tokens.weight"),
    too_large("the largest of fp32 in bf16", 3.4028235e38, "bf16"),
    too_large("int4 in fp16", 1e5, "fp16", QUANTIZE, "int4"),
    too_large("int8 in fp16", 1e5, "fp16", QUANTIZE, "int8"),
)


@pytest.mark.parametrize("value", [65504.0, -65504.0, 65519.0, 1e-10])
def test_s27_what_fits_is_accepted(tmp_path: Path, value: float) -> None:
    manifest, _ = accepted(tmp_path, poisoned(UP, value, (5, 7)), "--dtype", "fp16")
    assert manifest.dtype == "fp16"


# Small and equal values are accepted; what they become is checked by onnxruntime's own kernels

K = 64
SCHEMES = [Scheme(bits, 32, symmetric) for bits in (4, 8) for symmetric in (True, False)]
BLOCKS: dict[str, Array] = {
    "zero": np.zeros(K),
    "negative zero": np.full(K, -0.0),
    "constant": np.full(K, 0.3),
    "negative constant": np.full(K, -0.3),
    "one value": np.eye(1, K, 3)[0],
    "one negative value": -np.eye(1, K, 3)[0],
    "half zero": np.repeat([0.0, 0.2], K // 2),
    "denormal": np.linspace(-1e-40, 1e-40, K),
    "the smallest denormal": np.full(K, 1e-45),
    "the smallest normal": np.full(K, 1.1754944e-38),
    "a scale that vanishes in fp16": np.linspace(-1e-7, 1e-7, K),
    "a denormal scale in fp16": np.linspace(-2e-5, 2e-5, K),
    "the largest": np.linspace(-3e38, 3e38, K),
}
OF_FP16 = [name for name in BLOCKS if name != "the largest"]


def quantized(weight: Array, scheme: Scheme) -> Quantized:
    """As the bundle stores it: scales in the weight's own type."""
    lazy = LazyWeight(Source(ir.tensor(weight), False, "w"), scheme, rtn.quantize)
    codes, scales = lazy.take("codes"), lazy.take("scales").astype(np.float32)
    points = None if scheme.symmetric else unpack_codes(lazy.take("zero_points"), scheme.bits, scales.shape[1])
    return Quantized(unpack_codes(codes, scheme.bits, scheme.block_size), scales, points)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_s28_small_and_equal_weights_in_fp32(name: str, scheme: Scheme) -> None:
    weight = np.tile(BLOCKS[name].astype(np.float32), (16, 1))
    check_kernels(weight, quantized(weight, scheme), scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", OF_FP16)
def test_s28_small_and_equal_weights_in_fp16(name: str, scheme: Scheme) -> None:
    weight = np.tile(BLOCKS[name].astype(np.float16), (16, 1))
    check_kernels(weight.astype(np.float32), quantized(weight, scheme), scheme)


def check_kernels(weight: Array, stored: Quantized, scheme: Scheme) -> None:
    """Finite, zero where a block is zero, and elsewhere as near as the grid of its scale type allows."""
    assert np.isfinite(stored.scales).all()
    table = gather_block_quantized(np.arange(16), stored, scheme)
    assert np.isfinite(table).all()
    assert (table[weight == 0] == 0).all()
    # Half a step, and what rounding the scale to float16 moves the farthest code.
    steps = np.repeat(np.abs(stored.scales), scheme.block_size, axis=1)
    moved = scheme.largest * np.maximum(steps * 2**-11, 2.0**-25)
    assert (np.abs(table - weight) <= 0.5 * steps + moved).all()
    if np.abs(weight).max() < 1e30:  # products of larger ones overflow in any type
        product = matmul_nbits(np.eye(K, dtype=np.float32), stored, scheme, 0)
        np.testing.assert_allclose(product, table.T, rtol=1e-6, atol=1e-45)


def test_s28_bundle_with_such_blocks_gives_finite_logits(tmp_path: Path) -> None:
    def change(tensors: dict[str, Array]) -> None:
        for layer, name in enumerate(OF_FP16[:2] + OF_FP16[7:9]):
            for module in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj"):
                tensor = tensors[f"model.layers.{layer % 2}.{module}.weight"]
                rows = slice(32 * (layer // 2), 32 * (layer // 2) + 32)
                tensor[rows] = np.resize(BLOCKS[name], tensor[rows].shape)
        tensors["model.embed_tokens.weight"][100:110] = 0

    source = tiny.make_checkpoint(
        tmp_path / "source", "hybrid", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    weights(change)(source)
    ee.export(source, tmp_path / "out", quantize="int4")
    with ee.load(tmp_path / "out", ep="cpu") as engine:
        result = engine.generate("abc", max_new_tokens=4, do_sample=False)
    assert len(result.token_ids) >= 1


def test_s28_scale_type_of_bf16_reaches_as_far_as_fp32() -> None:
    weight = np.tile(np.linspace(-1e-30, 1e-30, K), (16, 1)).astype(ml_dtypes.bfloat16)
    stored = quantized(weight, Scheme(4))
    assert (stored.scales != 0).all()
    assert np.isfinite(stored.scales).all()
