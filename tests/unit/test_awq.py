from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.methods import layer, output_error, statistics_of, stored_weight
from model.errors import NumericalError, UsageError
from quantize import awq, search
from quantize.join import join_products
from quantize.lazy import LazyWeight
from quantize.nodes import find_weights, replace_use, scale_inputs
from quantize.scheme import Floats, Scheme, Statistics
from tests.unit.onnx_kernels import Array, constant, model_of, relative_error, run_model, variable

SCHEMES = [Scheme(4, 32), Scheme(4, 128, False), Scheme(8, 64)]
WIDTH = 128
ROWS = {"self_attn.q_proj": 48, "self_attn.k_proj": 16, "self_attn.v_proj": 16, "mlp.down_proj": 32}
SHARED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_large_inputs_are_rounded_more_finely(scheme: Scheme) -> None:
    weight, calibration, inputs = layer(64, 256, 2000)
    statistics = statistics_of(calibration)
    scale = awq.input_scale([weight], statistics, scheme)
    assert scale.dtype == np.float32
    assert np.corrcoef(np.log(scale), np.log(statistics.mean_square))[0, 1] > 0.99
    found = awq.quantize(weight, replace(statistics, input_scale=scale), scheme)
    assert found.input_scale is scale
    stored = stored_weight(found, scheme, 256)
    searched = stored_weight(search.quantize(weight, statistics, scheme), scheme, 256)
    assert output_error(weight, stored, inputs) < 0.95 * output_error(weight, searched, inputs)
    # It is the scale that does it.
    same = awq.quantize(weight, replace(statistics, input_scale=np.ones(256, np.float32)), scheme)
    np.testing.assert_array_equal(same.codes, search.quantize(weight, statistics, scheme).codes)
    assert np.mean(same.codes != found.codes) > 0.05
    # And a scale too many or too few does harm.
    other = awq.quantize(weight, replace(statistics, input_scale=np.square(scale)), scheme)
    assert output_error(weight, stored_weight(other, scheme, 256), inputs) > output_error(weight, stored, inputs)


def test_even_inputs_need_no_scale() -> None:
    weight = layer(64, 256, 100)[0]
    scale = awq.input_scale([weight], Statistics(np.full(256, 7, np.float32)), Scheme(4, 32))
    np.testing.assert_array_equal(scale, 1)
    nothing = awq.input_scale([weight], Statistics(np.zeros(256, np.float32)), Scheme(4, 32))
    np.testing.assert_array_equal(nothing, 1)


def test_the_scale_is_one_for_all_modules_and_every_type_holds_it() -> None:
    weights = [layer(rows, 256, 100, seed)[0] for seed, rows in enumerate((64, 16, 16))]
    mean_square = (np.random.default_rng(0).standard_normal(256) ** 8).astype(np.float32)
    mean_square[[4, 9]] = 0, 1e30
    statistics, scheme = Statistics(mean_square), Scheme(4, 32)
    scale = awq.input_scale(weights, statistics, scheme)
    reciprocal = np.float32(1) / scale
    for kind in (np.float16, ml_dtypes.bfloat16):
        np.testing.assert_allclose(reciprocal.astype(kind).astype(np.float32), reciprocal, rtol=1e-6)
    assert scale[4] == 1
    assert scale.max() <= 256
    assert scale.min() >= 1 / 256
    assert (scale != awq.input_scale(weights[:1], statistics, Scheme(8, 32))).any() or (scale != 1).any()
    # Rows are independent once it is chosen.
    known = replace(statistics, input_scale=scale)
    whole = awq.quantize(weights[0], known, scheme)
    part = awq.quantize(weights[0][5:9], known, scheme)
    np.testing.assert_array_equal(whole.codes[5:9], part.codes)


def test_refusals() -> None:
    weight, statistics = layer(8, 64, 100)[0], Statistics(np.ones(64, np.float32))
    for missing in (None, statistics):
        with pytest.raises(UsageError, match="no scale was chosen for the inputs"):
            awq.quantize(weight, missing, Scheme(4, 32))
    weight[:] = 3e38
    with pytest.raises(NumericalError, match="NaN or infinite"):
        awq.quantize(weight, replace(statistics, input_scale=np.full(64, 2, np.float32)), Scheme(4, 32))


