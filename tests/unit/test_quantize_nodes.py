from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quantize import rtn
from quantize.lazy import LazyWeight
from quantize.nodes import find_weights, replace_use
from quantize.pack import dequantize
from quantize.scheme import Scheme
from tests.unit.onnx_kernels import Array, constant, model_of, relative_error, run_model, variable

RNG = np.random.default_rng(0)


def weight(*shape: int, dtype: str = "float32") -> Array:
    return (RNG.standard_normal(shape) * 0.1).astype(dtype)


def node(op: str, *inputs: ir.Value, **integers: int) -> ir.Node:
    made = ir.Node("", op, inputs, [ir.AttrInt64(name, value) for name, value in integers.items()], name=op.lower())
    made.outputs[0].name = f"{op.lower()}_{inputs[-1].name}"
    return made


def rounded(array: Array, scheme: Scheme) -> Array:
    """An [N, K] weight as its codes stand for it."""
    return dequantize(rtn.quantize(array, None, scheme), scheme, array.shape[1])


def quantize_all(model: ir.Model, scheme: Scheme, accuracy_level: int = 0) -> None:
    for use in find_weights("decoder", model.graph):
        if use.kind != "other":
            replace_use(model.graph, use, LazyWeight(use.source, scheme, rtn.quantize), accuracy_level)


def linear(x: ir.Value, kernel: Array, bias: Array | None, name: str) -> tuple[list[ir.Node], list[ir.Value]]:
    weights = [constant(f"{name}.weight", kernel)]
    nodes = [node("MatMul", x, weights[0])]
    if bias is not None:
        weights.append(constant(f"{name}.bias", bias))
        nodes.append(node("Add", nodes[0].outputs[0], weights[1]))
    return nodes, weights


@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(8, 16), Scheme(4, 64, False), Scheme(8, 32, False)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_linear_layer_keeps_its_meaning(scheme: Scheme, dtype: str) -> None:
    x = RNG.standard_normal((2, 3, 192)).astype(dtype)
    kernel, bias = weight(192, 40, dtype=dtype), weight(40, dtype=dtype)
    a = variable("x", x)
    nodes, weights = linear(a, kernel, bias, "layers.0.mlp.up_proj")
    model = model_of(nodes, [a], weights, ir.DataType.from_numpy(x.dtype))
    quantize_all(model, scheme)
    assert [n.op_type for n in model.graph] == ["MatMulNBits", "Add"]
    names = ["weight_q", "weight_scales"] + ([] if scheme.symmetric else ["weight_zero_points"])
    expected_names = ["layers.0.mlp.up_proj.bias", *(f"layers.0.mlp.up_proj.{name}" for name in names)]
    assert list(model.graph.initializers) == expected_names
    expected = x.astype(np.float64) @ rounded(kernel.T.astype(np.float32), scheme).T.astype(np.float64) + bias
    assert relative_error(run_model(model, {"x": x}), expected) < (1e-5 if dtype == "float32" else 3e-3)


@pytest.mark.parametrize("level", [0, 4])
def test_attributes_of_matmul(level: int) -> None:
    x = RNG.standard_normal((1, 64)).astype(np.float32)
    a = variable("x", x)
    nodes, weights = linear(a, weight(64, 48), None, "fc")
    nodes[0].metadata_props["layer_ann"] = "layers.0"
    model = model_of(nodes, [a], weights, ir.DataType.FLOAT)
    quantize_all(model, Scheme(4), level)
    new = model.graph[0]
    attributes = {name: attribute.as_int() for name, attribute in new.attributes.items()}
    expected = {"K": 64, "N": 48, "bits": 4, "block_size": 32}
    assert attributes == (expected | {"accuracy_level": 4} if level else expected)
    assert new.name == "matmul"
    assert new.metadata_props == {"layer_ann": "layers.0"}
    assert model.graph.outputs[0].producer() is new
    assert model.graph.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(8), Scheme(4, 16, False), Scheme(8, 64, False)], ids=str)
def test_a_table_gives_exactly_its_rounded_rows(scheme: Scheme) -> None:
    table = weight(50, 192)
    ids = RNG.integers(0, 50, (2, 7))
    indices, data = variable("ids", ids), constant("embed_tokens.weight", table)
    model = model_of([node("Gather", data, indices, axis=0)], [indices], [data], ir.DataType.FLOAT)
    quantize_all(model, scheme)
    assert [n.op_type for n in model.graph] == ["GatherBlockQuantized"]
    np.testing.assert_array_equal(run_model(model, {"ids": ids}), rounded(table, scheme)[ids])


