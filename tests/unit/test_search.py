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

from model.errors import NumericalError
from quantize import grid, rtn, search
from quantize.lazy import LazyWeight, Source
from quantize.methods import METHODS
from quantize.pack import dequantize
from quantize.recipe import parse_recipe
from quantize.scheme import BLOCK_SIZES, Floats, Quantized, Scheme, Statistics
from tests.unit.onnx_kernels import gather_block_quantized, matmul_nbits, relative_error

SCHEMES = [
    Scheme(bits, size, symmetric, "search")
    for bits, size, symmetric in itertools.product((4, 8), BLOCK_SIZES, (True, False))
]
DRAWS = ("normal", "t", "laplace", "uniform", "shifted")

# Prints a digest of everything that search gives for some weights.
DIGEST = """
import hashlib
import itertools
import numpy as np
from quantize.scheme import Scheme, Statistics
from quantize.search import quantize
integers = np.arange(24 * 512, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(1 << 32)
even = integers.astype(np.float64) / 2**32 - 0.5
weight = (even * even * even).astype(np.float32).reshape(24, 512)
statistics = Statistics((integers[:512] % np.uint64(97)).astype(np.float32))
digest = hashlib.sha256()
for bits, size, symmetric, known in itertools.product((4, 8), (16, 128), (True, False), (None, statistics)):
    found = quantize(weight, known, Scheme(bits, size, symmetric, "search"))
    for part in (found.codes, found.scales, found.zero_points):
        digest.update(b"" if part is None else part.tobytes())
print(digest.hexdigest())
"""