def graph_of(kernels: dict[str, Array], dtype: str) -> ir.Model:
    """y = all projections of x next to each other."""
    x = variable("x", np.zeros((1, WIDTH), dtype))
    nodes, weights = [], []
    for name, kernel in kernels.items():
        value = constant(f"layers.0.{name}.weight", kernel)
        node = ir.Node("", "MatMul", [x, value], name=f"layers.0.{name}/MatMul")
        node.outputs[0].name = f"{name}_output"
        nodes.append(node)
        weights.append(value)
    nodes.append(ir.node("Concat", [node.outputs[0] for node in nodes], {"axis": -1}))
    return model_of(nodes, [x], weights, ir.DataType.from_numpy(np.dtype(dtype)))


def kernels_of(dtype: str) -> dict[str, Array]:
    random = np.random.default_rng(0)
    return {name: (random.standard_normal((WIDTH, n)) * 0.05).astype(dtype) for name, n in ROWS.items()}


def chosen_scale() -> Floats:
    mean_square = (np.random.default_rng(1).standard_normal(WIDTH) ** 4 + 0.01).astype(np.float32)
    rows = [kernel.T.astype(np.float32) for kernel in kernels_of("float32").values()]
    return awq.input_scale(rows, Statistics(mean_square), Scheme(4, 32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_product_of_floats_stays_what_it_was(dtype: str) -> None:
    scale, kernels = chosen_scale(), kernels_of(dtype)
    assert np.ptp(scale) > 1
    x = np.random.default_rng(2).standard_normal((5, WIDTH)).astype(dtype)
    before = run_model(graph_of(kernels, dtype), {"x": x}).astype(np.float64)
    scaled = {
        name: (kernel * scale[:, None]).astype(dtype) if name in SHARED else kernel for name, kernel in kernels.items()
    }
    model = graph_of(scaled, dtype)
    uses = [use for use in find_weights("decoder", model.graph) if use.path.endswith(SHARED)]
    scale_inputs(model.graph, uses, scale)
    assert [node.op_type for node in model.graph] == ["Mul", *["MatMul"] * 4, "Concat"]
    after = run_model(model, {"x": x})
    assert relative_error(after, before) < (1e-6 if dtype == "float32" else 1e-3)
    # Without the factors in the weights it is not: the Mul does something, to these modules alone.
    half = graph_of(kernels, dtype)
    scale_inputs(half.graph, [use for use in find_weights("decoder", half.graph) if use.path.endswith(SHARED)], scale)
    changed = run_model(half, {"x": x})
    assert relative_error(changed[:, :80], before[:, :80]) > 0.2
    np.testing.assert_array_equal(changed[:, 80:], before[:, 80:])


def test_joined_products_share_the_scale() -> None:
    scale, kernels, scheme = chosen_scale(), kernels_of("float32"), Scheme(4, 32)
    statistics = Statistics(np.ones(WIDTH, np.float32), input_scale=scale)
    model = graph_of(kernels, "float32")
    uses = find_weights("decoder", model.graph)
    shared = [use for use in uses if use.path.endswith(SHARED)]
    scale_inputs(model.graph, shared, scale)
    expected = []
    x = np.random.default_rng(2).standard_normal((5, WIDTH)).astype(np.float32)
    for use in uses:
        method, known = (awq.quantize, statistics) if use in shared else (search.quantize, None)
        kernel = np.ascontiguousarray(kernels[use.path.removeprefix("decoder.layers.0.")].T)
        expected.append(x.astype(np.float64) @ stored_weight(method(kernel, known, scheme), scheme, WIDTH).T)
        replace_use(model.graph, use, LazyWeight(use.source, scheme, method, known), 0)
    assert join_products(model.graph) == 2
    assert [node.op_type for node in model.graph] == ["Mul", "MatMulNBits", "Split", "MatMulNBits", "Concat"]
    assert relative_error(run_model(model, {"x": x}), np.concatenate(expected, axis=1)) < 1e-5


def test_only_products_of_the_same_activations_are_scaled() -> None:
    model = graph_of(kernels_of("float32"), "float32")
    uses = find_weights("decoder", model.graph)
    other = variable("other", np.zeros((1, WIDTH), np.float32))
    uses[1].node.replace_input_with(0, other)
    with pytest.raises(ValueError, match="no products of the same activations"):
        scale_inputs(model.graph, uses[:2], chosen_scale())
    with pytest.raises(ValueError, match="have not 16 inputs"):
        scale_inputs(model.graph, uses[:1], np.ones(16, np.float32))
    assert [node.op_type for node in model.graph] == [*["MatMul"] * 4, "Concat"]
