"""What holds for every method."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.methods import layer, output_error, quantized_by, statistics_of, stored_weight
from model.errors import NumericalError, UsageError
from quantize import awq
from quantize.methods import HESSIAN, MEAN_SQUARE, METHODS, NEEDS, NOTHING, SCALED, USES
from quantize.recipe import WITHOUT_INPUTS, fitting_scheme, load_recipe, parse_recipe
from quantize.scheme import INT8, Floats, Quantized, Scheme, Statistics
from tests.unit.onnx_kernels import relative_error

SCHEMES = [
    Scheme(bits, size, symmetric) for bits, size, symmetric in itertools.product((4, 8), (16, 64), (True, False))
]
# By rows, as products of integers have it.
ROWS = Scheme(8, 64, activations=INT8)


@functools.cache
def known(columns: int) -> Statistics:
    """Correlated inputs of unequal sizes, with a scale that divides them."""
    _, inputs, _ = layer(8, columns, columns)
    given = statistics_of(inputs)
    scale = np.float32(2) ** np.rint(np.log2(given.mean_square) / 4)
    return Statistics(given.mean_square, given.hessian, scale.astype(np.float32))


@functools.cache
def given(name: str, columns: int) -> Statistics | None:
    """What a method needs, and no more."""
    statistics, needs = known(columns), NEEDS[name]
    if needs == NOTHING:
        return None
    hessian = statistics.hessian if needs == HESSIAN else None
    return Statistics(statistics.mean_square, hessian, statistics.input_scale if name in SCALED else None)


def quantize(name: str, weight: Floats, scheme: Scheme) -> Quantized:
    """As calibration calls it."""
    return METHODS[name](weight, given(name, weight.shape[1]), scheme)


def test_what_methods_need() -> None:
    assert set(METHODS) == set(NEEDS) == set(USES)
    assert set(METHODS) > SCALED
    weight, statistics = layer(8, 64, 100)[0], known(64)
    without = {
        NOTHING: None,
        MEAN_SQUARE: Statistics(statistics.mean_square, input_scale=statistics.input_scale),
        HESSIAN: statistics,
    }
    for name, method in METHODS.items():
        assert method(weight, without[NEEDS[name]], Scheme(4, 32)).codes.shape == (8, 2, 32)
        if NEEDS[name] != NOTHING:
            with pytest.raises(UsageError, match=f"method {'awq' if name in SCALED else name}.*Give --calibration"):
                method(weight, None, Scheme(4, 32))


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 32, False), Scheme(4, 128), Scheme(8, 64)], ids=str)
def test_order_of_errors_on_inputs_that_were_not_seen(scheme: Scheme) -> None:
    weight, calibration, inputs = layer(128, 256, 3000)
    statistics = statistics_of(calibration)
    found = {}
    for name in ("rtn", "hqq", "search", "search, calibrated", "awq", "gptq", "awq-gptq"):
        quantized = quantized_by(name, weight, statistics, scheme)
        found[name] = output_error(weight, stored_weight(quantized, scheme, 256), inputs)
    assert found["search"] < 0.98 * found["rtn"]
    assert found["hqq"] < 0.99 * found["rtn"]
    assert found["search, calibrated"] < 0.85 * found["search"]
    assert found["gptq"] < 0.96 * found["search, calibrated"]
    assert found["awq"] < 0.96 * found["search, calibrated"]
    assert found["awq-gptq"] < 0.96 * min(found["gptq"], found["awq"])


def test_no_two_methods_give_the_same() -> None:
    weight, statistics = layer(32, 256, 100)[0], known(256)
    codes = [quantize(name, weight, Scheme(4, 32)).codes for name in METHODS]
    codes.append(METHODS["search"](weight, statistics, Scheme(4, 32)).codes)
    for first, second in itertools.combinations(codes, 2):
        assert np.mean(first != second) > 0.01


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 128, False), Scheme(8, 64)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_inputs_make_the_difference_where_a_method_looks_at_them(name: str, scheme: Scheme) -> None:
    weight, calibration, inputs = layer(64, 256, 3000)
    seen, ones = statistics_of(calibration), np.ones(256, np.float32)
    if name in SCALED:
        seen = replace(seen, input_scale=awq.input_scale([weight], seen, scheme))
    found = METHODS[name](weight, seen, scheme)
    # Inputs that are all alike and have nothing to do with each other.
    alike = [Statistics(ones, np.eye(256, dtype=np.float32), ones if name in SCALED else None)]
    if NEEDS[name] == HESSIAN:
        alike.append(replace(seen, hessian=np.eye(256, dtype=np.float32)))
    if name in SCALED:
        alike.append(replace(seen, input_scale=ones))
    for statistics in alike:
        blind = METHODS[name](weight, statistics, scheme)
        if USES[name] == NOTHING:
            np.testing.assert_array_equal(found.codes, blind.codes)
            continue
        assert np.mean(found.codes != blind.codes) > 0.02
        errors = [output_error(weight, stored_weight(q, scheme, 256), inputs) for q in (found, blind)]
        assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize("scheme", [*SCHEMES[1::2], ROWS], ids=str)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(name: str, bad: float, scheme: Scheme) -> None:
    weight = layer(8, 64, 100)[0]
    weight[3, 5] = bad
    with pytest.raises(NumericalError, match="NaN or infinite"):
        quantize(name, weight, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_degenerate_blocks(name: str, scheme: Scheme) -> None:
    size = scheme.block_size
    weight = np.zeros((2, 7, size), np.float32)
    weight[:, 1] = 0.5
    weight[:, 2] = -0.5
    weight[:, 3] = 1e-44
    weight[:, 4] = 1.2e-38
    weight[:, 5, 3] = -1e4
    weight[:, 6] = np.linspace(-1e-30, 2e-30, size)
    # One at a time, so that none makes up for what another could not hold.
    for block in range(7):
        alone = np.zeros_like(weight)
        alone[:, block] = weight[:, block]
        found = quantize(name, alone.reshape(2, -1), scheme)
        assert np.isfinite(found.scales).all()
        stored = stored_weight(found, scheme, 7 * size).reshape(2, 7, size)
        assert (np.delete(stored, block, axis=1) == 0).all()
        wanted, stored = weight[:, block], stored[:, block]
        # What GPTQ makes up for may be more than half a step.
        step = np.abs(found.scales[:, block]).max() * (4 if "gptq" in name else 1.01)
        if found.input_scale is not None:
            step = step / found.input_scale.reshape(7, size)[block].min()
        if block in (3, 4):
            assert np.abs(stored).max() < 1e-37
        elif block == 6:
            assert np.abs(stored - wanted).max() < max(step, 1e-38)
        elif "awq" not in name and "gptq" not in name:
            np.testing.assert_allclose(stored, wanted, rtol=1e-6)
        else:
            assert np.abs(stored - wanted).max() <= step


@pytest.mark.parametrize("name", METHODS)
def test_degenerate_rows(name: str) -> None:
    weight = np.zeros((7, 64), np.float32)
    weight[1], weight[2], weight[3], weight[4] = 0.5, -0.5, 1e-44, 1.2e-38
    weight[5, 3] = -1e4
    weight[6] = np.linspace(-1e-30, 2e-30, 64)
    found = quantize(name, weight, ROWS)
    assert np.isfinite(found.scales).all()
    assert found.zero_points is None
    stored = stored_weight(found, ROWS, 64)
    assert (stored[0] == 0).all()
    assert np.abs(stored[3:5]).max() < 1e-37
    for row in (1, 2, 5, 6):
        assert relative_error(stored[row], weight[row].astype(np.float64)) < 0.02


@pytest.mark.parametrize("name", METHODS)
def test_weights_near_the_limit_are_stored_or_refused(name: str) -> None:
    weight = np.zeros((4, 64), np.float32)
    weight[:] = np.linspace(-3e38, 3e38, 64)
    try:
        found = quantize(name, weight, Scheme(4, 32))
    except NumericalError as refused:
        assert "infinite" in str(refused) or "float32 can hold" in str(refused)
        assert name not in ("rtn", "search", "hqq")
    else:
        stored = stored_weight(found, Scheme(4, 32), 64).astype(np.float64)
        assert np.isfinite(stored).all()
        assert np.linalg.norm(stored - weight) < 0.2 * np.linalg.norm(weight.astype(np.float64))


def test_recipes_say_that_they_want_calibration() -> None:
    text = (
        'name = "mine"\n[[rule]]\nmatch = "*.embed_tokens"\nbits = 8\n[[rule]]\nmatch = "*"\nbits = 4\nmethod = "{}"\n'
    )
    for name in METHODS:
        recipe = parse_recipe(text.format(name), "mine.toml")
        assert recipe.calibrated_rule == (None if NEEDS[name] == NOTHING else recipe.rules[1])
        scheme = recipe.rules[1].scheme
        assert scheme is not None
        product, table = fitting_scheme(scheme, 2048), fitting_scheme(scheme, 2048, table=True)
        assert product is not None
        assert product.method == name
        assert table is not None
        assert table.method == (name if NEEDS[name] == NOTHING else WITHOUT_INPUTS)
    assert NEEDS[WITHOUT_INPUTS] == NOTHING
    assert load_recipe("int4").calibrated_rule is None
