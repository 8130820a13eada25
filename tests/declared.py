"""Graphs as tracing would give them, with their weights but without the model's nodes: an export takes milliseconds."""

from __future__ import annotations

import onnx_ir as ir

from exporter.export import ExportOptions
from model.config import ExaoneConfig
from model.weights import expected_tensors

FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def declare_graphs(config: ExaoneConfig, draft: bool, options: ExportOptions, progress: object) -> dict[str, ir.Model]:
    """In the place of `exporter.export._trace`: the initializers that tracing gives, and no nodes."""
    shapes = {name.partition(".")[::2]: shape for name, shape in expected_tensors(config, draft).items()}
    shapes[("decoder", "lm_head.weight")] = (config.text.vocab_size, config.text.hidden_size)
    if draft:
        shapes[("mtp", "lm_head.weight")] = shapes[("decoder", "lm_head.weight")]
    models: dict[str, ir.Model] = {}
    for (graph, name), shape in shapes.items():
        if graph not in models:
            empty = ir.Graph([], [], nodes=[], initializers=[], opset_imports={"": 23}, name=graph)
            models[graph] = ir.Model(empty, ir_version=10)
        transposed = len(shape) == 2 and "embed_tokens" not in name
        stored = ir.Shape(shape[::-1] if transposed else shape)
        value = ir.Value(name=name, shape=stored, type=ir.TensorType(FLOATS[options.dtype]))
        value.metadata_props["transposed"] = "1" if transposed else "0"
        models[graph].graph.initializers[name] = value
    return models


def declare_readers(config: ExaoneConfig, draft: bool, options: ExportOptions, progress: object) -> dict[str, ir.Model]:
    """The same, and one MatMul or Gather for every weight, so that a recipe finds it."""
    models = declare_graphs(config, draft, options, progress)
    for model in models.values():
        graph = model.graph
        for value in list(graph.initializers.values()):
            if value.shape is not None and value.dtype is not None and len(value.shape) == 2:
                gathers = value.metadata_props["transposed"] == "0"
                kind = ir.DataType.INT64 if gathers else value.dtype
                x = ir.Value(name=f"x.{value.name}", shape=ir.Shape(["rows", "k"]), type=ir.TensorType(kind))
                node = ir.node("Gather", [value, x]) if gathers else ir.node("MatMul", [x, value])
                y = node.outputs[0]
                y.name, y.shape, y.type = f"y.{value.name}", ir.Shape(["rows", "n"]), ir.TensorType(value.dtype)
                graph.inputs.append(x)
                graph.append(node)
                graph.outputs.append(y)
    return models
