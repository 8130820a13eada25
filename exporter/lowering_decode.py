"""Attention of one token by the kernel's plain way, which takes it in half to three quarters of the time.

On the CPU GroupQueryAttention has two ways. By tiles it keeps few scores at a time, which prompts need; plainly it
multiplies a head's queries with all keys and the weights with all values, in two products. For one token these are
products of one row, and those take the matrix as it lies in memory, eight or more values at a time, if they have no
factor; and rows of different lengths are taken together, where the tiled way takes one after the other. So the scale is
multiplied into the query before, and the plain way is asked for by a sink for each head: the tiled way knows none, and
a sink as deep as floats go takes a weight of exactly 0.

Each such attention becomes a choice, made anew in every pass: one token per row is attended plainly, several (prompts,
whose scores would fill the memory) as before. Layers that see a window of a cache that holds more keep it always, since
the plain way multiplies with keys that it hides afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from exporter.builder import CONTRIB, Builder, given
from exporter.translations import OPSET

_SINK = 11  # of GroupQueryAttention's inputs; before it stand positions and a bias, which are left out
_NO_SINK = np.finfo(np.float32).min


def lower_decode_attention(model: ir.Model) -> int:
    """Gives GroupQueryAttentions in float32 that see their whole cache a second branch for single tokens; counts them.

    For graphs that will run on the CPU; see the module.
    """
    build: Builder | None = None
    found = [node for node in model.graph if node.op_type == "GroupQueryAttention" and _is_suitable(node)]
    for node in found:
        if build is None:  # what stands before the first of them is used by all
            build = Builder(node.metadata_props, "decode")
            sequence = build("Squeeze", build("Shape", given(node, 0), start=1, end=2))
            chosen = build("Equal", sequence, 1)
            model.graph.insert_before(node, build.nodes)
        _replace(model.graph, node, chosen, build)
    for constant in build.constants.values() if build is not None else ():
        model.graph.register_initializer(constant)
    return len(found)


def _is_suitable(node: ir.Node) -> bool:
    """Float32, no window or a cache that holds nothing else, and nothing that the second branch does not take over."""
    known = {"num_heads", "kv_num_heads", "local_window_size", "sliding_window_cache", "do_rotary"}
    values = _attributes(node) if set(node.attributes) <= known else {}
    seen_whole = values.get("local_window_size", -1) == -1 or values.get("sliding_window_cache", 0) == 1
    plain = bool(values) and seen_whole and len(node.inputs) < _SINK
    return plain and all(given(node, i).dtype == ir.DataType.FLOAT for i in range(5))


def _replace(graph: ir.Graph, node: ir.Node, chosen: ir.Value, build: Builder) -> None:
    results = list(node.outputs)
    branches = {"then_branch": _plainly(node, build), "else_branch": _as_before(node)}
    choice = ir.node("If", [chosen], branches, num_outputs=3, metadata_props=dict(node.metadata_props))
    for before, after in zip(results, choice.outputs, strict=True):
        after.shape, after.type = before.shape, before.type
    graph.insert_before(node, [choice])
    for i, value in enumerate(results):
        if value.is_graph_output():
            choice.outputs[i].name = value.name
    ir.convenience.replace_all_uses_with(results, list(choice.outputs), replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _as_before(node: ir.Node) -> ir.Graph:
    return _branch("usual", [], list(node.inputs), _attributes(node), node)


def _plainly(node: ir.Node, build: Builder) -> ir.Graph:
    """The same attention of queries that are scaled already, with sinks that weigh nothing."""
    shape = given(node, 3).shape
    width = shape[3] if shape is not None else None
    if not isinstance(width, int):
        raise ValueError(f"the width of {given(node, 3).name} must be known")
    sinks = build.constant(np.full(node.attributes["num_heads"].as_int(), _NO_SINK, np.float32))
    scale = build.constant(np.array(width**-0.5, np.float32))
    inner = Builder(node.metadata_props, "")
    inputs: list[ir.Value | None] = [inner("Mul", given(node, 0), scale), *node.inputs[1:]]
    inputs += [None] * (_SINK - len(inputs)) + [sinks]
    return _branch("single", inner.nodes, inputs, {**_attributes(node), "scale": 1.0}, node)


def _attributes(node: ir.Node) -> dict[str, int]:
    return {name: attribute.as_int() for name, attribute in node.attributes.items()}


def _branch(
    name: str,
    before: list[ir.Node],
    inputs: list[ir.Value | None],
    attributes: Mapping[str, int | float],
    node: ir.Node,
) -> ir.Graph:
    attention = ir.node(
        node.op_type, inputs, attributes, domain=node.domain, num_outputs=3, metadata_props=dict(node.metadata_props)
    )
    for value, like, label in zip(attention.outputs, node.outputs, ("attended", "keys", "values"), strict=True):
        value.name, value.shape, value.type = f"{name}_{label}", like.shape, like.type
    nodes = [*before, attention]
    return ir.Graph([], attention.outputs, nodes=nodes, name=name, opset_imports={"": OPSET, CONTRIB: 1})
