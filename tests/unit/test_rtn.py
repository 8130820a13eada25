from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantize import grid, rtn
from quantize.pack import dequantize, pack_codes
from quantize.scheme import BLOCK_SIZES, Scheme
from tests.unit.onnx_kernels import gather_block_quantized, matmul_nbits, relative_error

SCHEMES = [
    Scheme(bits, size, symmetric) for bits, size, symmetric in itertools.product((4, 8), BLOCK_SIZES, (True, False))
]
KEEP = str  # ids of parametrised schemes


def weights(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(5, (rows, columns)) * 0.02).astype(np.float32)


def onnxruntime_codes(weight: NDArray[np.float32], scheme: Scheme) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """B, scales and zero points as onnxruntime's default weight-only quantizer writes them."""
    from onnxruntime.capi import _pybind_state as native

    rows, columns = weight.shape
    blocks = columns // scheme.block_size
    packed = np.zeros((rows, blocks, scheme.block_size * scheme.bits // 8), np.uint8)
    zero_points = np.zeros((rows, -(-blocks * scheme.bits // 8)), np.uint8)
    scales = np.zeros((rows, blocks), np.float32)
    function = native.quantize_matmul_4bits if scheme.bits == 4 else native.quantize_matmul_8bits
    transposed = np.ascontiguousarray(weight.T)
    function(packed, transposed, scales, zero_points, scheme.block_size, rows, columns, scheme.symmetric)
    return packed, scales, zero_points


def reference(weight: NDArray[np.float32], scheme: Scheme) -> NDArray[np.float64]:
    """The rounded weight, one block at a time, as the textbook has it."""
    result = weight.astype(np.float64)
    for row in result:
        for start in range(0, len(row), scheme.block_size):
            block = row[start : start + scheme.block_size]
            if scheme.symmetric:
                scale = float(np.float32(block[np.argmax(np.abs(block))] / -scheme.middle))
                zero = scheme.middle
            else:
                low, high = min(block.min(), 0.0), max(block.max(), 0.0)
                scale = float(np.float32((high - low) / scheme.largest))
                zero = round(-low / scale)
            block[:] = (np.clip(np.round(block / scale) + zero, 0, scheme.largest) - zero) * scale
    return result


@pytest.mark.parametrize("scheme", SCHEMES, ids=KEEP)
@pytest.mark.parametrize("columns", [256, 216])
def test_kernel_computes_with_the_dequantized_weight(scheme: Scheme, columns: int) -> None:
    weight = weights(24, columns)
    x = np.random.default_rng(1).standard_normal((5, columns)).astype(np.float32)
    quantized = rtn.quantize(weight, None, scheme)
    expected = x.astype(np.float64) @ dequantize(quantized, scheme, columns).astype(np.float64).T
    assert relative_error(matmul_nbits(x, quantized, scheme, 0), expected) < 1e-5
    assert relative_error(matmul_nbits(x, quantized, scheme, 4), expected) < 2e-2


@pytest.mark.parametrize("scheme", SCHEMES, ids=KEEP)
def test_gather_kernel_is_exact(scheme: Scheme) -> None:
    quantized = rtn.quantize(weights(40, 768), None, scheme)
    ids = np.array([[0, 39, 7], [7, 1, 20]], np.int64)
    rows = gather_block_quantized(ids, quantized, scheme)
    np.testing.assert_array_equal(rows, dequantize(quantized, scheme, 768)[ids])


@pytest.mark.parametrize("scheme", SCHEMES, ids=KEEP)
def test_rounds_as_the_plain_rule_says(scheme: Scheme) -> None:
    weight = weights(8, 512)
    rounded = dequantize(rtn.quantize(weight, None, scheme), scheme, 512)
    expected = reference(weight, scheme)
    # A weight half way between two codes may go either way in float32.
    step = np.abs(expected).max() / (scheme.middle - 1)
    assert np.mean(np.abs(rounded - expected) > 1e-6) < 1e-3
    assert np.abs(rounded - expected).max() < 1.01 * step


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.symmetric], ids=KEEP)
def test_symmetric_bytes_are_those_of_onnxruntimes_quantizer(scheme: Scheme) -> None:
    weight = weights(64, 1024)
    quantized = rtn.quantize(weight, None, scheme)
    packed, scales, _ = onnxruntime_codes(weight, scheme)
    np.testing.assert_array_equal(pack_codes(quantized.codes, scheme.bits), packed)
    np.testing.assert_array_equal(quantized.scales, scales)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not s.symmetric], ids=KEEP)
def test_asymmetric_grid_is_that_of_onnxruntimes_quantizer(scheme: Scheme) -> None:
    weight = weights(64, 1024)
    quantized = rtn.quantize(weight, None, scheme)
    packed, scales, zero_points = onnxruntime_codes(weight, scheme)
    assert quantized.zero_points is not None
    np.testing.assert_array_equal(pack_codes(quantized.zero_points, scheme.bits), zero_points)
    np.testing.assert_array_equal(quantized.scales, scales)
    assert np.mean(pack_codes(quantized.codes, scheme.bits) != packed) < 1e-4


@pytest.mark.parametrize("scheme", SCHEMES, ids=KEEP)
def test_zero_constant_and_denormal_blocks(scheme: Scheme) -> None:
    size = scheme.block_size
    largest = 2e38  # the difference of its signs is more than float32 can hold
    weight = np.zeros((1, 6 * size), np.float32)
    for block, value in enumerate((0.0, 0.5, -0.5, 1e-44, 1.2e-38, largest)):
        weight[0, block * size : (block + 1) * size] = value
    weight[0, -1] = -largest
    quantized = rtn.quantize(weight, None, scheme)
    assert np.isfinite(quantized.scales).all()
    rounded = dequantize(quantized, scheme, weight.shape[1]).reshape(6, size)
    assert (rounded[0] == 0).all()
    np.testing.assert_allclose(rounded[1], 0.5, rtol=1e-6)
    np.testing.assert_allclose(rounded[2], -0.5, rtol=1e-6)
    assert np.abs(rounded[3:5]).max() < 1e-37
    # Symmetric codes reach one step further on one side: the other limit is a step short.
    np.testing.assert_allclose(
        rounded[5] / largest, weight[0, -size:] / largest, atol=0.2 if scheme.bits == 4 else 0.02
    )


def test_a_ragged_last_block_ignores_its_filling() -> None:
    scheme = Scheme(4, 32)
    weight = weights(4, 40)
    ragged = rtn.quantize(weight, None, scheme)
    padded = rtn.quantize(np.pad(weight, ((0, 0), (0, 24))), None, scheme)
    np.testing.assert_array_equal(ragged.codes, padded.codes)
    np.testing.assert_array_equal(ragged.scales, padded.scales)
    assert (ragged.codes[:, 1, 8:] == scheme.middle).all()


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(50, 96)
    for scheme in (Scheme(4, 32), Scheme(8, 16, symmetric=False)):
        monkeypatch.setattr(grid, "PIECE", 1 << 20)
        whole = rtn.quantize(weight, None, scheme)
        monkeypatch.setattr(grid, "PIECE", 7 * 96)
        pieces = rtn.quantize(weight, None, scheme)
        np.testing.assert_array_equal(whole.codes, pieces.codes)
        np.testing.assert_array_equal(whole.scales, pieces.scales)


def test_speed() -> None:
    weight = weights(1024, 4096)
    scheme = Scheme(4, 32)
    times = []
    for _ in range(3):
        start = time.process_time()
        pack_codes(rtn.quantize(weight, None, scheme).codes, 4)
        times.append(time.process_time() - start)
    # Measured 150 million a second; a rewrite with a Python loop over blocks would take a hundred times as long.
    assert weight.size / min(times) > 10e6


def test_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, quantize.apply, quantize.recipe; "
        "quantize.recipe.load_recipe('int4'); "
        "sys.exit(', '.join({'torch', 'transformers', 'optimum', 'onnxscript'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
