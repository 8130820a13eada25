from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from exporter.bind import DEDUP, WeightTensor
from exporter.write import write_models
from model.bundle import WeightInfo
from model.errors import NumericalError
from model.progress import NullProgress
from model.shards import TensorRef
from quantize import lazy, rtn
from quantize.apply import quantize_models
from quantize.lazy import LazyWeight, Source
from quantize.pack import dequantize
from quantize.recipe import Recipe, Rule, load_recipe
from quantize.scheme import Floats, Quantized, Scheme, Statistics
from tests.unit.onnx_kernels import Array, constant, model_of, relative_error, run_model, variable

RNG = np.random.default_rng(0)


def random(*shape: int) -> Array:
    return (RNG.standard_normal(shape) * 0.1).astype(np.float32)


class Counted:
    """An array behind a lazy tensor, counting how often it is read."""

    def __init__(self, array: Array, name: str) -> None:
        self.reads = 0

        def read() -> ir.TensorProtocol:
            self.reads += 1
            return ir.tensor(array, name=name)

        self.tensor = ir.LazyTensor(
            read, dtype=ir.DataType.from_numpy(array.dtype), shape=ir.Shape(array.shape), name=name
        )


def chain(**kernels: Array) -> tuple[ir.Model, dict[str, Counted]]:
    """x @ first @ second ..., with lazy [K, N] weights named after the keywords (``__`` for a dot)."""
    x = variable("x", np.zeros((1, 1), np.float32))
    current, nodes, weights, counted = x, [], [], {}
    for keyword, array in kernels.items():
        module = keyword.replace("__", ".")
        counted[module] = Counted(array, f"{module}.weight")
        value = constant(f"{module}.weight", array)
        value.const_value = counted[module].tensor
        nodes.append(ir.Node("", "MatMul", [current, value]))
        nodes[-1].outputs[0].name = f"after_{module}"
        weights.append(value)
        current = nodes[-1].outputs[0]
    return model_of(nodes, [x], weights, ir.DataType.FLOAT), counted


def recipe(*rules: tuple[str, Scheme | None]) -> Recipe:
    return Recipe("test", tuple(Rule(match, scheme) for match, scheme in rules))


def parts(model: ir.Model) -> dict[str, Array]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def test_reports_what_became_of_every_weight() -> None:
    model, _ = chain(
        layers__0__up=random(64, 96), layers__0__down=random(96, 216), layers__1__up=random(216, 48), fc=random(48, 8)
    )
    rules = recipe(
        ("decoder.fc", None), ("decoder.layers.*.down", Scheme(8, 32)), ("decoder.layers.*", Scheme(4, 64, False))
    )
    report = quantize_models({"decoder": model}, rules)
    assert [(w.path, str(w.scheme), w.reason) for w in report.weights] == [
        ("decoder.layers.0.up", "int4 g64 asym rtn", ""),
        ("decoder.layers.0.down", "int8 g32 sym rtn", ""),
        ("decoder.layers.1.up", "None", "its 216 inputs divide by no block from 16 to 64"),
        ("decoder.fc", "None", "the recipe keeps it float"),
    ]
    assert [n.op_type for n in model.graph] == ["MatMulNBits", "MatMulNBits", "MatMul", "MatMul"]
    assert report.parameters == 64 * 96 + 96 * 216 + 216 * 48 + 48 * 8
    assert report.parameters_by_scheme() == {
        "int4 g64 asym rtn": 64 * 96, "int8 g32 sym rtn": 96 * 216, "float": 216 * 48 + 48 * 8,
    }  # fmt: skip
    assert [w.path for w in report.kept_float] == ["decoder.layers.1.up", "decoder.fc"]
    assert report.manifest_weights()["decoder.layers.0.down"] == WeightInfo(8, 32, True, "rtn", 96 * 216, "")
    assert report.manifest_weights()["decoder.fc"].bits == 0
    stored = sum(array.nbytes for array in parts(model).values())
    assert report.bits_per_weight == pytest.approx(8 * stored / report.parameters)
    assert report.warnings() == []


def test_a_smaller_block_is_taken_and_reported() -> None:
    model, _ = chain(fc=random(48, 8))
    report = quantize_models({"decoder": model}, recipe(("*", Scheme(4, 64))))
    assert [(str(w.scheme), w.reason) for w in report.weights] == [
        ("int4 g16 sym rtn", "its 48 inputs do not divide by 64")
    ]


