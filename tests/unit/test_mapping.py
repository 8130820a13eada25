"""Weights that a session uses where they are mapped."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from model.bundle import GraphInfo, TensorInfo
from model.errors import BundleError
from runtime import mapping
from runtime.mapping import MappedWeights
from runtime.providers import CPU
from runtime.session import GraphSession

ROWS, COLUMNS, IDS = 96, 64, 300


def weights() -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.float32]]]:
    random = np.random.default_rng(5)
    return (
        random.standard_normal((IDS, ROWS)).astype(np.float32),
        random.standard_normal((ROWS, COLUMNS)).astype(np.float32),
    )


def write(folder: Path, data: str = "g.onnx.data") -> GraphInfo:
    """y = table[ids] @ matrix: one weight that is used in place, one that onnxruntime packs."""
    tensors, content = [], b""
    for name, array in zip(("table", "matrix"), weights(), strict=True):
        tensor = numpy_helper.from_array(array, name)
        set_external_data(tensor, data, len(content), array.nbytes)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensors.append(tensor)
        content += array.tobytes() + bytes(-array.nbytes % 4096)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("MatMul", ["rows", "matrix"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", COLUMNS])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "g.onnx").write_bytes(model.SerializeToString())
    (folder / data).write_bytes(content)
    inputs = (TensorInfo("ids", "int64", ("n",)),)
    return GraphInfo("decoder", "g.onnx", (data,), inputs, (TensorInfo("y", "float32", ("n", COLUMNS)),))


def answer(session: GraphSession, ids: list[int]) -> np.ndarray[Any, Any]:
    return session.run({"ids": np.array(ids, np.int64)}, ["y"])[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_answers_whatever_is_let_go(tmp_path: Path, threads: int) -> None:
    graph = write(tmp_path)
    session = GraphSession(tmp_path, graph, CPU, threads)
    table, matrix = weights()
    ids = [0, 7, IDS - 1]
    expected = table[ids] @ matrix
    np.testing.assert_allclose(answer(session, ids), expected, rtol=1e-4, atol=1e-4)
    session._weights.release()
    gc.collect()
    np.testing.assert_allclose(answer(session, ids), expected, rtol=1e-4, atol=1e-4)


def test_the_mapping_is_used_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to the file later is what a lookup would find, nothing was copied; so it is refused."""
    graph = write(tmp_path)
    if not MappedWeights(tmp_path, graph)._files:
        pytest.skip("this system or onnxruntime cannot")
    session = GraphSession(tmp_path, graph, CPU, 1)
    before = answer(session, [4])
    with (tmp_path / "g.onnx.data").open("r+b") as file:
        file.seek(4 * ROWS * 4)
        file.write(bytes(ROWS * 4))
    os.utime(tmp_path / "g.onnx.data", (1, 1))  # whatever the clock's grain is
    assert before.any()
    with pytest.raises(BundleError, match="written to while it was open"):
        answer(session, [4])
    monkeypatch.setattr(MappedWeights, "check_unchanged", lambda self: None)
    assert not answer(session, [4]).any()


def test_without_mapping_onnxruntime_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = write(tmp_path)
    mapped = answer(GraphSession(tmp_path, graph, CPU, 2), [1, 2])
    monkeypatch.setattr(mapping, "_SINCE", (99,))
    assert not MappedWeights(tmp_path, graph)._files
    assert np.array_equal(answer(GraphSession(tmp_path, graph, CPU, 2), [1, 2]), mapped)


def test_pages_are_let_go_while_a_session_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = MappedWeights(tmp_path, write(tmp_path))
    if not held._files:
        pytest.skip("this system or onnxruntime cannot")
    released = threading.Event()
    monkeypatch.setattr(held, "release", released.set)
    for running in (False, True):
        with held.released_meanwhile(running):
            assert released.wait(30)
        released.clear()
    assert MappedWeights(tmp_path, None)._files == {}


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damaged_data_is_the_bundles_fault(tmp_path: Path, damage: str) -> None:
    graph = write(tmp_path)
    data = tmp_path / "g.onnx.data"
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(b"" if damage == "empty" else data.read_bytes()[:5000])
    with pytest.raises(BundleError, match=r"damaged bundle: g\.onnx") as caught:
        GraphSession(tmp_path, graph, CPU, 2)
    assert str(tmp_path) not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_name_that_is_not_beside_the_graph(tmp_path: Path) -> None:
    """The graph may lie in a folder of its own; its data is named from there."""
    (tmp_path / "sub").mkdir()
    graph = write(tmp_path / "sub")
    inside = GraphInfo(graph.name, "sub/g.onnx", ("sub/g.onnx.data",), graph.inputs, graph.outputs)
    table, matrix = weights()
    np.testing.assert_allclose(
        answer(GraphSession(tmp_path, inside, CPU, 2), [3]), table[[3]] @ matrix, rtol=1e-4, atol=1e-4
    )
    assert onnx.load(tmp_path / "sub" / "g.onnx", load_external_data=False).graph.initializer[0].name == "table"
