"""Rotary tables that a graph computes itself are those that large models store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from exporter import bind as binding
from exporter.bind import bind
from exporter.rotary_nodes import compute_tables
from model.config import ExaoneConfig, TextConfig, load_config
from model.rotary import rope_tables, stores_tables
from tests import tiny

FLOATS = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExaoneConfig:
    return load_config(tiny.make_checkpoint(tmp_path_factory.mktemp("rotary") / "c", "hybrid"))


def declared(text: TextConfig, dtype: ir.DataType) -> ir.Model:
    """Rows of both tables, which are declared and have no values."""
    shape = (text.max_position_embeddings, text.head_dim // 2)
    tables = [ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)) for name in ("cos", "sin")]
    rows = ir.Value(name="rows", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    nodes = [ir.node("Gather", [table, rows], {"axis": 0}) for table in tables]
    for node, table in zip(nodes, tables, strict=True):
        node.outputs[0].name, node.outputs[0].type = f"{table.name}_rows", table.type
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([rows], outputs, nodes=nodes, opset_imports={"": 23}, name="g")
    for table in tables:
        graph.initializers[str(table.name)] = table
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("dtype", FLOATS)
def test_computed_tables(config: ExaoneConfig, dtype: ir.DataType, tmp_path: Path) -> None:
    text = replace(config.text, max_position_embeddings=65536)
    model = declared(text, dtype)
    assert compute_tables(model.graph, text) == 2
    assert not {"cos", "sin"} & set(model.graph.initializers)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"rows": np.arange(65536)})
    for ours, table in zip(found, rope_tables(text), strict=True):
        assert ours.dtype == FLOATS[dtype]
        assert np.abs(ours.astype(np.float32) - table).max() <= (3e-7 if dtype == ir.DataType.FLOAT else 5e-4)
    kinds = [node.op_type for node in ir.load(tmp_path / "folded.onnx").graph]
    assert kinds == ["Gather", "Gather"]  # all else is done when a session starts


def test_large_tables_are_stored_and_computed_once(config: ExaoneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    text = config.text
    assert not stores_tables(text)
    assert stores_tables(replace(text, max_position_embeddings=1 << 20, head_dim=128))
    monkeypatch.setattr(binding, "stores_tables", lambda text: True)
    calls = []

    def counted(text: TextConfig) -> object:
        calls.append(1)
        return rope_tables(text)

    monkeypatch.setattr(binding, "rope_tables", counted)
    model = declared(text, ir.DataType.FLOAT)
    bind({"decoder": model}, {}, config)
    for name, table in zip(("cos", "sin"), rope_tables(text), strict=True):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        assert np.array_equal(tensor.numpy(), table)
    assert len(calls) == 1
