"""Attention of one token over a long cache, as products that the CPU has fast kernels for.

GroupQueryAttention's kernel for one token is compute-bound on the CPU: it multiplies four values at a time. A matrix
product of one row takes the matrix as it lies in memory and eight or more at a time, so one product per query head,
over the keys as they are cached, is faster from some hundred tokens on. The new token's key and value are written into
the cache by ScatterND, in place where past and present share a buffer, as GroupQueryAttention does it.

Each such attention becomes a choice, made anew in every pass: one token per row, enough of them cached, and a buffer
that is mostly full take the products; everything else (prompts, short contexts, caches that grow by copying, buffers
for a context that is still far away) takes GroupQueryAttention as before. Layers with a window keep it always.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter.builder import CONTRIB, Builder, given
from exporter.translations import OPSET

LEAST = 256  # about where the products become faster, with 32 heads of 64 over 8 key heads
# They cost as the buffer, GroupQueryAttention as the tokens in it: the share of it that must be in use.
FILLED = (2, 3)
_MINUS_INFINITY = np.array(-np.inf, np.float32)


def lower_decode_attention(model: ir.Model) -> int:
    """Gives every GroupQueryAttention over a whole cache in float32 a second branch for single tokens; counts them.

    For graphs that will run on the CPU; see the module.
    """
    shared: dict[tuple[ir.Value, ir.Value], _Shared] = {}
    found = [node for node in model.graph if node.op_type == "GroupQueryAttention" and _is_suitable(node)]
    for node in found:
        key = given(node, 5), given(node, 6)
        if key not in shared:  # what stands before the first of them can be used by all
            build = Builder(node.metadata_props, f"decode_{len(shared)}")
            shared[key] = _share(build, node)
            for constant in build.constants.values():
                model.graph.register_initializer(constant)
            model.graph.insert_before(node, build.nodes)
        _replace(model.graph, node, shared[key])
    return len(found)


@dataclass(frozen=True)
class _Shared:
    """What the layers have in common.

    Attributes:
        chosen: bool scalar, whether the products are taken.
        positions: int64 [batch, 1], of the new token.
        places: int64 [batch, kv_heads, 1, 3], where the cache takes it: row, head, slot.
        hidden: float32 [batch, 1, 1, 1, slots], 0 for what the token sees and minus infinity for the rest.
        shapes: of queries, of new keys and values, and of the result, as constants; and the scale.
    """

    chosen: ir.Value
    positions: ir.Value
    places: ir.Value
    hidden: ir.Value
    shapes: Mapping[str, ir.Value]


def _is_suitable(node: ir.Node) -> bool:
    """Float32, no window, and nothing that the products do not do."""
    known = {"num_heads", "kv_num_heads", "local_window_size", "do_rotary"}
    windowed = "local_window_size" in node.attributes and node.attributes["local_window_size"].as_int() != -1
    plain = not windowed and set(node.attributes) <= known and len(node.inputs) <= 9
    return plain and all(given(node, i).dtype == ir.DataType.FLOAT for i in range(5))


def _sizes(node: ir.Node) -> tuple[int, int, int]:
    """Query heads, key heads, and the width of a head."""
    shape = given(node, 3).shape
    width = shape[3] if shape is not None else None
    if not isinstance(width, int):
        raise ValueError(f"the width of {given(node, 3).name} must be known")
    return node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int(), width


def _share(build: Builder, node: ir.Node) -> _Shared:
    query, cache, lengths, total = (given(node, i) for i in (0, 3, 5, 6))
    heads, kv_heads, width = _sizes(node)
    sequence = build("Squeeze", build("Shape", query, start=1, end=2))
    capacity = build("Squeeze", build("Shape", cache, start=2, end=3))
    tokens, last = build("Cast", total, to=7), build("Cast", lengths, to=7)

    used, whole = (build("Mul", x, factor) for x, factor in zip((capacity, tokens), FILLED, strict=True))
    enough = build("And", build("GreaterOrEqual", tokens, LEAST), build("GreaterOrEqual", whole, used))
    fits = build("And", build("Equal", sequence, 1), build("LessOrEqual", tokens, capacity))

    # Row, head and slot of each new row of the cache.
    rows = build("Range", 0, build("Squeeze", build("Shape", last)), 1)
    ones = np.ones((1, kv_heads, 1, 1), np.int64)
    every_head = np.arange(kv_heads, dtype=np.int64).reshape(1, kv_heads, 1, 1)
    row = build("Mul", build("Reshape", rows, [-1, 1, 1, 1]), ones)
    slot = build("Mul", build("Reshape", last, [-1, 1, 1, 1]), ones)
    head = build("Add", build("Mul", row, 0), every_head)

    seen = build("LessOrEqual", build("Range", 0, capacity, 1), build("Reshape", last, [-1, 1, 1, 1, 1]))
    shapes = {
        "query": build.constant([-1, kv_heads, heads // kv_heads, 1, width]),
        "row": build.constant([-1, kv_heads, 1, width]),
        "result": build.constant([-1, 1, heads * width]),
        "group": build.constant([2]),
        "scale": build.constant(np.array(width**-0.5, np.float32)),
    }
    return _Shared(
        build("And", fits, enough),
        build("Reshape", last, [-1, 1]),
        build("Concat", row, head, slot, axis=3),
        build("Where", seen, np.zeros((), np.float32), _MINUS_INFINITY),
        shapes,
    )


def _replace(graph: ir.Graph, node: ir.Node, shared: _Shared) -> None:
    results = list(node.outputs)
    branches = {"then_branch": _products(node, shared), "else_branch": _as_before(node)}
    choice = ir.node("If", [shared.chosen], branches, num_outputs=3, metadata_props=dict(node.metadata_props))
    for before, after in zip(results, choice.outputs, strict=True):
        after.shape, after.type = before.shape, before.type
    graph.insert_before(node, [choice])
    for i, value in enumerate(results):
        if value.is_graph_output():
            choice.outputs[i].name = value.name
    ir.convenience.replace_all_uses_with(results, list(choice.outputs), replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _as_before(node: ir.Node) -> ir.Graph:
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    same = ir.node(
        node.op_type, list(node.inputs), attributes,
        domain=node.domain, num_outputs=3, metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    return _branch("usual", [same], list(same.outputs), node)


def _products(node: ir.Node, shared: _Shared) -> ir.Graph:
    """One token per row: its key and value into the cache, one product per head with the keys, one with the values."""
    heads, kv_heads, _ = _sizes(node)
    query, key, value, past_key, past_value = (given(node, i) for i in range(5))
    shapes, build = shared.shapes, Builder(node.metadata_props, "")
    if node.attributes["do_rotary"].as_int():
        angles = shared.positions, given(node, 7), given(node, 8)
        query = build("RotaryEmbedding", query, *angles, domain=CONTRIB, num_heads=heads)
        key = build("RotaryEmbedding", key, *angles, domain=CONTRIB, num_heads=kv_heads)
    keys, values = (
        build("ScatterND", past, shared.places, build("Reshape", new, shapes["row"]))
        for past, new in ((past_key, key), (past_value, value))
    )
    # The scale is not left to the product: with a factor it would not take the kernel for one row.
    queries = build("Reshape", build("Mul", query, shapes["scale"]), shapes["query"])
    all_keys, all_values = (build("Unsqueeze", x, shapes["group"]) for x in (keys, values))
    scores = build("FusedMatMul", queries, all_keys, domain=CONTRIB, transB=1)
    weights = build("Softmax", build("Add", scores, shared.hidden), axis=-1)
    attended = build("Reshape", build("MatMul", weights, all_values), shapes["result"])
    return _branch("single", build.nodes, [attended, keys, values], node)


def _branch(name: str, nodes: list[ir.Node], results: list[ir.Value], node: ir.Node) -> ir.Graph:
    for value, like, label in zip(results, node.outputs, ("attended", "keys", "values"), strict=True):
        value.name, value.shape, value.type = f"{name}_{label}", like.shape, like.type
    return ir.Graph([], results, nodes=nodes, name=name, opset_imports={"": OPSET, CONTRIB: 1})
