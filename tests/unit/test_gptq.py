"""GPTQ against a reference that inverts the Hessian and does one column at a time, as the paper has it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.methods import layer, output_error, statistics_of, stored_weight
from model.errors import NumericalError, UsageError
from quantize import awq, factor, gptq, search
from quantize.pack import dequantize
from quantize.scheme import Floats, Quantized, Scheme, Statistics
from tests.unit.onnx_kernels import matmul_nbits, relative_error

SCHEMES = [Scheme(4, 32), Scheme(4, 16, False), Scheme(8, 64, False), Scheme(4, 256), Scheme(4, 128, False)]
Doubles = NDArray[np.float64]


@pytest.fixture(autouse=True)
def nothing_prepared() -> Iterator[None]:
    gptq._prepared.clear()
    yield
    gptq._prepared.clear()


def small(columns: int = 256, tokens: int = 1500, seed: int = 0) -> tuple[Floats, Statistics, Floats]:
    weight, calibration, inputs = layer(24, columns, tokens, seed)
    return weight, statistics_of(calibration), inputs


def loss(weight: Floats, stored: Floats, hessian: Floats) -> float:
    """What GPTQ makes small."""
    error = stored.astype(np.float64) - weight
    return float(np.sum((error @ hessian.astype(np.float64)) * error))


def by_the_paper(weight: Floats, statistics: Statistics, grid: Quantized, scheme: Scheme) -> tuple[Floats, Doubles]:
    """Rounds one column after another and spreads each error with the inverse of what is left of the Hessian.

    Returns:
        The stored weight, and how near to a tie each rounding was.
    """
    assert statistics.hessian is not None
    hessian = statistics.hessian.astype(np.float64)
    diagonal = np.diagonal(hessian).copy()
    order = sorted(range(len(diagonal)), key=lambda k: -diagonal[k])
    hessian = 0.9 * hessian
    hessian[np.diag_indices_from(hessian)] = diagonal + 0.01 * diagonal.mean()
    inverse = np.linalg.inv(hessian)
    left, stored = weight.astype(np.float64), np.zeros(weight.shape)
    ties = np.ones(weight.shape)
    for k in order:
        block = k // scheme.block_size
        scale = grid.scales[:, block].astype(np.float64)
        zero = np.float64(scheme.middle) if grid.zero_points is None else grid.zero_points[:, block].astype(np.float64)
        exact = left[:, k] / scale + zero
        stored[:, k] = (np.clip(np.round(exact), 0, scheme.largest) - zero) * scale
        ties[:, k] = np.abs(np.abs(exact - np.floor(exact)) - 0.5)
        error = (left[:, k] - stored[:, k]) / inverse[k, k]
        left -= np.outer(error, inverse[k])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return stored.astype(np.float32), ties


@pytest.mark.parametrize("columns", [256, 200])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gives_what_the_paper_gives(scheme: Scheme, columns: int) -> None:
    weight, statistics, _ = small(columns)
    assert statistics.hessian is not None
    found = gptq.quantize(weight, statistics, scheme)
    grid = search.quantize(weight, statistics, scheme)
    np.testing.assert_array_equal(found.scales, grid.scales)
    assert (found.zero_points is None) == scheme.symmetric
    expected, ties = by_the_paper(weight, statistics, grid, scheme)
    stored = dequantize(found, scheme, columns)
    # A weight half way between two codes may go either way, and what comes after it then differs.
    clear = ties.min(axis=1) > 1e-4
    assert clear.any()
    np.testing.assert_allclose(stored[clear], expected[clear], rtol=0, atol=1e-6)
    assert loss(weight, stored, statistics.hessian) == pytest.approx(
        loss(weight, expected, statistics.hessian), rel=2e-2
    )
    filling = found.codes.reshape(len(weight), -1)[:, columns:]
    zeros = scheme.middle if found.zero_points is None else found.zero_points[:, -1:]
    assert (filling == zeros).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_hessian_makes_the_difference(scheme: Scheme) -> None:
    weight, statistics, inputs = small()
    columns = weight.shape[1]
    searched = search.quantize(weight, statistics, scheme)
    found = gptq.quantize(weight, statistics, scheme)
    # Uncorrelated inputs leave nothing to be made up for: every weight takes the nearest code, but for ties.
    alone = gptq.quantize(weight, Statistics(statistics.mean_square, np.eye(columns, dtype=np.float32)), scheme)
    assert np.mean(alone.codes != searched.codes) < 1e-3
    assert np.mean(found.codes != alone.codes) > 0.03
    diagonal = Statistics(statistics.mean_square, np.diag(statistics.mean_square))
    np.testing.assert_array_equal(gptq.quantize(weight, diagonal, scheme).codes, alone.codes)
    errors = [output_error(weight, dequantize(q, scheme, columns), inputs) for q in (found, searched)]
    assert errors[0] < 0.97 * errors[1]


def test_columns_go_from_large_inputs_to_small_ones() -> None:
    weight, statistics, _ = small()
    order = gptq.prepared(statistics).order
    assert (np.diff(statistics.mean_square[order]) <= 0).all()
    # What comes first is rounded as it stands; what comes last has heard of all that was rounded before.
    scheme = Scheme(4, 32)
    searched, found = (method(weight, statistics, scheme).codes for method in (search.quantize, gptq.quantize))
    changed = (searched != found).reshape(len(weight), -1)[:, order].mean(axis=0)
    assert changed[0] == 0
    assert changed[-64:].mean() > 2 * changed[:64].mean()


def test_fewer_inputs_than_channels() -> None:
    weight, calibration, inputs = layer(24, 256, 60)
    statistics, scheme = statistics_of(calibration), Scheme(4, 32)
    assert statistics.hessian is not None
    found = dequantize(gptq.quantize(weight, statistics, scheme), scheme, 256)
    searched = dequantize(search.quantize(weight, statistics, scheme), scheme, 256)
    assert loss(weight, found, statistics.hessian) < 0.5 * loss(weight, searched, statistics.hessian)
    assert output_error(weight, found, inputs) < 1.3 * output_error(weight, searched, inputs)


def test_channels_that_nothing_comes_in_by() -> None:
    weight, calibration, _ = layer(24, 256, 1000)
    dead = np.array([3, 64, 65, 255])
    calibration[:, dead] = 0
    statistics, scheme = statistics_of(calibration), Scheme(4, 32)
    found = gptq.quantize(weight, statistics, scheme)
    stored, step = dequantize(found, scheme, 256), np.abs(np.repeat(found.scales, 32, axis=1))
    # They take the nearest code of their block, and nothing is made up for with them.
    away = np.abs(stored - weight)[:, dead] / step[:, dead]
    inside = (found.codes.reshape(24, 256)[:, dead] > 0) & (found.codes.reshape(24, 256)[:, dead] < 15)
    assert (away[inside] <= 0.5001).all()
    known = gptq.prepared(statistics)
    places = np.isin(known.order, dead)
    for lines in (known.feedback[places], known.feedback[:, places].T):
        assert (np.count_nonzero(lines, axis=1) == 1).all()
    assert np.count_nonzero(known.feedback[~places]) > 20_000
    nothing = Statistics(np.zeros(256, np.float32), np.zeros((256, 256), np.float32))
    plain = search.quantize(weight, nothing, scheme)
    assert np.mean(gptq.quantize(weight, nothing, scheme).codes != plain.codes) < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_only_the_relation_of_inputs_counts(scale: float) -> None:
    weight, statistics, _ = small()
    assert statistics.hessian is not None
    factor_of_two = np.float32(2.0 ** np.round(np.log2(scale)))
    scaled = Statistics(statistics.mean_square * factor_of_two, statistics.hessian * factor_of_two)
    first, second = (gptq.quantize(weight, known, Scheme(4, 32)).codes for known in (statistics, scaled))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    weight, statistics, _ = small()
    assert statistics.hessian is not None
    spoiled = weight.copy()
    spoiled[5, 7] = bad
    with pytest.raises(NumericalError, match="NaN or infinite"):
        gptq.quantize(spoiled, statistics, Scheme(4, 32))
    hessian = statistics.hessian.copy()
    hessian[9, 4] = bad
    with pytest.raises(NumericalError, match="Hessian of the inputs: it holds NaN"):
        gptq.quantize(weight, Statistics(statistics.mean_square, hessian), Scheme(4, 32))
    squares = statistics.mean_square.copy()
    squares[3] = bad
    with pytest.raises(NumericalError, match="a mean square of the inputs"):
        Statistics(squares, statistics.hessian)


def test_refuses_what_is_no_hessian() -> None:
    weight, statistics, _ = small()
    assert statistics.hessian is not None
    for missing in (None, Statistics(statistics.mean_square)):
        with pytest.raises(UsageError, match="it needs calibrated inputs. Give --calibration"):
            gptq.quantize(weight, missing, Scheme(4, 32))
    negative = statistics.hessian.copy()
    negative[4, 4] = -1
    with pytest.raises(NumericalError, match="negative mean square"):
        gptq.quantize(weight, Statistics(statistics.mean_square, negative), Scheme(4, 32))
    indefinite = statistics.hessian.copy()
    indefinite[4, 9] = indefinite[9, 4] = 50 * np.diagonal(indefinite).max()
    with pytest.raises(NumericalError, match="not positive semidefinite"):
        gptq.quantize(weight, Statistics(statistics.mean_square, indefinite), Scheme(4, 32))
    with pytest.raises(ValueError, match="shape"):
        Statistics(statistics.mean_square, statistics.hessian[:8])
    with pytest.raises(ValueError, match="shape"):
        Statistics(statistics.mean_square, input_scale=np.ones(8, np.float32))


def test_a_hessian_is_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    factored: list[int] = []

    def counted(matrix: factor.Matrix) -> None:
        factored.append(len(matrix))
        factor.unit_upper(matrix)

    monkeypatch.setattr(gptq, "unit_upper", counted)
    weight, statistics, _ = small(64)
    for rows in (weight[:7], weight[7:], weight * np.float32(2)):  # q, k and v, or one of them in pieces
        gptq.quantize(rows, statistics, Scheme(4, 32))
    assert factored == [64]
    others = [small(64, seed=seed)[1] for seed in (1, 2)]
    for other in others:
        gptq.quantize(weight, other, Scheme(4, 32))
    assert len(gptq._prepared) == 2  # and not a model's
    gptq.quantize(weight, statistics, Scheme(4, 32))
    assert factored == [64] * 4
    del statistics, others, other
    gc.collect()
    assert len(gptq._prepared) == 0


def test_rows_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, calibration, _ = layer(100, 256, 1000)
    statistics, scheme = statistics_of(calibration), Scheme(4, 64, False)
    whole = gptq.quantize(weight, statistics, scheme)
    again = gptq.quantize(weight, statistics, scheme)
    np.testing.assert_array_equal(whole.codes, again.codes)
    parts = [gptq.quantize(weight[part], statistics, scheme) for part in (slice(0, 37), slice(37, 100))]
    np.testing.assert_array_equal(np.concatenate([part.scales for part in parts]), whole.scales)
    # A product of other rows may add in another order, so that a tie is decided otherwise.
    joined = np.concatenate([part.codes for part in parts])
    assert np.mean((joined != whole.codes).any(axis=(1, 2))) < 0.05
    monkeypatch.setattr(gptq, "PIECE", 1)
    small_pieces = gptq.quantize(weight, statistics, scheme)
    assert np.mean((small_pieces.codes != whole.codes).any(axis=(1, 2))) < 0.05


def test_blocks_of_columns_and_precision_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics, _ = small(600, 3000)
    assert statistics.hessian is not None
    scheme = Scheme(4, 32)
    first = loss(weight, dequantize(gptq.quantize(weight, statistics, scheme), scheme, 600), statistics.hessian)
    monkeypatch.setattr(gptq, "_BLOCK", 17)
    monkeypatch.setattr(gptq, "_FLOAT64_COLUMNS", 0)
    gptq._prepared.clear()
    assert gptq.prepared(statistics).feedback.dtype == np.float32
    second = loss(weight, dequantize(gptq.quantize(weight, statistics, scheme), scheme, 600), statistics.hessian)
    assert second == pytest.approx(first, rel=1e-2)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", [1, 5, 256, 257, 700])
def test_factor(size: int, dtype: type[np.generic]) -> None:
    random = np.random.default_rng(size).standard_normal((2 * size, size))
    hessian = random.T @ random / size
    matrix = hessian.astype(dtype)
    matrix[np.tril_indices(size, -1)] = 1e9  # the lower half is not looked at
    factor.unit_upper(matrix)
    upper = matrix.astype(np.float64)
    assert (np.tril(upper, -1) == 0).all()
    np.testing.assert_allclose(np.diagonal(upper), 1, rtol=1e-6)
    inverse = np.linalg.inv(upper)
    middle = inverse @ hessian @ inverse.T
    np.testing.assert_allclose(middle, np.diag(np.diagonal(middle)), atol=1e-12 if dtype == np.float64 else 1e-5)
    assert (np.diagonal(middle) > 0).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_kernels_read_what_is_found(scheme: Scheme) -> None:
    weight, statistics, inputs = small()
    found = gptq.quantize(weight, statistics, scheme)
    expected = inputs[:5].astype(np.float64) @ dequantize(found, scheme, 256).T
    assert relative_error(matmul_nbits(inputs[:5], found, scheme, 0), expected) < 1e-5


def test_scaled_inputs() -> None:
    weight, statistics, inputs = small()
    scheme = Scheme(4, 32)
    with pytest.raises(UsageError, match="no scale was chosen"):
        gptq.quantize_scaled(weight, statistics, scheme)
    scaled = replace(statistics, input_scale=awq.input_scale([weight], statistics, scheme))
    assert scaled.input_scale is not None
    found = gptq.quantize_scaled(weight, scaled, scheme)
    np.testing.assert_array_equal(found.input_scale, scaled.input_scale)
    # The same as of a layer that has these weights and inputs.
    outer = np.outer(scaled.input_scale, scaled.input_scale).astype(np.float32)
    assert scaled.hessian is not None
    as_such = Statistics(np.diagonal(scaled.hessian / outer).copy(), scaled.hessian / outer)
    other = gptq.quantize(weight * scaled.input_scale, as_such, scheme)
    assert np.mean((other.codes != found.codes).any(axis=(1, 2))) < 0.1
    plain = gptq.quantize(weight, statistics, scheme)
    errors = [output_error(weight, stored_weight(q, scheme, 256), inputs) for q in (found, plain)]
    assert errors[0] < 0.95 * errors[1]
