"""Inputs rotated in front of products of integers: the same function, with massive inputs shared by their block."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from model.errors import UsageError
from quantize.apply import quantize_models
from quantize.dynamic import rotation_of
from quantize.recipe import Recipe, Rule, fitting_scheme, parse_recipe
from quantize.rotate import ROTATIONS, hadamard, restored, rotated, rotated_statistics
from quantize.scheme import INT8, Scheme, Statistics
from quantize.stored import stored_weights
from tests.unit.onnx_kernels import Array, constant, model_of, relative_error, run_model, variable

PLAIN = Scheme(8, 0, activations=INT8)
TURNED = Scheme(8, 0, activations=INT8, rotate=64)
SHAPES = {"decoder.turned": (8, 64), "decoder.plain": (8, 64)}
RULE = 'name = "mine"\n[[rule]]\nmatch = "*"\nbits = 8\n'


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sum_of_products(dtype: ir.DataType = ir.DataType.FLOAT, **kernels: Array) -> ir.Model:
    """The sum of x @ kernel [K, N] over the kernels, whose names are the modules'."""
    columns = next(iter(kernels.values())).shape[0]
    x = variable("x", np.zeros((1, 1, columns), dtype.numpy()))
    weights = [constant(f"{name}.weight", kernel.astype(dtype.numpy())) for name, kernel in kernels.items()]
    nodes = [ir.node("MatMul", [x, weight], name=str(weight.name)) for weight in weights]
    for node in nodes:
        node.outputs[0].name = f"{node.name}_out"
        node.outputs[0].type = ir.TensorType(dtype)
    nodes.append(ir.node("Sum", [node.outputs[0] for node in nodes], name="sum"))
    return model_of(nodes, [x], weights, dtype)


def quantized(model: ir.Model, *rules: tuple[str, Scheme]) -> ir.Model:
    quantize_models({"decoder": model}, Recipe("mine", tuple(Rule(*rule) for rule in rules)))
    return model


@pytest.mark.parametrize("size", ROTATIONS)
def test_a_rotation_is_undone_by_itself(size: int) -> None:
    matrix = hadamard(size)
    assert np.array_equal(matrix @ matrix, size * np.eye(size))
    weight = normal(6, 3 * size)
    turned = rotated(weight, size)
    exact = (weight.reshape(-1, size).astype(np.float64) @ matrix / size).reshape(weight.shape)
    assert relative_error(turned, exact) < 2e-7
    assert relative_error(restored(turned, size), weight) < 3e-7
    # What is a whole number stays one, whichever way it is summed.
    whole = np.rint(100 * weight)
    assert np.array_equal(restored(rotated(whole, size), size), whole)


def test_the_bytes_are_the_same_everywhere() -> None:
    # The order of the additions is part of the format: a bundle's bytes must not depend on the machine.
    weight = (np.arange(4 * 128, dtype=np.float32).reshape(4, 128) % 37 - 18) / np.float32(7)
    values = rotated(weight, 64)
    one, step = weight.reshape(-1, 64).copy(), 1
    while step < 64:
        for first in range(64):
            if not first & step:
                a, b = one[:, first].copy(), one[:, first | step].copy()
                one[:, first], one[:, first | step] = a + b, a - b
        step *= 2
    assert values.tobytes() == (one.reshape(4, 128) / np.float32(64)).tobytes()


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("columns", [64, 192])
def test_the_function_stays_the_same(columns: int, dtype: ir.DataType) -> None:
    x, kernel = normal(2, 3, columns).astype(dtype.numpy()), normal(columns, 24, seed=1)
    model = quantized(sum_of_products(dtype, fc=kernel), ("*", TURNED))
    y = run_model(model, {"x": x})
    assert (y.shape, y.dtype) == ((2, 3, 24), x.dtype)
    # A block in the wrong place, or a factor that is missing, gives 1 and more.
    assert 1e-3 < relative_error(y, x.astype(np.float64) @ kernel) < 0.02


def test_a_massive_channel_takes_less_from_the_others() -> None:
    x, kernel = normal(16, 512)[None], normal(512, 64, seed=1)
    x[..., [7, 300]] *= 300
    kernel[[7, 300]] /= 300  # the function has no more of these channels than of others
    wanted = x.astype(np.float64) @ kernel
    plain, turned = (
        relative_error(run_model(quantized(sum_of_products(fc=kernel), ("*", scheme)), {"x": x}), wanted)
        for scheme in (PLAIN, TURNED)
    )
    assert plain > 0.2
    assert turned < plain / 3