def test_what_no_rule_matches_stays_float_and_idle_rules_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model, counted = chain(fc=random(64, 8))
    rules = recipe(("decodr.*", Scheme(4)), ("vision_encoder.*", Scheme(8)), ("decoder.layers.*", None))
    report = quantize_models({"decoder": model}, rules)
    assert [w.reason for w in report.weights] == ["no rule of the recipe matches"]
    # A model without images has no vision encoder: a rule about it is no mistake.
    assert [rule.match for rule in report.unmatched_rules] == ["decodr.*", "decoder.layers.*"]
    assert "'decodr.*' decides about no weight" in caplog.text
    assert counted["fc"].reads == 0


def test_reads_no_weight_until_asked_and_each_once() -> None:
    model, counted = chain(up=random(64, 96), down=random(96, 64))
    quantize_models({"decoder": model}, recipe(("*", Scheme(4, symmetric=False))))
    assert [c.reads for c in counted.values()] == [0, 0]
    assert list(model.graph.initializers) == [
        f"{module}.{part}" for module in ("up", "down") for part in ("weight_q", "weight_scales", "weight_zero_points")
    ]
    first = parts(model)
    assert [c.reads for c in counted.values()] == [1, 1]
    again = parts(model)
    assert [c.reads for c in counted.values()] == [2, 2]
    assert all((first[name] == again[name]).all() for name in first)


def test_declared_types_and_shapes_are_those_of_the_bytes() -> None:
    model, _ = chain(up=random(96, 40))
    quantize_models({"decoder": model}, recipe(("*", Scheme(4, symmetric=False))))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        array = tensor.numpy()
        assert tuple(tensor.shape.numpy()) == array.shape
        assert tensor.dtype == ir.DataType.from_numpy(array.dtype) == value.dtype
        assert tensor.nbytes == array.nbytes


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    array = random(96, 77)
    results = []
    for chunk in (1 << 23, 5 * 96):
        monkeypatch.setattr(lazy, "CHUNK", chunk)
        model, _ = chain(up=array)
        quantize_models({"decoder": model}, recipe(("*", Scheme(4, symmetric=False))))
        results.append(parts(model))
    assert all((results[0][name] == results[1][name]).all() for name in results[0])


