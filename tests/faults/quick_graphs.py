"""Graphs as tracing would give them, with a node for every matrix, so that they can be quantized; none can be run."""

from __future__ import annotations

import onnx_ir as ir

from exporter.export import ExportOptions
from model.config import ExaoneConfig
from tests.declared import declare_graphs


def quick_trace(config: ExaoneConfig, draft: bool, options: ExportOptions, progress: object) -> dict[str, ir.Model]:
    """In the place of `exporter.export._trace`."""
    models = declare_graphs(config, draft and config.mtp is not None, options, progress)
    for model in models.values():
        for value in list(model.graph.initializers.values()):
            if value.shape is not None and len(value.shape) == 2:
                _use(model.graph, value)
    return models


def _use(graph: ir.Graph, weight: ir.Value) -> None:
    """A Gather from a table, a MatMul with everything else."""
    table = "embed_tokens" in str(weight.name)
    kind = ir.TensorType(ir.DataType.INT64) if table else ir.TensorType(weight.dtype or ir.DataType.FLOAT)
    given = ir.Value(name=f"{weight.name}.input", shape=ir.Shape(["tokens"]), type=kind)
    node = ir.Node("", "Gather" if table else "MatMul", [weight, given] if table else [given, weight])
    node.outputs[0].name, node.outputs[0].type = (
        f"{weight.name}.output",
        ir.TensorType(weight.dtype or ir.DataType.FLOAT),
    )
    node.outputs[0].shape = ir.Shape(["tokens", "width"])
    graph.inputs.append(given)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