def test_rows_of_zeros_give_zeros_and_what_is_no_number_stays_in_its_row() -> None:
    x = normal(3, 128)[None]
    x[0, 1], x[0, 2, 0] = 0, np.nan
    y = run_model(quantized(sum_of_products(fc=normal(128, 8)), ("*", TURNED)), {"x": x})[0]
    assert np.isfinite(y[0]).all()
    assert not y[1].any()
    assert np.isnan(y[2]).all()


def test_modules_share_what_is_rotated_alike() -> None:
    kernels = {name: normal(64, 8, seed=i) for i, name in enumerate(("a", "b", "c", "d"))}
    model = quantized(
        sum_of_products(ir.DataType.FLOAT, **kernels), ("[ab]", PLAIN), ("decoder.[cd]", TURNED), ("*", PLAIN)
    )
    ops = [node.op_type for node in model.graph]
    assert (ops.count("QuantizeLinear"), ops.count("MatMul")) == (2, 1)
    x = normal(1, 5, 64, seed=9)
    wanted = x.astype(np.float64) @ np.sum(list(kernels.values()), axis=0)
    assert relative_error(run_model(model, {"x": x}), wanted) < 0.02


def test_a_graph_tells_what_it_rotates() -> None:
    x = sum_of_products(turned=normal(64, 8), plain=normal(64, 8))
    model = quantized(x, ("*.turned", TURNED), ("*", PLAIN))
    products = [node for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
    assert [rotation_of(node) for node in products] == [64, 0]
    stored = {weight.path: weight for weight in stored_weights("decoder", model.graph, SHAPES)}
    for path, weight in stored.items():
        assert relative_error(weight.read(0, 8), normal(64, 8).T) < 0.01, path
    assert stored.keys() == SHAPES.keys()


def test_statistics_are_rotated_too() -> None:
    x = normal(400, 96) * np.linspace(0.1, 3, 96, dtype=np.float32)
    turned = (x.reshape(-1, 32) @ hadamard(32)).reshape(x.shape)
    hessian = x.T @ x / len(x)
    found = rotated_statistics(Statistics(hessian.diagonal().copy(), hessian), 32)
    assert found.hessian is not None
    assert relative_error(found.hessian, turned.T @ turned / len(x)) < 1e-5
    assert relative_error(found.mean_square, (turned**2).mean(0)) < 1e-5
    # Without products of inputs a block's values count as equally large.
    alone = rotated_statistics(Statistics((x**2).mean(0)), 32)
    assert relative_error(alone.mean_square, np.repeat((x**2).mean(0).reshape(-1, 32).sum(1), 32)) < 1e-6


def test_blocks_divide_the_inputs() -> None:
    assert fitting_scheme(TURNED, 192) == Scheme(8, 192, activations=INT8, rotate=64)
    assert fitting_scheme(TURNED, 96) == Scheme(8, 96, activations=INT8, rotate=32)
    assert fitting_scheme(TURNED, 36) == Scheme(8, 36, activations=INT8)
    assert fitting_scheme(TURNED, 64, table=True) == Scheme(8, 32)
    model = sum_of_products(fc=normal(96, 8))
    report = quantize_models({"decoder": model}, Recipe("mine", (Rule("*", TURNED),)))
    assert report.weights[0].reason == "its 96 inputs do not divide by 64"
    assert str(report.weights[0].scheme) == "int8 by rows sym rtn, int8 activations rotated by 32"


def test_the_key_of_a_recipe() -> None:
    recipe = parse_recipe(RULE + 'activations = "int8"\nrotate = 64\n', "mine")
    assert recipe == Recipe("mine", (Rule("*", TURNED),))
    assert parse_recipe(recipe.to_toml(), "again") == recipe
    for rest, said in (
        ("rotate = 64", "rotate has no meaning where activations is not 'int8'"),
        ('activations = "int8"\nrotate = 48', "rotate is 48, wanted one of 0, 16, 32, 64, 128"),
        ('activations = "int8"\nrotate = true', "rotate is True"),
        ('activations = "int8"\nrotate = 64\nmethod = "awq"', "awq scales the inputs that rotate turns"),
    ):
        with pytest.raises(UsageError) as caught:
            parse_recipe(RULE + rest, "mine")
        assert said in caught.value.why
