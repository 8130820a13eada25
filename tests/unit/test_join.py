"""Products of the same activations become one, and give what they gave."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.bind import DEDUP, READS, WEIGHT
from exporter.order import ORIGIN
from exporter.write import write_models
from model.progress import NullProgress
from quantize import apply
from quantize.apply import quantize_models
from quantize.join import join_products
from quantize.joined import JoinedTensor
from quantize.recipe import Recipe, Rule
from quantize.scheme import INT8, Scheme
from tests.unit.onnx_kernels import Array, constant, model_of, run_model, variable

WIDTH = 64
ROWS = {"self_attn.q_proj": 48, "self_attn.k_proj": 16, "self_attn.v_proj": 16, "mlp.gate_proj": 96, "mlp.up_proj": 96}
INTEGERS = Scheme(8, 0, activations=INT8)
JOINED = ["self_attn.qkv_proj", "mlp.gate_up_proj"]


def layer(prefix: str = "layers.0", *, other_activations: str = "", dtype: type = np.float32) -> ir.Model:
    """y = all projections of x next to each other; the one called `other_activations` reads x + x."""
    random = np.random.default_rng(0)
    x, kind = variable("x", np.zeros((1, WIDTH), dtype)), ir.DataType.from_numpy(np.dtype(dtype))
    double = ir.node("Add", [x, x])
    double.outputs[0].name = "doubled"
    nodes, weights, outputs = [double], [], []
    for name, rows in ROWS.items():
        weight = constant(f"{prefix}.{name}.weight", random.standard_normal((WIDTH, rows)).astype(dtype))
        source = double.outputs[0] if name == other_activations else x
        node = ir.Node("", "MatMul", [source, weight], name=f"{prefix}.{name}/MatMul")
        node.outputs[0].name = f"{prefix}.{name}/MatMul_output_0"
        node.outputs[0].type = ir.TensorType(kind)
        nodes.append(node)
        weights.append(weight)
        outputs.append(node.outputs[0])
    nodes.append(ir.node("Concat", outputs, {"axis": -1}))
    return model_of(nodes, [x], weights, kind)


def recipe(*rules: tuple[str, Scheme | None]) -> Recipe:
    return Recipe("test", tuple(Rule(match, scheme) for match, scheme in rules))


def names(model: ir.Model) -> list[str]:
    products = ("MatMulNBits", "MatMulIntegerToFloat")
    found = [str(node.inputs[1].name) for node in model.graph if node.op_type in products and node.inputs[1]]
    return [name.removeprefix("layers.0.").removesuffix(".weight_q") for name in found]


def apart(monkeypatch: pytest.MonkeyPatch, rules: Recipe, *, dtype: type = np.float32) -> ir.Model:
    """The same graph, quantized and not joined."""
    model = layer(dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(apply, "join_products", lambda graph: 0)
        quantize_models({"decoder": model}, rules)
    return model


def rows_of_x(count: int) -> Array:
    return np.random.default_rng(1).standard_normal((count, WIDTH)).astype(np.float32)


SCHEMES = [
    Scheme(4, 32), Scheme(4, 16, symmetric=False), Scheme(8, 64), Scheme(8, 32, False), INTEGERS,
    Scheme(8, 0, activations=INT8, rotate=32),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_joined_products_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, scheme: Scheme) -> None:
    model, rules = layer(), recipe(("*", scheme))
    report = quantize_models({"decoder": model}, rules)
    assert names(model) == JOINED
    assert [weight.path.removeprefix("decoder.layers.0.") for weight in report.weights] == list(ROWS)
    before = apart(monkeypatch, rules)
    assert names(before) == list(ROWS)
    for count in (1, 5):
        x = rows_of_x(count)
        assert np.array_equal(run_model(model, {"x": x}), run_model(before, {"x": x}))
    count = sum(len(tensor.tobytes()) for tensor in tensors(model).values())
    assert count == sum(len(tensor.tobytes()) for tensor in tensors(before).values())


def tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    found = {str(v.name): v.const_value for v in model.graph.initializers.values() if v.const_value is not None}
    return {name: tensor for name, tensor in found.items() if "." in name}


def test_members_that_differ_stay_apart() -> None:
    model = layer()
    quantize_models({"decoder": model}, recipe(("*.v_proj", Scheme(8, 32)), ("*", Scheme(4, 32))))
    assert names(model) == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_up_proj"]
    model = layer()
    quantize_models({"decoder": model}, recipe(("*.up_proj", Scheme(4, 32, symmetric=False)), ("*", Scheme(4, 32))))
    assert names(model) == ["self_attn.qkv_proj", "mlp.gate_proj", "mlp.up_proj"]
    model = layer()
    quantize_models({"decoder": model}, recipe(("*.up_proj", Scheme(4, 16)), ("*.k_proj", None), ("*", Scheme(4, 32))))
    assert names(model) == ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]


def test_integer_products_are_joined_with_what_scales_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rules = layer(dtype=np.float16), recipe(("*", INTEGERS))
    quantize_models({"decoder": model}, rules)
    ops = [node.op_type for node in model.graph]
    assert [ops.count(op) for op in ("MatMulIntegerToFloat", "QuantizeLinear", "Split")] == [2, 1, 2]
    assert ops.count("Cast") == 3  # the activations once, and each product
    before = apart(monkeypatch, rules, dtype=np.float16)
    x = rows_of_x(3).astype(np.float16)
    assert np.array_equal(run_model(model, {"x": x}), run_model(before, {"x": x}))
    turned = recipe(
        ("*.up_proj", Scheme(8, 0, activations=INT8, rotate=32)), ("*.v_proj", Scheme(8, 32)), ("*", INTEGERS)
    )
    mixed = layer()
    quantize_models({"decoder": mixed}, turned)
    assert sorted(names(mixed)) == sorted(ROWS)


def test_joined_codes_of_integer_products_lie_row_by_row() -> None:
    model = layer()
    quantize_models({"decoder": model}, recipe(("*", INTEGERS)))
    tensor = model.graph.initializers["layers.0.self_attn.qkv_proj.weight_q"].const_value
    assert isinstance(tensor, JoinedTensor)
    assert (tensor.dtype, list(tensor.shape)) == (ir.DataType.INT8, [WIDTH, 80])
    file = io.BytesIO()
    tensor.tofile(file)
    assert file.getvalue() == tensor.tobytes()
    # Codes that a file has already are joined the same way.
    parts = np.split(tensor.numpy(), [48, 64], axis=1)
    again = JoinedTensor([ir.tensor(np.ascontiguousarray(part)) for part in parts], "again", 1)
    file = io.BytesIO()
    again.tofile(file)
    assert file.getvalue() == tensor.tobytes()


def test_other_activations_and_other_places_stay_apart() -> None:
    model = layer(other_activations="self_attn.k_proj")
    quantize_models({"decoder": model}, recipe(("*", Scheme(4, 32))))
    assert names(model) == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_up_proj"]
    model = layer("blocks.0")
    quantize_models({"vision_encoder": model}, recipe(("*", Scheme(8, 32))))
    assert sum(node.op_type == "MatMulNBits" for node in model.graph) == len(ROWS)


def test_joining_again_changes_nothing() -> None:
    model = layer()
    quantize_models({"decoder": model}, recipe(("*", Scheme(4, 32))))
    before = [node.name for node in model.graph]
    assert join_products(model.graph) == 0
    assert [node.name for node in model.graph] == before


def test_a_joined_tensor_writes_its_members_and_knows_their_places() -> None:
    model = layer()
    quantize_models({"decoder": model}, recipe(("*", Scheme(4, 32))))
    weights = set()
    for name in ("weight_q", "weight_scales"):
        tensor = model.graph.initializers[f"layers.0.mlp.gate_up_proj.{name}"].const_value
        assert isinstance(tensor, JoinedTensor)
        file = io.BytesIO()
        tensor.tofile(file)
        assert file.getvalue() == tensor.tobytes()
        weights.add(tensor.meta[WEIGHT])
    assert len(weights) == 1  # so that they are written together
    one, two = (ir.tensor(np.full((rows, 3), rows, np.float32), name=str(rows)) for rows in (2, 4))
    one.meta.update({DEDUP: "a", ORIGIN: ("x", 9), READS: ("x",)})
    two.meta.update({DEDUP: "b", ORIGIN: ("y", 1), READS: ("y", "x")})
    joined = JoinedTensor([one, two], "joined")
    assert np.array_equal(joined.numpy(), np.concatenate([one.numpy(), two.numpy()]))
    assert (joined.meta[DEDUP], joined.meta[ORIGIN], joined.meta[READS]) == ("joined a & b", ("y", 1), ("x", "y"))


def test_the_same_graph_gives_the_same_files(tmp_path: Path) -> None:
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        model = layer()
        quantize_models({"decoder": model}, recipe(("*", Scheme(4, 32))))
        model.graph.outputs[0].shape = ir.Shape(["rows", sum(ROWS.values())])
        folder.mkdir()
        write_models({"decoder": model}, folder, NullProgress())
        written.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert written[0] == written[1]
    assert written[0].keys() == {"decoder.onnx", "decoder.onnx.data"}
