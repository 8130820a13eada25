"""Graphs for CUDA in a form that the CPU's kernels run: each node that has none there as nodes of the same meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir
import onnxruntime

from exporter.builder import CONTRIB, Builder, given
from exporter.cuda_kernels import types_of
from exporter.translations import OPSET

_FLOAT = int(ir.DataType.FLOAT)


def lower_for_cpu(model: ir.Model) -> ir.Model:
    """Changes a graph in place."""
    rules: dict[str, Callable[[Builder, ir.Node], list[ir.Value] | None]] = {
        "GroupQueryAttention": _attention,
        "PackedMultiHeadAttention": _packed,
        "QuickGelu": _quick_gelu,
        "SimplifiedLayerNormalization": _norm,
    }
    for i, node in enumerate(list(model.graph)):
        rule = rules.get(node.op_type)
        build = Builder({}, f"cpu_{i}")
        results = rule(build, node) if rule is not None else None
        if results is None:
            continue
        for constant in build.constants.values():
            model.graph.register_initializer(constant)
        model.graph.insert_before(node, build.nodes)
        for old, new in zip(node.outputs, results, strict=False):
            new.shape, new.type = old.shape, old.type
            if old.is_graph_output():
                new.name = old.name
        old_values = list(node.outputs)[: len(results)]
        ir.convenience.replace_all_uses_with(old_values, results, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    return model


def _kind(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None, value.name
    return value.dtype


def _quick_gelu(build: Builder, node: ir.Node) -> list[ir.Value]:
    x = given(node, 0)
    alpha = np.array(node.attributes["alpha"].as_float(), _kind(x).numpy())
    return [build("Mul", x, build("Sigmoid", build("Mul", x, alpha)))]


def _norm(build: Builder, node: ir.Node) -> list[ir.Value] | None:
    x, gain = given(node, 0), given(node, 1)
    if _kind(x) == _kind(gain):
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    wide = [build("Cast", value, to=_FLOAT) for value in (x, gain)]
    result = build("SimplifiedLayerNormalization", *wide, **attributes)
    return [build("Cast", result, to=int(_kind(gain)))]


def _attention(build: Builder, node: ir.Node) -> list[ir.Value] | None:
    """Norms in front of it, and queries, keys and values apart."""
    if len(node.inputs) < 16:
        return None
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    gains = given(node, 14), given(node, 15)
    assert gains[0].shape is not None
    width = int(gains[0].shape.numpy()[0])
    query, key, value = node.inputs[:3]
    assert query is not None
    if key is None or value is None:
        split = ir.node("Split", [query, build.constant([heads * width, kv_heads * width, kv_heads * width])],
                        {"axis": -1}, num_outputs=3)  # fmt: skip
        build.nodes.append(split)
        query, key, value = split.outputs
        for output in split.outputs:
            output.type = ir.TensorType(_kind(given(node, 3)))
    epsilon = node.attributes["qk_norm_epsilon"].as_float()

    def normalised(x: ir.Value, count: int, gain: ir.Value) -> ir.Value:
        apart = build("Reshape", x, [0, 0, count, width])
        normed = build("SimplifiedLayerNormalization", apart, gain, axis=-1, epsilon=epsilon, stash_type=1)
        return build("Reshape", normed, [0, 0, count * width])

    attributes = [a for name, a in node.attributes.items() if name != "qk_norm_epsilon"]
    inputs = [normalised(query, heads, gains[0]), normalised(key, kv_heads, gains[1]), value, *node.inputs[3:9]]
    while inputs[-1] is None:
        inputs.pop()
    plain = ir.Node(CONTRIB, "GroupQueryAttention", inputs, attributes, num_outputs=3)
    build.nodes.append(plain)
    return list(plain.outputs)


def _packed(build: Builder, node: ir.Node) -> list[ir.Value]:
    """The standard's Attention with a mask; for a few hundred tokens."""
    query, key, value, cumulative = (given(node, i) for i in (0, 1, 2, 5))
    heads = node.attributes["num_heads"].as_int()
    number = build("Range", 0, build("Squeeze", build("Shape", query, start=0, end=1)), 1)
    starts = build("Cast", build("Slice", cumulative, [1], [-1], [0]), to=int(ir.DataType.INT64))
    begun = build("GreaterOrEqual", build("Unsqueeze", number, [1]), build("Unsqueeze", starts, [0]))
    segment = build("ReduceSum", build("Cast", begun, to=int(ir.DataType.INT64)), [1], keepdims=0)
    mask = build("Equal", build("Unsqueeze", segment, [1]), build("Unsqueeze", segment, [0]))
    one = [build("Unsqueeze", x, [0]) for x in (query, key, value)]
    out = build("Attention", *one, build("Unsqueeze", mask, [0, 1]), q_num_heads=heads, kv_num_heads=heads)
    return [build("Squeeze", out, [0])]


def session(model: ir.Model, outputs: Iterable[ir.Value] = ()) -> onnxruntime.InferenceSession:
    """A session on the CPU; `outputs` are given out too."""
    known, types = set(model.graph.outputs), types_of(model.graph)
    for value in outputs:
        if value not in known:
            value.type = ir.TensorType(ir.DataType[types[value].upper()])
            model.graph.outputs.append(value)
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    assert model.graph.opset_imports[""] == OPSET
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
