"""Where new keys and values go in a cache of integers, and what a token sees of it: the same for all layers of a kind.

In a full cache the token at position p lies in slot p. In a ring it lies in slot p modulo the buffer's size less one,
and the last slot takes what nobody is to see: padding, and tokens that others of the same pass write over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from exporter.builder import Builder, given

# The products cost as the buffer, the other way as the tokens in it: the share of it from which they are taken.
FILLED: Final = 8


@dataclass(frozen=True)
class Slots:
    """What the layers of one kind have in common.

    Attributes:
        ring, window: the kind; window -1 is none.
        products: bool scalar, whether integers are multiplied.
        positions: int64 [batch, sequence], of the new tokens.
        places: int64 [batch, sequence, kv_heads, 3], where the cache takes them: row, head, slot.
        hidden: float32 [batch, 1, 1, slots], 0 for what a single new token sees and minus infinity for the rest.
        before: int64 [1] tokens of a full cache that come before the pass, or int64 [n] slots of a ring.
        lengths, total: int32, as GroupQueryAttention wants them where only those are given.
    """

    ring: bool
    window: int
    products: ir.Value
    positions: ir.Value
    places: ir.Value
    hidden: ir.Value
    before: ir.Value
    lengths: ir.Value
    total: ir.Value


def find_slots(build: Builder, node: ir.Node, *, ring: bool, window: int) -> Slots:
    """Adds the nodes that tell, from what a GroupQueryAttention is given, its inputs 0, 3, 5 and 6.

    Args:
        build: takes the nodes.
        node: the attention, over a cache of everything.
        ring: whether its cache is to be a ring.
        window: tokens that a token sees, itself included; -1 for all.
    """
    query, cache, lengths, total = (given(node, i) for i in (0, 3, 5, 6))
    kv_heads = node.attributes["kv_num_heads"].as_int()
    sequence = build("Squeeze", build("Shape", query, start=1, end=2))
    capacity = build("Squeeze", build("Shape", cache, start=2, end=3))
    tokens, last = build("Cast", total, to=7), build("Cast", lengths, to=7)
    rows = build("Squeeze", build("Shape", last))
    start = build("Sub", tokens, sequence)

    # A first pass starts every row at 0; later ones append behind each row's own last token.
    each = build("Where", build("Equal", start, 0), 0, build("Sub", build("Add", last, 1), sequence))
    positions = build("Add", build("Unsqueeze", each, [1]), build("Range", 0, sequence, 1))
    slots, own = build("Range", 0, capacity, 1), build("Unsqueeze", last, [1])
    if ring:
        size = build("Sub", capacity, 1)
        kept = build("And", build("LessOrEqual", positions, own), build("Greater", positions, build("Sub", own, size)))
        slot = build("Where", kept, build("Mod", positions, size), size)
        age = build("Mod", build("Sub", own, slots), size)
        visible = build("And", build("LessOrEqual", age, own), build("Less", slots, size))
        prior = build("Min", start, window - 1)
        before = build("Mod", build("Add", build("Range", 0, prior, 1), build("Sub", start, prior)), size)
    else:
        slot, age, prior = positions, build("Sub", own, slots), start
        visible = build("GreaterOrEqual", age, 0)
        before = build("Reshape", start, [1])
    if window > 0:
        visible = build("And", visible, build("Less", age, window))
    hidden = build("Where", visible, np.zeros((), np.float32), np.array(-np.inf, np.float32))
    dropped = build("Cast", build("Sub", start, prior), to=6)

    enough = build("GreaterOrEqual", build("Mul", tokens, FILLED), capacity)
    single = build("Equal", sequence, 1)
    return Slots(
        ring, window,
        build("And", single, build("Or", enough, build("Greater", rows, 1))),
        positions,
        _places(build, slot, rows, kv_heads),
        build("Unsqueeze", hidden, [1, 2]),
        before,
        build("Sub", lengths, dropped),
        build("Sub", total, dropped),
    )  # fmt: skip


def _places(build: Builder, slot: ir.Value, rows: ir.Value, kv_heads: int) -> ir.Value:
    """Row, head and slot of each new row of the cache, [batch, sequence, kv_heads, 3]."""
    slots = build("Add", build("Unsqueeze", slot, [2, 3]), np.zeros((1, 1, kv_heads, 1), np.int64))
    nothing = build("Mul", slots, 0)
    row = build("Add", nothing, build("Reshape", build("Range", 0, rows, 1), [-1, 1, 1, 1]))
    head = build("Add", nothing, np.arange(kv_heads, dtype=np.int64).reshape(1, 1, kv_heads, 1))
    return build("Concat", row, head, slots, axis=3)
