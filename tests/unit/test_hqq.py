from __future__ import annotations

import itertools
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from quantize import grid, hqq, rtn, search
from quantize.lazy import LazyWeight, Source
from quantize.pack import dequantize
from quantize.scheme import BLOCK_SIZES, Floats, Quantized, Scheme, Statistics
from tests.unit.onnx_kernels import matmul_nbits, relative_error

SCHEMES = [
    Scheme(bits, size, symmetric, "hqq")
    for bits, size, symmetric in itertools.product((4, 8), BLOCK_SIZES, (True, False))
]

# Prints a digest of everything that the method gives for some weights.
DIGEST = """
import hashlib
import itertools
import numpy as np
from quantize.hqq import quantize
from quantize.scheme import Scheme
integers = np.arange(24 * 512, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(1 << 32)
even = integers.astype(np.float64) / 2**32 - 0.5
weight = (even * even * even).astype(np.float32).reshape(24, 512)
digest = hashlib.sha256()
for bits, size, symmetric in itertools.product((4, 8), (16, 128), (True, False)):
    found = quantize(weight, None, Scheme(bits, size, symmetric, "hqq"))
    for part in (found.codes, found.scales, found.zero_points):
        digest.update(b"" if part is None else part.tobytes())
print(digest.hexdigest())
"""


def weights(rows: int, columns: int, seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).standard_t(5, (rows, columns)) * 0.02).astype(np.float32)


def errors(weight: Floats, quantized: Quantized, scheme: Scheme, power: float) -> NDArray[np.float64]:
    """Sum of a power of the errors of every block."""
    away = np.abs(dequantize(quantized, scheme, weight.shape[1]).astype(np.float64) - weight) ** power
    return away.reshape(len(weight), -1, scheme.block_size).sum(-1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_small_errors_of_most_weights(scheme: Scheme) -> None:
    weight = weights(32, 1024)
    found, searched = hqq.quantize(weight, None, scheme), search.quantize(weight, None, scheme)
    assert found.codes.max() <= scheme.largest
    assert (found.zero_points is None) == scheme.symmetric
    assert (errors(weight, found, scheme, 0.5) <= 1.0001 * errors(weight, searched, scheme, 0.5)).all()
    atmost = 0.992 if scheme.bits == 4 else 0.9985
    assert errors(weight, found, scheme, 0.5).sum() < atmost * errors(weight, searched, scheme, 0.5).sum()
    # Squares are not what it is after, and still fewer than round to nearest leaves.
    plain = rtn.quantize(weight, None, scheme)
    squares = [errors(weight, quantized, scheme, 2).sum() for quantized in (searched, found, plain)]
    assert squares[1] < squares[2]
    assert squares[0] < 1.01 * squares[1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_outlier_does_not_take_the_grid(symmetric: bool) -> None:
    scheme = Scheme(4, 64, symmetric)
    weight = (0.01 * np.random.default_rng(0).standard_normal((64, 64))).astype(np.float32)
    weight[:, 5] = 0.08
    found, searched = (dequantize(m.quantize(weight, None, scheme), scheme, 64) for m in (hqq, search))
    others = np.delete(np.arange(64), 5)
    small, large = (np.abs(stored - weight)[:, others].mean() for stored in (found, searched))
    assert small < 0.98 * large
    assert np.abs(found - weight)[:, 5].mean() > np.abs(searched - weight)[:, 5].mean()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_kernels_read_what_is_found(scheme: Scheme) -> None:
    weight = weights(24, 512)
    found = hqq.quantize(weight, None, scheme)
    x = np.random.default_rng(1).standard_normal((5, 512)).astype(np.float32)
    expected = x.astype(np.float64) @ dequantize(found, scheme, 512).T
    assert relative_error(matmul_nbits(x, found, scheme, 0), expected) < 1e-5


def test_statistics_are_not_looked_at_and_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = weights(50, 96), Scheme(4, 32, False)
    whole = hqq.quantize(weight, None, scheme)
    known = hqq.quantize(weight, Statistics(np.arange(96, dtype=np.float32)), scheme)
    monkeypatch.setattr(grid, "PIECE", 7 * 96)
    pieces = hqq.quantize(weight, None, scheme)
    for other in (known, pieces):
        np.testing.assert_array_equal(whole.codes, other.codes)
        np.testing.assert_array_equal(whole.scales, other.scales)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_codes_are_those_of_the_scales_as_they_are_stored(kind: type[np.generic]) -> None:
    for size in (1.0, 2e-3, 2e-5, 2e-7):
        array = (weights(16, 512) * np.float32(size)).astype(kind)
        parts = LazyWeight(Source(ir.tensor(array), False, "decoder.fc.weight"), Scheme(4, 64, True), hqq.quantize)
        found = hqq.quantize(array.astype(np.float32), None, parts._stored)
        np.testing.assert_array_equal(parts.take("scales").astype(np.float32), found.scales)
        stored = dequantize(found, Scheme(4, 64, True), 512)
        assert relative_error(stored, array.astype(np.float64)) < 0.2


def test_bytes_do_not_depend_on_the_processor() -> None:
    digests = set()
    newest = "AVX512F AVX512_SKX AVX512_ICL X86_V4"
    for disabled in ("", f"AVX2 FMA3 X86_V3 {newest}"):
        environment = dict(os.environ, NPY_DISABLE_CPU_FEATURES=disabled)
        command = [sys.executable, "-W", "ignore", "-c", DIGEST]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1
