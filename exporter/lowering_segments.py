"""Attention inside segments as a loop over tiles of queries, so that no tokens x tokens matrix exists.

A tile never crosses a segment's border: its queries see all keys of their segment and need no mask. Where a
segment does not fill its last tile, the tile's spare rows hold some token's query and their result is dropped.

In float32 a tile goes through MultiHeadAttention, whose kernel for the CPU keeps no scores if there is no mask. It
knows no grouped heads: the queries that share a key head are laid one behind the other, as more queries of that head,
so that keys and values are not repeated. Half precision has no such kernel there and takes the standard's Attention
in tiles that are small enough for their scores.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

from exporter.builder import CONTRIB, Builder, given
from exporter.translations import OPSET, PLACEHOLDER

LARGEST_TILE = 2048  # keys and values are copied once for each
LARGEST_SEGMENT = 16_384  # tokens of one segment that a tile's scores are budgeted for, where there are scores
SCORE_BYTES = 1 << 28
LARGEST_TILE_OF_SCORES = 256
_Key = TypeVar("_Key", bound=Hashable)
_Layout = TypeVar("_Layout")


def tile_size(heads: int, dtype: ir.DataType | None = ir.DataType.FLOAT) -> int:
    """Most queries per tile. With scores: a power of two, so that theirs in float32 stay inside the budget."""
    if dtype == ir.DataType.FLOAT:
        return LARGEST_TILE
    fitting = SCORE_BYTES // (4 * heads * LARGEST_SEGMENT)
    return max(16, min(LARGEST_TILE_OF_SCORES, 1 << (max(fitting, 1).bit_length() - 1)))


def lower_segment_attention(model: ir.Model) -> int:
    """Replaces every `SegmentAttention` placeholder by a loop over tiles; returns how many there were."""
    return replace_segment_attention(
        model, "tiles", lambda node: (given(node, 3), tile_size(head_counts(node)[0], given(node, 0).dtype)),
        lambda build, key: _lay_out(build, *key), _attend,
    )  # fmt: skip


def replace_segment_attention(
    model: ir.Model,
    prefix: str,
    key_of: Callable[[ir.Node], _Key],
    lay_out: Callable[[Builder, _Key], _Layout],
    attend: Callable[[Builder, ir.Node, _Layout], ir.Value],
) -> int:
    """Replaces every `SegmentAttention` placeholder; returns how many there were.

    The placeholder: query [tokens, heads * head_dim], key and value [tokens, kv_heads * head_dim], segments int64
    [tokens], which counts 0, 0, ..., 1, 1, ... without gaps.

    Args:
        model: changed in place.
        prefix: of the names of constants.
        key_of: what a placeholder's layout depends on.
        lay_out: computes a layout from that, once.
        attend: computes a placeholder's result with its layout.
    """
    layouts: dict[_Key, _Layout] = {}
    found = [node for node in model.graph if node.domain == PLACEHOLDER and node.op_type == "SegmentAttention"]
    for node in found:
        build, key = Builder(node.metadata_props, f"{prefix}_{len(layouts)}_{node.name}"), key_of(node)
        if key not in layouts:  # later placeholders stand behind this one and may use its layout
            layouts[key] = lay_out(build, key)
        result = attend(build, node, layouts[key])
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        for constant in build.constants.values():
            model.graph.register_initializer(constant)
        model.graph.insert_before(node, build.nodes)
        node.outputs[0].replace_all_uses_with(result)
        model.graph.remove(node, safe=True)
    if found:
        model.graph.opset_imports.setdefault(CONTRIB, 1)
    return len(found)


def head_counts(node: ir.Node) -> tuple[int, int]:
    """Query heads and key heads of a placeholder."""
    return node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()


def width_of(value: ir.Value) -> int:
    """The width of [tokens, width]. Raises ValueError where it is not known."""
    width = value.shape[1] if value.shape is not None else None
    if not isinstance(width, int):
        raise ValueError(f"the width of {value.name} must be known")
    return width


@dataclass(frozen=True)
class _Tiles:
    """How tokens lie in tiles: tokens int64 [tiles, size], slot [tokens] the place of each token in all tiles laid
    end to end, start and end [tiles, 1] the tokens of each tile's segment.
    """

    tokens: ir.Value
    slot: ir.Value
    start: ir.Value
    end: ir.Value


def _lay_out(build: Builder, segments: ir.Value, largest: int) -> _Tiles:
    tokens = build("Shape", segments)
    number = build("Range", 0, build("Squeeze", tokens), 1)
    count = build("Add", build("Gather", segments, [-1]), 1)
    one_each = build("Expand", 1, tokens)
    lengths = build("ScatterElements", build("Expand", 0, count), segments, one_each, axis=0, reduction="add")
    ends = build("CumSum", lengths, 0)
    starts = build("Sub", ends, lengths)
    # Tiles of the longest segment are equally full.
    longest = build("ReduceMax", lengths, keepdims=0)
    size = _divided_up(build, longest, _divided_up(build, longest, largest))

    tiles = _divided_up(build, lengths, size)
    tile_ends = build("CumSum", tiles, 0)
    local = build("Sub", number, build("Gather", starts, segments))
    first_tile = build("Gather", build("Sub", tile_ends, tiles), segments)
    tile = build("Add", first_tile, build("Div", local, size))
    slot = build("Add", build("Mul", tile, size), build("Mod", local, size))

    total = build("Mul", build("Gather", tile_ends, [-1]), size)
    places = build("ScatterElements", build("Expand", 0, total), slot, number, axis=0)
    rows = build("Concat", [-1], build("Unsqueeze", size, [0]), axis=0)
    places = build("Reshape", places, rows)
    # The first row of a tile is always a token of its segment.
    segment = build("Gather", segments, build("Slice", places, [0], [1], [1]))
    return _Tiles(places, slot, build("Gather", starts, segment), build("Gather", ends, segment))


def _divided_up(build: Builder, number: ir.Value, divisor: ir.Value | int) -> ir.Value:
    return build("Div", build("Sub", build("Add", number, divisor), 1), divisor)


def _attend(build: Builder, node: ir.Node, tiles: _Tiles) -> ir.Value:
    query, key, value = (given(node, i) for i in range(3))
    heads, kv_heads = head_counts(node)
    width = width_of(query)
    queries = build("Gather", query, tiles.tokens, axis=0)
    body = _tile_body(build, key, value, heads, kv_heads)
    attended = build("Scan", queries, tiles.start, tiles.end, body=body, num_scan_inputs=3)
    return build("Gather", build("Reshape", attended, [-1, width]), tiles.slot, axis=0)


def _tile_body(build: Builder, key: ir.Value, value: ir.Value, heads: int, kv_heads: int) -> ir.Graph:
    """One tile: queries [size, width], start and end [1] in, attended [size, width] out."""
    width = width_of(value) // kv_heads * heads
    queries = ir.Value(name="tile_queries", shape=ir.Shape([None, width]), type=key.type)
    start, end = (
        ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
        for name in ("tile_start", "tile_end")
    )
    # Without the width, from a constant of the body itself, shape inference takes the result to be 0 wide.
    inner = Builder(build.metadata, "tile")
    keys, values = (inner("Reshape", inner("Slice", x, start, end, [0]), [1, -1, width_of(x)]) for x in (key, value))
    attend = _attend_grouped if key.dtype == ir.DataType.FLOAT else _attend_with_scores
    out = attend(inner, queries, keys, values, (heads, kv_heads, width))
    out.name, out.shape, out.type = "tile_attended", ir.Shape([None, width]), key.type
    ends = [queries, start, end], [out]
    constants, opsets = list(inner.constants.values()), {"": OPSET, CONTRIB: 1}
    return ir.Graph(*ends, nodes=inner.nodes, initializers=constants, name="tile", opset_imports=opsets)


def _attend_grouped(
    inner: Builder, queries: ir.Value, keys: ir.Value, values: ir.Value, sizes: tuple[int, int, int]
) -> ir.Value:
    """Attention without scores of queries [size, width]; sizes: heads, key heads, width."""
    heads, kv_heads, width = sizes
    groups, head_dim = heads // kv_heads, width // heads
    by_group = inner("Transpose", inner("Reshape", queries, [-1, kv_heads, groups, head_dim]), perm=[2, 0, 1, 3])
    longer = inner("Reshape", by_group, [1, -1, kv_heads * head_dim])
    attended = inner("MultiHeadAttention", longer, keys, values, domain=CONTRIB, num_heads=kv_heads)
    by_group = inner("Reshape", attended, [groups, -1, kv_heads, head_dim])
    return inner("Reshape", inner("Transpose", by_group, perm=[1, 2, 0, 3]), [-1, width])


def _attend_with_scores(
    inner: Builder, queries: ir.Value, keys: ir.Value, values: ir.Value, sizes: tuple[int, int, int]
) -> ir.Value:
    heads, kv_heads, _ = sizes
    one = inner("Unsqueeze", queries, [0])
    return inner("Squeeze", inner("Attention", one, keys, values, q_num_heads=heads, kv_num_heads=kv_heads), [0])
