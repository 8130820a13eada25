"""Attention inside segments as CUDA has it: PackedMultiHeadAttention, which keeps no scores and needs no mask.

It takes tokens of all segments one behind the other, and where each segment begins. It knows neither grouped heads nor
bfloat16: keys and values are repeated, and bfloat16 goes through it as float16, which queries, keys and values of a
normalised input fit with ease.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.builder import CONTRIB, Builder, given
from exporter.lowering_segments import head_counts, replace_segment_attention, width_of

_INT32 = int(ir.DataType.INT32)
Layout = tuple[ir.Value, ir.Value]


def lower_packed_attention(model: ir.Model) -> int:
    """Replaces every `SegmentAttention` placeholder by packed attention; returns how many there were."""
    return replace_segment_attention(model, "packed", lambda node: given(node, 3), _lay_out, _attend)


def _lay_out(build: Builder, segments: ir.Value) -> Layout:
    """token_offset int32 [segments, longest] and cumulative_sequence_length int32 [segments + 1].

    The first says where each token would stand if every segment were as long as the longest, and behind those of the
    tokens it lists the places that would stay empty.
    """
    tokens = build("Shape", segments)
    number = build("Range", 0, build("Squeeze", tokens), 1)
    following = build("Concat", build("Slice", segments, [1], [np.iinfo(np.int64).max], [0]), [-1], axis=0)
    # Another segment follows where the numbers differ; there is no kernel for Equal at this version of the standard.
    last = build("Cast", build("Sub", following, segments), to=int(ir.DataType.BOOL))
    ends = build("Compress", build("Add", number, 1), last, axis=0)
    starts = build("Concat", [0], build("Slice", ends, [0], [-1], [0]), axis=0)
    cumulative = build("Cast", build("Concat", [0], ends, axis=0), to=_INT32)

    lengths = build("Sub", ends, starts)
    longest = build("ReduceMax", lengths, keepdims=0)
    count = build("Squeeze", build("Shape", ends))
    places = build("Mul", count, longest)
    place = build("Reshape", build("Range", 0, places, 1), build("Concat", [-1], _one(build, longest), axis=0))
    inside = build("Range", 0, longest, 1)
    length, start = (build("Unsqueeze", x, [1]) for x in (lengths, starts))
    taken = build("Add", start, build("Min", inside, length))  # tokens in front of a place
    free = build("Add", build("Sub", place, taken), tokens)
    order = build("Where", build("Less", inside, length), taken, free)
    flat = build("Reshape", place, [-1])
    offsets = build("ScatterElements", flat, build("Reshape", order, [-1]), flat, axis=0)
    shaped = build("Reshape", offsets, build("Concat", [-1], _one(build, longest), axis=0))
    return build("Cast", shaped, to=_INT32), cumulative


def _one(build: Builder, number: ir.Value) -> ir.Value:
    return build("Unsqueeze", number, [0])


def _attend(build: Builder, node: ir.Node, layout: Layout) -> ir.Value:
    query, key, value = (given(node, i) for i in range(3))
    heads, kv_heads = head_counts(node)
    key, value = (_repeated(build, x, kv_heads, heads // kv_heads) for x in (key, value))
    kind = query.dtype
    if kind == ir.DataType.BFLOAT16:
        query, key, value = (build("Cast", x, to=int(ir.DataType.FLOAT16)) for x in (query, key, value))
    packed = ir.node(
        "PackedMultiHeadAttention", [query, key, value, None, *layout], {"num_heads": heads},
        domain=CONTRIB, metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    build.nodes.append(packed)
    out = packed.outputs[0]
    return build("Cast", out, to=int(kind)) if kind == ir.DataType.BFLOAT16 else out


def _repeated(build: Builder, x: ir.Value, kv_heads: int, times: int) -> ir.Value:
    """x [tokens, kv_heads * head_dim] with every head `times` times."""
    if times == 1:
        return x
    width = width_of(x)
    apart = build("Reshape", x, [0, kv_heads, 1, width // kv_heads])
    repeated = build("Expand", apart, [1, 1, times, 1])
    return build("Reshape", repeated, [0, width * times])
