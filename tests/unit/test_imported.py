"""Quantized weights of a checkpoint in the graph: the same codes, read by the kernels or dequantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from exporter.bind import DEDUP, WeightTensor
from model.errors import CheckpointError, NumericalError
from model.packed import Float8Weight, IntegerWeight
from model.shards import TensorRef, open_shards
from model.unpack import PackedInputs, PackedOutputs, Scales, SignedBytes
from quantize.apply import import_models, quantize_models
from quantize.blocks import imported_block_size, imported_scheme
from quantize.recipe import Recipe, Rule
from quantize.scheme import Scheme
from tests.unit.onnx_kernels import Array, constant, model_of, relative_error, run_model, variable

Weight = IntegerWeight | Float8Weight
RNG = np.random.default_rng(0)
EIGHT_BITS = Recipe("test", (Rule("*", Scheme(8, 32)),))


def stored(folder: Path, **arrays: Array) -> dict[str, TensorRef]:
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    return open_shards(folder)[0]


def gptq(
    folder: Path, rows: int, columns: int, group: int, *, groups: Array | None = None, **more: Any
) -> IntegerWeight:
    """A weight with random codes of 4 bits, every zero point, and scales like a trained one's."""
    count = -(-columns // group)
    bits = np.iinfo(np.int32)
    refs = stored(
        folder,
        qweight=RNG.integers(bits.min, bits.max, (columns // 8, rows), np.int32),
        qzeros=RNG.integers(bits.min, bits.max, (count, rows // 8), np.int32),
        scales=RNG.uniform(0.005, 0.02, (count, rows)).astype(more.pop("scale_type", np.float16)),
        g_idx=(np.arange(columns) // group if groups is None else groups).astype(np.int32),
    )
    fields: dict[str, Any] = {
        "codes": PackedInputs(refs["qweight"], 4),
        "scales": Scales(refs["scales"], transposed=True),
        "zero_points": PackedOutputs(refs["qzeros"], 4),
        "symmetric": False,
        "groups": refs["g_idx"],
        "act_order": True,
    } | more
    parts = (refs["qweight"], refs["scales"], refs["qzeros"], refs["g_idx"])
    return IntegerWeight(f"{folder.name}.weight", (rows, columns), parts, "gptq int4", "gptq", 4, group, **fields)


def int8(folder: Path, rows: int, columns: int) -> IntegerWeight:
    """A weight of signed bytes with a scale a row."""
    refs = stored(
        folder,
        weight=RNG.integers(-128, 128, (rows, columns)).astype(np.int8),
        scale=RNG.uniform(0.001, 0.002, (rows, 1)).astype(ml_dtypes.bfloat16),
    )
    codes, scales = SignedBytes(refs["weight"], 8), Scales(refs["scale"])
    parts = (refs["weight"], refs["scale"])
    return IntegerWeight(
        f"{folder.name}.weight", (rows, columns), parts, "ct int8", "compressed-tensors", 8, columns, codes, scales
    )


def float8(folder: Path, rows: int, columns: int) -> Float8Weight:
    """8-bit floats with a scale a row."""
    refs = stored(
        folder,
        weight=RNG.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn),
        scale=RNG.uniform(0.01, 0.02, (rows, 1)).astype(np.float32),
    )
    name, shape, parts = f"{folder.name}.weight", (rows, columns), (refs["weight"], refs["scale"])
    return Float8Weight(name, shape, parts, "fp8 e4m3 per row", refs["weight"], Scales(refs["scale"]), (1, columns))


def parallel(weights: Mapping[str, Weight], kind: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """The sum of x @ weight.T over all weights, each a lazy initializer [K, N]."""
    x = variable("x", np.zeros((1, 1, 1), kind.numpy()))
    nodes, values = [], []
    for name, weight in weights.items():
        rows, columns = weight.shape
        value = constant(f"{name}.weight", np.zeros((columns, rows), kind.numpy()))
        value.const_value = WeightTensor(weight, kind, (columns, rows), transposed=True, name=f"{name}.weight")
        nodes.append(ir.Node("", "MatMul", [x, value]))
        nodes[-1].outputs[0].name = f"{name}/out"
        values.append(value)
    total = nodes[0].outputs[0]
    for node in nodes[1 : len(weights)]:
        nodes.append(ir.Node("", "Add", [total, node.outputs[0]]))
        total = nodes[-1].outputs[0]
        total.name = f"{node.outputs[0].name}/sum"
    return model_of(nodes, [x], values, kind)


def inputs(columns: int, kind: Any = np.float32) -> Array:
    return RNG.standard_normal((2, 3, columns)).astype(kind)


def tensors_of(model: ir.Model) -> dict[str, Array]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(("group", "block"), [(16, 16), (32, 32), (128, 128), (256, 128), (96, 32), (192, 64)])
def test_codes_scales_and_zero_points_are_taken_over(tmp_path: Path, group: int, block: int) -> None:
    weight = gptq(tmp_path / "fc", 24, 384 if 384 % group == 0 else 2 * group, group)
    values, x = weight.read(), inputs(weight.shape[1])
    model = parallel({"fc": weight})
    report = import_models({"decoder": model}, accuracy_level=0)
    assert operators(model) == ["MatMulNBits"]
    assert [(w.path, w.scheme, w.reason) for w in report.weights] == [
        ("decoder.fc", Scheme(4, block, False, "imported:gptq"), "repacked exactly")
    ]
    assert report.weights[0].scheme == imported_scheme(weight)
    assert report.recipe == "imported"
    info = report.manifest_weights()["decoder.fc"]
    assert (info.bits, info.method, info.reason) == (4, "imported:gptq", "repacked exactly")
    grid, found = weight.open_grid()(0, 24), tensors_of(model)
    assert grid.zero_points is not None
    assert np.array_equal(found["fc.weight_q"].reshape(24, -1) & 15, grid.codes[:, 0::2])
    assert np.array_equal(found["fc.weight_q"].reshape(24, -1) >> 4, grid.codes[:, 1::2])
    assert np.array_equal(found["fc.weight_scales"], np.repeat(grid.scales, group // block, axis=1))
    points = np.repeat(grid.zero_points, group // block, axis=1)
    assert np.array_equal(found["fc.weight_zero_points"][:, 0] & 15, points[:, 0])
    assert relative_error(run_model(model, {"x": x}), x @ values.T) < 1e-6


def test_columns_in_another_order_are_gathered_once_for_all_who_read_them(tmp_path: Path) -> None:
    order = RNG.permutation(np.arange(96) // 32)
    q, k = (gptq(tmp_path / name, 16, 96, 32, groups=order) for name in "qk")
    other = gptq(tmp_path / "v", 16, 96, 32, groups=order[::-1])
    x = inputs(96)
    expected = x @ (q.read() + k.read() + other.read()).T
    model = parallel({"q": q, "k": k, "v": other})
    report = import_models({"decoder": model}, accuracy_level=0)
    assert operators(model) == ["Gather", "MatMulNBits", "MatMulNBits", "Gather", "MatMulNBits", "Add", "Add"]
    assert {weight.reason for weight in report.weights} == {
        "repacked exactly, its columns in the order of their groups"
    }
    found = tensors_of(model)
    assert sorted(name for name in found if name.endswith("order")) == ["q.weight_order", "v.weight_order"]
    assert np.array_equal(order[found["q.weight_order"]], np.arange(96) // 32)
    assert relative_error(run_model(model, {"x": x}), expected) < 1e-6


def test_a_scale_a_row_becomes_one_a_block(tmp_path: Path) -> None:
    # 1176 columns divide by no block: the last one is filled up.
    for columns, block in ((256, 128), (1176, 32), (48, 16)):
        weight = int8(tmp_path / f"fc{columns}", 8, columns)
        x, values = inputs(columns), weight.read()
        model = parallel({"fc": weight})
        report = import_models({"decoder": model}, accuracy_level=0)
        assert [str(w.scheme) for w in report.weights] == [f"int8 g{block} sym imported:compressed-tensors"]
        assert list(model.graph.initializers) == ["fc.weight_q", "fc.weight_scales"]
        assert relative_error(run_model(model, {"x": x}), x @ values.T) < 1e-6


def test_one_scale_for_the_whole_weight(tmp_path: Path) -> None:
    refs = stored(tmp_path, weight=RNG.integers(-8, 8, (8, 64)).astype(np.int8), scale=np.array([0.5], np.float32))
    codes, scales = SignedBytes(refs["weight"], 4), Scales(refs["scale"])
    weight = IntegerWeight("fc", (8, 64), tuple(refs.values()), "", "compressed-tensors", 4, 64, codes, scales)
    x, model = inputs(64), parallel({"fc": weight})
    import_models({"decoder": model}, accuracy_level=0)
    assert relative_error(run_model(model, {"x": x}), x @ (0.5 * refs["weight"].read().T)) < 1e-6


@pytest.mark.parametrize(
    ("group", "columns", "fill", "size"),
    [(128, 512, True, 128), (8, 64, True, None), (24, 48, True, None), (100, 100, True, 32), (100, 100, False, None),
     (64, 100, True, 64), (64, 100, False, None), (1024, 64, True, 64), (512, 1024, True, 128)],
)  # fmt: skip
def test_blocks(group: int, columns: int, fill: bool, size: int | None) -> None:
    assert imported_block_size(group, columns, fill=fill) == size


def test_what_the_kernels_cannot_read_is_dequantized(tmp_path: Path) -> None:
    uneven = np.arange(64) // 16
    uneven[0] = 1
    cases: dict[str, tuple[Weight, str]] = {
        "a": (gptq(tmp_path / "a", 16, 64, 8), "groups of 8 columns are not made of blocks of 16"),
        "b": (gptq(tmp_path / "b", 16, 64, 16, groups=uneven), "not all of its groups have 16 columns"),
        "c": (float8(tmp_path / "c", 16, 64), "there is no kernel for 8-bit floats"),
    }
    x, expected = inputs(64), sum(weight.read() for weight, _ in cases.values())
    model = parallel({name: weight for name, (weight, _) in cases.items()})
    report = import_models({"decoder": model})
    assert report.recipe == "none"
    assert operators(model).count("MatMul") == 3
    assert [w.reason for w in report.weights] == [
        f"dequantized: {weight.label}: {why}" for weight, why in cases.values()
    ]
    assert report.manifest_weights()["decoder.a"].bits == 0
    assert relative_error(run_model(model, {"x": x}), x @ np.asarray(expected).T) < 1e-6


def test_scales_that_the_graph_s_type_does_not_hold(tmp_path: Path) -> None:
    # float32 scales in general, bfloat16 ones below float16's range; ordinary bfloat16 ones fit.
    plain = gptq(tmp_path / "a", 16, 64, 32, scale_type=np.float32)
    fitting = gptq(tmp_path / "b", 16, 64, 32, scale_type=ml_dtypes.bfloat16)
    model = parallel({"a": plain, "b": fitting}, ir.DataType.FLOAT16)
    report = import_models({"decoder": model}, accuracy_level=0)
    assert [w.reason for w in report.weights] == [
        "dequantized: gptq int4: float16 does not hold its scales exactly", "repacked exactly",
    ]  # fmt: skip
    assert tensors_of(model)["b.weight_scales"].dtype == np.float16
    x = inputs(64, np.float16)
    expected = x.astype(np.float32) @ (plain.read() + fitting.read()).T
    assert relative_error(run_model(model, {"x": x}), expected) < 2e-3
    tiny = stored(tmp_path / "c", scale=np.full((2, 16), 1e-9, ml_dtypes.bfloat16))["scale"]
    small = gptq(tmp_path / "d", 16, 64, 32, scales=Scales(tiny, transposed=True))
    assert "does not hold" in import_models({"decoder": parallel({"d": small}, ir.DataType.FLOAT16)}).weights[0].reason
    assert import_models({"decoder": parallel({"d": small})}).weights[0].reason == "repacked exactly"


def test_a_recipe_decides_about_the_rest(tmp_path: Path) -> None:
    weights: dict[str, Weight] = {
        "kept": gptq(tmp_path / "kept", 16, 64, 32),
        "again": float8(tmp_path / "again", 16, 64),
    }
    model = parallel(weights)
    plain = constant("plain.weight", RNG.standard_normal((64, 16)).astype(np.float32))
    node = ir.Node("", "MatMul", [model.graph.inputs[0], plain])
    node.outputs[0].name = "plain/out"
    model.graph.register_initializer(plain)
    model.graph.append(node)
    report = quantize_models({"decoder": model}, EIGHT_BITS)
    assert {w.path: (str(w.scheme), w.reason) for w in report.weights} == {
        "decoder.kept": ("int4 g32 asym imported:gptq", "repacked exactly"),
        "decoder.again": (
            "int8 g32 sym rtn", "dequantized: fp8 e4m3 per row: there is no kernel for 8-bit floats",
        ),
        "decoder.plain": ("int8 g32 sym rtn", ""),
    }  # fmt: skip
    assert report.recipe == "test"
    assert report.warnings() == []
    none = Recipe("floats", (Rule("*", None),))
    kept = quantize_models({"decoder": parallel({"again": weights["again"]})}, none).weights[0]
    assert kept.reason.endswith("there is no kernel for 8-bit floats; the recipe keeps it float")


def test_a_table_is_read_by_rows(tmp_path: Path) -> None:
    order = RNG.permutation(np.arange(64) // 32)
    for name, groups, reason in (
        ("embed", None, "repacked exactly"),
        ("mixed", order, "dequantized: gptq int4: a table's columns cannot be read in another order"),
    ):
        weight = gptq(tmp_path / name, 24, 64, 32, groups=groups)
        value = constant(f"{name}.weight", np.zeros((24, 64), np.float32))
        value.const_value = WeightTensor(weight, ir.DataType.FLOAT, (24, 64), transposed=False, name=f"{name}.weight")
        ids = variable("ids", np.zeros((1, 1), np.int64))
        model = model_of([ir.Node("", "Gather", [value, ids])], [ids], [value], ir.DataType.FLOAT)
        report = import_models({"embedding": model})
        assert report.weights[0].reason == reason
        assert operators(model) == ["GatherBlockQuantized" if groups is None else "Gather"]
        found = run_model(model, {"ids": np.array([[0, 23, 7]])})
        assert np.array_equal(found, weight.read()[[[0, 23, 7]]])


def test_ordinary_graphs_are_not_touched(tmp_path: Path) -> None:
    refs = stored(tmp_path, weight=RNG.standard_normal((16, 64)).astype(np.float32))
    value = constant("fc.weight", np.zeros((64, 16), np.float32))
    value.const_value = WeightTensor(refs["weight"], ir.DataType.FLOAT, (64, 16), transposed=True, name="fc.weight")
    x = variable("x", np.zeros((1, 1), np.float32))
    model = model_of([ir.Node("", "MatMul", [x, value])], [x], [value], ir.DataType.FLOAT)
    before = ir.to_proto(model).SerializeToString()
    report = import_models({"decoder": model})
    assert (report.recipe, report.weights, report.manifest_weights()) == ("none", (), {})
    assert ir.to_proto(model).SerializeToString() == before


def test_threads_and_pieces_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gptq(tmp_path / "fc", 40, 96, 32, groups=RNG.permutation(np.arange(96) // 32))
    results = []
    for threads, chunk in ((1, 1 << 19), (1, 96 * 3), (3, 96 * 5)):
        monkeypatch.setattr("quantize.lazy.CHUNK", chunk)
        model = parallel({"fc": weight})
        import_models({"decoder": model}, threads=threads)
        results.append({name: array.tobytes() for name, array in tensors_of(model).items()})
    assert results[0] == results[1] == results[2]


def test_the_same_weight_in_two_graphs_is_known_as_the_same(tmp_path: Path) -> None:
    weight, other = gptq(tmp_path / "a", 16, 64, 32), gptq(tmp_path / "b", 16, 64, 32)
    keys = []
    for source in (weight, weight, other):
        model = parallel({"head": source})
        import_models({"decoder": model})
        tensor = model.graph.initializers["head.weight_q"].const_value
        assert tensor is not None
        keys.append(tensor.meta[DEDUP])
    assert keys[0] == keys[1] != keys[2]


def test_what_is_found_while_writing(tmp_path: Path) -> None:
    wrong = gptq(tmp_path / "a", 16, 64, 32, groups=np.arange(64) % 2, act_order=False)
    model = parallel({"fc": wrong})
    import_models({"decoder": model})
    with pytest.raises(CheckpointError, match="columns are not in the order of their groups"):
        tensors_of(model)
    refs = stored(tmp_path / "b", scale=np.full((2, 16), np.nan, np.float16))
    bad = gptq(tmp_path / "c", 16, 64, 32, scales=Scales(refs["scale"], transposed=True))
    model = parallel({"fc": bad})
    import_models({"decoder": model})
    with pytest.raises(NumericalError, match="32 of its scales are NaN or infinite"):
        tensors_of(model)