def weights(rows: int, columns: int, draw: str = "t", seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    shape = (rows, columns)
    drawn = {
        "normal": lambda: rng.standard_normal(shape),
        "t": lambda: rng.standard_t(5, shape),
        "laplace": lambda: rng.laplace(size=shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "shifted": lambda: rng.standard_normal(shape) + 2,
    }[draw]()
    return (drawn * 0.02).astype(np.float32)


def block_errors(
    weight: Floats, quantized: Quantized, scheme: Scheme, importance: Floats | None = None
) -> NDArray[np.float64]:
    """Squared error of every block, weighted if asked for."""
    errors = (dequantize(quantized, scheme, weight.shape[1]).astype(np.float64) - weight) ** 2
    if importance is not None:
        errors *= importance
    padded = np.pad(errors, ((0, 0), (0, -weight.shape[1] % scheme.block_size)))
    return padded.reshape(len(weight), -1, scheme.block_size).sum(-1)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_better_than_round_to_nearest_and_on_no_block_worse(scheme: Scheme, draw: str) -> None:
    weight = weights(32, 1024, draw)
    found, plain = search.quantize(weight, None, scheme), rtn.quantize(weight, None, scheme)
    assert found.codes.dtype == np.uint8
    assert found.codes.shape == plain.codes.shape
    assert found.codes.max() <= scheme.largest
    assert (found.zero_points is None) == scheme.symmetric
    errors, plain_errors = block_errors(weight, found, scheme), block_errors(weight, plain, scheme)
    assert (errors <= plain_errors).all()
    # Uniform weights have nothing to clip: spanning them is the best there is, and only luck helps.
    atmost = 0.94 if scheme.bits == 4 else 0.97
    assert errors.sum() < (1 if draw == "uniform" else atmost) * plain_errors.sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_statistics_say_which_weights_count(scheme: Scheme) -> None:
    weight = weights(32, 1024)
    mean_square = (np.random.default_rng(3).standard_normal(1024) ** 4).astype(np.float32)
    known = search.quantize(weight, Statistics(mean_square), scheme)
    unknown, plain = search.quantize(weight, None, scheme), rtn.quantize(weight, None, scheme)
    errors = block_errors(weight, known, scheme, mean_square)
    assert (errors <= block_errors(weight, plain, scheme, mean_square)).all()
    assert errors.sum() < 0.97 * block_errors(weight, unknown, scheme, mean_square).sum()
    assert block_errors(weight, known, scheme).sum() > block_errors(weight, unknown, scheme).sum()
    # Only the relation of the inputs counts; and inputs that are never anything decide about nothing.
    for factor in (2.0**100, 2.0**-100):
        scaled = search.quantize(weight, Statistics(mean_square * np.float32(factor)), scheme)
        np.testing.assert_array_equal(scaled.codes, known.codes)
    silent = search.quantize(weight, Statistics(np.zeros(1024, np.float32)), scheme)
    np.testing.assert_array_equal(silent.codes, plain.codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_kernels_read_what_is_found(scheme: Scheme) -> None:
    weight = weights(24, 512)
    found = search.quantize(weight, None, scheme)
    stored = dequantize(found, scheme, 512)
    x = np.random.default_rng(1).standard_normal((5, 512)).astype(np.float32)
    assert relative_error(matmul_nbits(x, found, scheme, 0), x.astype(np.float64) @ stored.T) < 1e-5
    ids = np.array([[0, 23, 7]], np.int64)
    np.testing.assert_array_equal(gather_block_quantized(ids, found, scheme), stored[ids])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_degenerate_blocks(scheme: Scheme) -> None:
    size = scheme.block_size
    kinds: list[float | str] = [0.0, 0.5, -0.5, 1e-44, 1.2e-38, "outlier", "limits", "tiny"]
    weight = np.zeros((1, len(kinds), size), np.float32)
    for block, kind in zip(weight[0], kinds, strict=True):
        if isinstance(kind, float):
            block[:] = kind
    weight[0, 5, 3] = -1e4
    weight[0, 6] = np.linspace(-2e38, 3e38, size)
    weight[0, 7] = np.linspace(-1e-30, 2e-30, size)
    flat = weight.reshape(1, -1)
    found, plain = search.quantize(flat, None, scheme), rtn.quantize(flat, None, scheme)
    stored = dequantize(found, scheme, flat.shape[1]).reshape(len(kinds), size)
    assert np.isfinite(found.scales).all()
    assert (stored[0] == 0).all()
    np.testing.assert_allclose(stored[1], 0.5, rtol=1e-6)
    np.testing.assert_allclose(stored[2], -0.5, rtol=1e-6)
    assert np.abs(stored[3:5]).max() < 1e-37
    np.testing.assert_allclose(stored[5], weight[0, 5], rtol=1e-6)
    with np.errstate(over="ignore"):
        assert (block_errors(flat, found, scheme) <= block_errors(flat, plain, scheme)).all()
    assert np.abs(stored[7]).max() > 1e-30


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.block_size in (16, 128)], ids=str)
@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_codes_are_those_of_the_scales_as_they_are_stored(scheme: Scheme, kind: type[np.generic]) -> None:
    # Scales of float16 below 6e-5 have few bits left, and below 3e-8 there are none.
    for size in (1.0, 2e-3, 2e-5, 2e-7):
        array = (weights(16, 512) * np.float32(size)).astype(kind)
        weight = array.astype(np.float32)
        source = Source(ir.tensor(array), False, "decoder.fc.weight")
        errors = []
        for method in (search.quantize, rtn.quantize):
            parts = LazyWeight(source, scheme, method)
            quantized = method(weight, None, Scheme(scheme.bits, scheme.block_size, scheme.symmetric))
            if method is search.quantize:
                quantized = method(weight, None, parts._stored)
                np.testing.assert_array_equal(parts.take("scales").astype(np.float32), quantized.scales)
            scales = quantized.scales.astype(kind).astype(np.float32)
            stored = Quantized(quantized.codes, scales, quantized.zero_points)
            errors.append(block_errors(weight, stored, scheme))
        assert (errors[0] <= errors[1]).all()
        assert errors[0].sum() < 0.97 * errors[1].sum()


def test_scales_that_do_not_fit_are_refused() -> None:
    source = Source(ir.tensor(np.full((2, 32), 6e4, np.float16)), False, "decoder.fc.weight")
    assert np.isfinite(LazyWeight(source, Scheme(4, 32, True, "search"), search.quantize).take("scales")).all()

    def huge(weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
        return search.quantize(weight * np.float32(100), statistics, scheme)

    with pytest.raises(NumericalError, match="do not fit float16"):
        LazyWeight(source, Scheme(4, 32, True, "search"), huge).take("codes")


def test_a_ragged_last_block_and_blocks_as_long_as_rows() -> None:
    weight = weights(8, 200)
    for scheme in (Scheme(4, 64, True, "search"), Scheme(8, 64, False, "search")):
        ragged = search.quantize(weight, None, scheme)
        padded = search.quantize(np.pad(weight, ((0, 0), (0, 56))), None, scheme)
        np.testing.assert_array_equal(ragged.codes, padded.codes)
        np.testing.assert_array_equal(ragged.scales, padded.scales)
    rows = Scheme(8, 200, True, "search")
    found, plain = search.quantize(weight, None, rows), rtn.quantize(weight, None, rows)
    assert (block_errors(weight, found, rows) <= block_errors(weight, plain, rows)).all()


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(50, 96)
    statistics = Statistics(np.linspace(0, 1, 96, dtype=np.float32))
    for scheme in (Scheme(4, 32, True, "search"), Scheme(8, 16, False, "search")):
        monkeypatch.setattr(grid, "PIECE", 1 << 20)
        whole = search.quantize(weight, statistics, scheme)
        monkeypatch.setattr(grid, "PIECE", 7 * 96)
        pieces = search.quantize(weight, statistics, scheme)
        np.testing.assert_array_equal(whole.codes, pieces.codes)
        np.testing.assert_array_equal(whole.scales, pieces.scales)


def test_bytes_do_not_depend_on_the_processor() -> None:
    digests = set()
    newest = "AVX512F AVX512_SKX AVX512_ICL X86_V4"
    for disabled in ("", newest, f"AVX2 FMA3 X86_V3 {newest}"):
        environment = dict(os.environ, NPY_DISABLE_CPU_FEATURES=disabled)
        command = [sys.executable, "-W", "ignore", "-c", DIGEST]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert digests == {"16e924b9b77b20763e88d1b80d403880fb69e7330f80bc380adaa25277a52b2c"}


def test_recipes_know_it() -> None:
    assert METHODS["search"] is search.quantize
    text = 'name = "mine"\n[[rule]]\nmatch = "*"\nbits = 4\nmethod = "{}"\n'
    rule = parse_recipe(text.format("search"), "mine.toml").match("decoder.fc")
    assert rule is not None
    assert rule.scheme == Scheme(4, method="search")
    with pytest.raises(Exception, match='method is \'best\', wanted one of "rtn", "search"'):
        parse_recipe(text.format("best"), "mine.toml")