def tied(as_one: bool) -> tuple[ir.Model, Array]:
    """ids → table → head with the same table, in one initializer or in two."""
    table = weight(50, 64)
    ids = variable("ids", np.zeros((1, 1), np.int64))
    data = constant("embed_tokens.weight", table)
    gather = node("Gather", data, ids)
    if as_one:
        transpose = ir.Node("", "Transpose", [data], [ir.AttrInt64s("perm", [1, 0])])
        head = node("MatMul", gather.outputs[0], transpose.outputs[0])
        return model_of([gather, transpose, head], [ids], [data], ir.DataType.FLOAT), table
    kernel = constant("lm_head.weight", np.ascontiguousarray(table.T))
    head = node("MatMul", gather.outputs[0], kernel)
    return model_of([gather, head], [ids], [data, kernel], ir.DataType.FLOAT), table


@pytest.mark.parametrize("as_one", [True, False])
def test_a_tied_table(as_one: bool) -> None:
    model, table = tied(as_one)
    uses = find_weights("decoder", model.graph)
    assert [(use.path, use.kind) for use in uses] == [("decoder.embed_tokens", "gather"), ("decoder.lm_head", "matmul")]
    assert [use.source.shape for use in uses] == [(50, 64), (50, 64)]
    quantize_all(model, Scheme(8))
    assert [n.op_type for n in model.graph] == ["GatherBlockQuantized", "MatMulNBits"]
    assert sorted(model.graph.initializers) == [
        "embed_tokens.weight_q", "embed_tokens.weight_scales", "lm_head.weight_q", "lm_head.weight_scales",
    ]  # fmt: skip
    first, second = (model.graph.initializers[f"{name}.weight_q"].const_value for name in ("embed_tokens", "lm_head"))
    assert first is not None
    assert second is not None
    assert first.tobytes() == second.tobytes()
    ids = np.array([[3, 49]], np.int64)
    w = rounded(table, Scheme(8))
    assert relative_error(run_model(model, {"ids": ids}), w[ids] @ w.T) < 1e-5


def test_one_use_in_float_keeps_the_float_table() -> None:
    model, table = tied(as_one=True)
    head = find_weights("decoder", model.graph)[1]
    replace_use(model.graph, head, LazyWeight(head.source, Scheme(8), rtn.quantize), 0)
    assert [n.op_type for n in model.graph] == ["Gather", "MatMulNBits"]
    assert "embed_tokens.weight" in model.graph.initializers
    ids = np.array([[3, 49]], np.int64)
    assert relative_error(run_model(model, {"ids": ids}), table[ids] @ rounded(table, Scheme(8)).T) < 1e-5


def test_what_is_no_weight_is_left_alone() -> None:
    x = RNG.standard_normal((4, 32)).astype(np.float32)
    a = variable("x", x)
    norm, table, gemm = constant("norm.weight", weight(32)), constant("cos", weight(32, 32)), weight(32, 8)
    scaled = node("Mul", a, norm)
    turned = node("MatMul", scaled.outputs[0], table)
    last = node("Gemm", turned.outputs[0], kernel := constant("fc.weight", gemm))
    model = model_of([scaled, turned, last], [a], [norm, table, kernel], ir.DataType.FLOAT)
    assert [(use.path, use.kind) for use in find_weights("mtp", model.graph)] == [("mtp.fc", "other")]


def test_a_weight_on_the_left_or_of_another_domain_is_other() -> None:
    x = RNG.standard_normal((32, 4)).astype(np.float32)
    a, left = variable("x", x), constant("fc.weight", weight(8, 32))
    model = model_of([node("MatMul", left, a)], [a], [left], ir.DataType.FLOAT)
    assert [use.kind for use in find_weights("decoder", model.graph)] == ["other"]
    a, right = variable("x", x), constant("fc.weight", weight(4, 32))
    model = model_of([ir.Node("other.domain", "MatMul", [a, right])], [a], [right], ir.DataType.FLOAT)
    assert [use.kind for use in find_weights("decoder", model.graph)] == ["other"]
