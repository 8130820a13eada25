from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.bind import DEDUP, WEIGHT
from exporter.parts import split
from exporter.write import ALIGNMENT, predicted_bytes, write_models
from model.bundle import FileInfo
from model.progress import NullProgress

RNG = np.random.default_rng(0)
BIG = RNG.standard_normal((300, 1000)).astype(np.float32)  # above the size from which graphs share


class Counting(NullProgress):
    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.done: dict[str, float] = {}
        self.label = ""

    def start(self, label: str, total: float, unit: str) -> None:
        assert unit == "bytes"
        self.label = label
        self.totals[label], self.done[label] = total, 0

    def advance(self, amount: float) -> None:
        self.done[self.label] += amount


def lazy(name: str, array: np.ndarray[Any, Any], key: str = "", calls: list[str] | None = None) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        if calls is not None:
            calls.append(name)
        return ir.tensor(array, name=name)

    tensor = ir.LazyTensor(evaluate, ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape), name=name)
    if key:
        tensor.meta[DEDUP] = key
    return tensor


def model_of(tensors: list[ir.LazyTensor]) -> ir.Model:
    """y = x + a + b + ... for every tensor."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", 1000]), type=ir.TensorType(ir.DataType.FLOAT))
    values, nodes, last = [], [], x
    for tensor in tensors:
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        values.append(value)
        nodes.append(ir.node("Add", [last, value], num_outputs=1))
        last = nodes[-1].outputs[0]
    last.name, last.shape, last.type = "y", ir.Shape(["rows", 1000]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [last], nodes=nodes, initializers=values, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def test_round_trip_through_onnx_and_onnxruntime(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    arrays = {"a.weight": BIG[:1], "b.weight": BIG[1:2] * 2, "small": np.ones((1, 1), np.float32)}
    progress = Counting()
    written = write_models({"g": model_of([lazy(n, a) for n, a in arrays.items()])}, tmp_path, progress)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["g.onnx", "g.onnx.data"]
    for name, info in written.files.items():
        content = (tmp_path / name).read_bytes()
        assert (info.size, info.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    graph = ir.load(tmp_path / "g.onnx").graph
    for name, array in arrays.items():
        tensor = graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert isinstance(tensor, ir.ExternalTensor) == (name != "small")
        if isinstance(tensor, ir.ExternalTensor):
            assert (tensor.offset or 0) % ALIGNMENT == 0
    session = ort.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    x = RNG.standard_normal((3, 1000)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x + sum(arrays.values()), rtol=1e-5, atol=1e-5)
    assert progress.totals == progress.done == {"writing g": 8000}
    (graph_info,) = written.graphs
    (x_info,) = graph_info.inputs
    assert (x_info.name, x_info.dtype, x_info.shape) == ("x", "float32", ("rows", 1000))
    assert graph_info.data == ("g.onnx.data",)


def test_equal_content_is_stored_once(tmp_path: Path) -> None:
    written = write_models(
        {"g": model_of([lazy("a", BIG), lazy("b", BIG * 2), lazy("c", BIG.copy())])}, tmp_path, NullProgress()
    )
    assert written.stored == {"g/a": BIG.nbytes, "g/b": BIG.nbytes, "g/c": 0}
    assert (tmp_path / "g.onnx.data").stat().st_size < 2 * BIG.nbytes + 2 * ALIGNMENT
    content = (tmp_path / "g.onnx.data").read_bytes()
    assert written.files["g.onnx.data"].sha256 == hashlib.sha256(content).hexdigest()
    graph = ir.load(tmp_path / "g.onnx").graph
    for name, factor in (("a", 1), ("b", 2), ("c", 1)):
        tensor = graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), BIG * factor)


def test_graphs_share_large_tensors_and_not_small_ones(tmp_path: Path) -> None:
    models = {name: model_of([lazy("big", BIG), lazy("row", BIG[:1])]) for name in ("first", "second")}
    written = write_models(models, tmp_path, NullProgress())
    assert written.graphs[0].data == ("first.onnx.data",)
    assert written.graphs[1].data == ("second.onnx.data", "first.onnx.data")
    assert written.files["second.onnx.data"].size == 4000
    assert written.stored["second/big"] == 0
    tensor = ir.load(tmp_path / "second.onnx").graph.initializers["big"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), BIG)


def test_equal_keys_are_evaluated_once(tmp_path: Path) -> None:
    calls: list[str] = []
    tensors = [lazy("a", BIG, "k", calls), lazy("b", BIG, "k", calls), lazy("c", BIG * 3, "other", calls)]
    progress = Counting()
    write_models({"g": model_of(tensors)}, tmp_path, progress)
    assert calls == ["a", "c"]
    assert progress.totals == progress.done


def test_a_weight_that_a_graph_has_twice_is_one_part_and_counted_once(tmp_path: Path) -> None:
    """Codes and scales of a tied table: its two users stand side by side."""
    tensors = []
    for user in ("embed_tokens", "lm_head"):
        for kind, array in (("weight_q", BIG), ("weight_scales", BIG[:2])):
            tensors.append(lazy(f"{user}.{kind}", array, kind))
            tensors[-1].meta[WEIGHT] = "table"
    (part,) = split("g", model_of(tensors))
    assert [value.name for value in part.large] == [tensor.name for tensor in tensors]
    written = write_models({"g": model_of(tensors)}, tmp_path, NullProgress())
    assert list(written.stored.values()) == [BIG.nbytes, 8000, 0, 0]


def test_a_graph_that_only_shares_has_no_data_file(tmp_path: Path) -> None:
    models = {name: model_of([lazy("big", BIG)]) for name in ("first", "second")}
    written = write_models(models, tmp_path, NullProgress())
    assert written.graphs[1].data == ("first.onnx.data",)
    assert not (tmp_path / "second.onnx.data").exists()
    assert "second.onnx.data" not in written.files


def test_the_same_models_give_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        models = {"g": model_of([lazy("a", BIG), lazy("b", BIG[:1])])}
        files.append(write_models(models, tmp_path / name, NullProgress()).files)
    assert files[0] == files[1]


def test_predicted_size_is_an_upper_bound(tmp_path: Path) -> None:
    models = {"g": model_of([lazy("a", BIG), lazy("b", BIG[:1])])}
    bound = predicted_bytes(models)
    written = write_models(models, tmp_path, NullProgress())
    assert BIG.nbytes < written.files["g.onnx.data"].size <= bound < BIG.nbytes + 4000 + 3 * ALIGNMENT


def test_a_tensor_that_lies_about_its_size_is_a_fault(tmp_path: Path) -> None:
    tensor = ir.LazyTensor(lambda: ir.tensor(BIG[:2]), ir.DataType.FLOAT, ir.Shape((3, 1000)), name="a")
    with pytest.raises(ValueError, match="gave 8000 bytes instead of 12000"):
        write_models({"g": model_of([tensor])}, tmp_path, NullProgress())


def test_what_lay_there_before_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "g.onnx.data").write_bytes(b"x" * (BIG.nbytes + 5000))
    written = write_models({"g": model_of([lazy("a", BIG)])}, tmp_path, NullProgress())
    assert (tmp_path / "g.onnx.data").read_bytes() == BIG.tobytes()
    assert written.files["g.onnx.data"] == FileInfo(BIG.nbytes, hashlib.sha256(BIG.tobytes()).hexdigest())


def test_every_byte_is_asked_for_durability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    write_models({"g": model_of([lazy("a", BIG), lazy("b", BIG[:1])])}, tmp_path, NullProgress())
    folder = tmp_path.name
    assert [Path(name).name for name in synced] == [folder, "g.onnx.data", "g.onnx.data", "g.onnx", folder]