def test_methods_see_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def method(weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
        assert weight.dtype == np.float32
        assert weight.flags.c_contiguous
        seen.append(weight.shape)
        return rtn.quantize(weight, statistics, scheme)

    monkeypatch.setattr(lazy, "CHUNK", 640)
    source = Source(ir.tensor(random(70, 64).astype(ml_dtypes.bfloat16)), False, "decoder.fc.weight")
    result = LazyWeight(source, Scheme(8), method)
    assert result.take("codes").shape == (70, 2, 32)
    assert seen == [(10, 64)] * 7


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_checkpoint_tensors_are_read_in_rows(tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    array = random(50, 64).astype(dtype)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"header" + array.tobytes())
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[np.dtype(dtype).name]
    ref = TensorRef("model.embed_tokens.weight", name, (50, 64), file, 6, array.nbytes)
    table = WeightTensor(ref, ir.DataType.FLOAT, (50, 64), transposed=False, name="embed_tokens.weight")
    head = WeightTensor(ref, ir.DataType.FLOAT, (64, 50), transposed=True, name="lm_head.weight")
    monkeypatch.setattr(lazy, "CHUNK", 64 * 7)
    monkeypatch.setattr(WeightTensor, "numpy", None)
    expected = LazyWeight(Source(ir.tensor(array.astype(np.float32)), False, "x"), Scheme(4), rtn.quantize)
    weights = [
        LazyWeight(Source(t, b, t.name or ""), Scheme(4), rtn.quantize) for t, b in ((table, False), (head, True))
    ]
    assert weights[0].key == weights[1].key
    codes = expected.take("codes")
    assert all((w.take("codes") == codes).all() for w in weights)


def test_a_tied_table_is_quantized_once_and_marked_as_equal() -> None:
    table = random(50, 64)
    ids = variable("ids", np.zeros((1, 1), np.int64))
    data = constant("embed_tokens.weight", table)
    gather = ir.Node("", "Gather", [data, ids])
    transpose = ir.Node("", "Transpose", [data], [ir.AttrInt64s("perm", [1, 0])])
    head = ir.Node("", "MatMul", [gather.outputs[0], transpose.outputs[0]])
    model = model_of([gather, transpose, head], [ids], [data], ir.DataType.FLOAT)
    report = quantize_models({"decoder": model}, load_recipe("int4"))
    assert [(w.path, w.shared_with) for w in report.weights] == [
        ("decoder.embed_tokens", ""), ("decoder.lm_head", "decoder.embed_tokens"),
    ]  # fmt: skip
    assert report.parameters == table.size
    assert report.bits_per_weight == 4 + 32 / 64 + 8 / 64  # one block a row, whose zero point takes a byte
    marks: dict[str, set[bytes]] = {}
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        marks.setdefault(str(value.const_value.meta[DEDUP]), set()).add(value.const_value.tobytes())
    assert len(marks) == 3
    assert all(len(contents) == 1 for contents in marks.values())


def test_a_tied_table_lies_on_disk_once_and_still_runs(tmp_path: Path) -> None:
    table = random(256, 64)
    ids = variable("ids", np.zeros((1, 1), np.int64))
    data, kernel = constant("embed_tokens.weight", table), constant("lm_head.weight", np.ascontiguousarray(table.T))
    gather = ir.Node("", "Gather", [data, ids])
    head = ir.Node("", "MatMul", [gather.outputs[0], kernel])
    model = model_of([gather, head], [ids], [data, kernel], ir.DataType.FLOAT)
    model.graph.outputs[0].shape = ir.Shape(["batch", "sequence", 256])
    report = quantize_models({"decoder": model}, recipe(("*", Scheme(4))))
    write_models({"decoder": model}, tmp_path, NullProgress())
    places = {
        name: (value.const_value.offset, value.const_value.length)
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert places["embed_tokens.weight_q"] == places["lm_head.weight_q"]
    assert places["embed_tokens.weight_scales"] == places["lm_head.weight_scales"]
    session = ort.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
    w = dequantize(rtn.quantize(table, None, Scheme(4)), Scheme(4), 64)
    feeds = np.array([[3, 255, 0]], np.int64)
    assert relative_error(session.run(None, {"ids": feeds})[0], w[feeds] @ w.T) < 2e-2
    assert len(report.weights) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_values_that_are_no_numbers(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "CHUNK", 64 * 4)
    array = random(64, 20)
    array[5, 9] = array[6, 9] = array[0, 13] = bad
    model, _ = chain(layers__0__up=array)
    quantize_models({"decoder": model}, recipe(("*", Scheme(8))))
    with pytest.raises(NumericalError) as caught:
        parts(model)
    assert "decoder.layers.0.up.weight: 3 of its values are NaN or infinite, the first at [9, 5]" in str(caught.value)


def test_large_weights_are_not_mistaken_for_infinite() -> None:
    model, _ = chain(up=np.full((64, 4), 1e37, np.float32))
    quantize_models({"decoder": model}, recipe(("*", Scheme(8))))
    assert np.isfinite(parts(model)["up.weight_scales"]).all()


def test_float16_scales_that_underflow_give_zeros_not_nan() -> None:
    array = np.full((32, 2), 1e-7, np.float16)
    x = variable("x", np.zeros((1, 32), np.float16))
    data = constant("up.weight", array)
    model = model_of([ir.Node("", "MatMul", [x, data])], [x], [data], ir.DataType.FLOAT16)
    quantize_models({"decoder": model}, recipe(("*", Scheme(8))), accuracy_level=0)
    assert parts(model)["up.weight_scales"].dtype == np.float16
    assert np.isfinite(run_model(model, {"x": np.ones((1, 32), np.float16)})).all()


def test_a_float_bundle_gives_the_same_bytes_as_a_checkpoint(tmp_path: Path) -> None:
    kernels = {"up": random(64, 96), "down": random(96, 64)}
    float_model, _ = chain(**kernels)
    ir.save(float_model, tmp_path / "decoder.onnx", external_data="decoder.onnx.data", size_threshold_bytes=0)
    loaded = ir.load(tmp_path / "decoder.onnx")
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in loaded.graph.initializers.values())
    direct, _ = chain(**kernels)
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    for model in (loaded, direct):
        quantize_models({"decoder": model}, load_recipe("int8"), accuracy_level=0)
    from_bundle, from_checkpoint = parts(loaded), parts(direct)
    assert list(from_bundle) == list(from_checkpoint)
    assert all((from_bundle[name] == from_checkpoint[name]).all() for name in from_bundle)
    assert relative_error(run_model(loaded, {"x": x}), x @ kernels["up"] @ kernels["down"]) < 0.02
