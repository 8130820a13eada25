"""Rotary tables as a few nodes, where the tables themselves would be a large part of a small model's bundle.

The nodes depend on constants alone, so a session computes them once, when it starts, and keeps what they give. Angles
are rounded to float32 as in the models; the cosine and sine are the runtime's, within two units in the last place
of the tables that large models store.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.passes_names import LAYER
from model.config import TextConfig
from model.rotary import inverse_frequencies

TABLES = {"cos": "Cos", "sin": "Sin"}
_NAME = "rotary"


def compute_tables(graph: ir.Graph, text: TextConfig) -> int:
    """Replaces the declared tables `cos` and `sin` by nodes that compute them; counts the tables."""
    declared = {name: graph.initializers.pop(name) for name in TABLES if name in graph.initializers}
    if not declared:
        return 0
    nodes = []

    def add(op_type: str, *inputs: ir.Value, output: str = "", **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{_NAME}/{op_type}", metadata_props={LAYER: "embed"})
        node.outputs[0].name = output or f"{node.name}_output_0"
        nodes.append(node)
        return node.outputs[0]

    start, stop, step, axis, frequencies = _constants(graph, text)
    positions = add("Range", start, stop, step)
    angles = add("Mul", add("Unsqueeze", positions, axis), frequencies)
    for name, old in declared.items():
        kind = old.dtype
        if kind is None or kind == ir.DataType.FLOAT:
            table = add(TABLES[name], angles, output=name)
        else:
            table = add("Cast", add(TABLES[name], angles), output=name, to=int(kind))
            nodes[-1].name = f"{_NAME}/Cast_{name}"
        table.shape, table.type = old.shape, old.type
        old.replace_all_uses_with(table)
    if len(graph):
        graph.insert_before(graph[0], nodes)
    else:
        graph.extend(nodes)
    return len(declared)


def _constants(graph: ir.Graph, text: TextConfig) -> Iterator[ir.Value]:
    """The first position, the one behind the last, the step, the axis of frequencies, and these."""
    values: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {
        "first": np.array(0, np.float32),
        "end": np.array(text.max_position_embeddings, np.float32),
        "step": np.array(1, np.float32),
        "axis": np.array([1], np.int64),
        "frequencies": inverse_frequencies(text.rope, text.head_dim),
    }
    for name, array in values.items():
        tensor = ir.tensor(array, name=f"{_NAME}_{name}")
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
        graph.register_initializer(value)
        yield value
