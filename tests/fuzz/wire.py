"""Protobuf messages as trees, for changes to ``.onnx`` files that leave them well formed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from random import Random
from typing import Final

from tests.fuzz.mutators import INTEGERS, TEXTS, spoiled

# Which fields of onnx.proto's messages are messages themselves.
_MESSAGES: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 8: "opset", 14: "entry", 25: "function"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph"},
    "tensor": {13: "entry"},
    "value": {2: "type"},
    "type": {1: "tensor_type"},
    "tensor_type": {2: "shape"},
    "shape": {1: "dimension"},
}
_OPERATORS: Final = (
    "If", "Loop", "Scan", "Identity", "Custom", "ATen", "MatMul", "Gather", "Reshape", "Cast", "MatMulNBits", "Add",
    "GroupQueryAttention", "RotaryEmbedding", "Expand", "ConstantOfShape", "Split", "Slice", "Concat", "Transpose",
    "DequantizeLinear", "Attention", "SkipSimplifiedLayerNormalization", "QuickGelu", "Tile", "Range", "Where",
    "MultiHeadAttention", "GatherBlockQuantized", "Pad", "Resize", "EyeLike", "Sampling", "BeamSearch",
    "EPContext", "PythonOp", "RandomUniform", "SequenceEmpty", "ImageDecoder", "StringNormalizer", "ScatterND", "TopK",
)  # fmt: skip
_NAMES: Final = (
    "", "com.microsoft", "ai.onnx", "ai.onnx.ml", "com.example", "../decoder.onnx.data", "/etc/passwd", "location",
    "offset", "length", "checksum", "-1", "0", "18446744073709551615", "1e3", "*/_ORT_MEM_ADDR_/*", "logits", "é", "\0",
    "num_heads", "kv_num_heads", "axis", "K", "N", "bits", "block_size", "scale", "local_window_size", "x" * 2000,
)  # fmt: skip


class Part:
    """One field: its number, its wire type, and its value: a number, bytes, or the fields of a message."""

    def __init__(self, number: int, kind: int, value: int | bytes | tuple[Part, ...], message: str = "") -> None:
        self.number, self.kind, self.value, self.message = number, kind, value, message

    @cached_property
    def encoded(self) -> bytes:
        """As it stands in the file."""
        tag = varint(self.number << 3 | self.kind)
        if isinstance(self.value, int):
            return tag + varint(self.value % (1 << 64))
        content = self.value if isinstance(self.value, bytes) else joined(self.value)
        return tag + (varint(len(content)) if self.kind == 2 else b"") + content


def joined(parts: Sequence[Part]) -> bytes:
    """A message."""
    return b"".join(part.encoded for part in parts)


def varint(value: int) -> bytes:
    """A number in groups of seven bits."""
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def parsed(data: bytes, message: str = "model") -> tuple[Part, ...]:
    """The fields of a sound message."""
    return tuple(_fields(data, message))


def _fields(data: bytes, message: str) -> Iterator[Part]:
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _number(data, at)
            yield Part(number, kind, value)
            continue
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _number(data, at)
        content, inner = data[at : at + size], _MESSAGES.get(message, {}).get(number, "")
        yield Part(number, kind, parsed(content, inner) if inner in _MESSAGES or inner else content, inner)
        at += size


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def names_in(parts: Sequence[Part]) -> list[bytes]:
    """Inputs and outputs of a model's nodes: what values are called."""
    graph = next(part for part in parts if part.number == 7)
    nodes = [part.value for part in _inner(graph) if part.number == 1]
    found = {item.value for node in nodes if isinstance(node, tuple) for item in node if item.number in (1, 2)}
    return sorted(name for name in found if isinstance(name, bytes))


def _inner(part: Part) -> tuple[Part, ...]:
    return part.value if isinstance(part.value, tuple) else ()


def spoiled_model(parts: tuple[Part, ...], names: Sequence[bytes], random: Random) -> bytes:
    """The bytes of a model with one to three changes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        parts = _changed(parts, names, random, 0)
    return joined(parts)


def _changed(parts: tuple[Part, ...], names: Sequence[bytes], random: Random, depth: int) -> tuple[Part, ...]:
    """Goes down to a field and changes it, or the list that it stands in."""
    if not parts:
        return (Part(random.randrange(1, 30), 2, random.choice(TEXTS)),)
    # First the kind of field: there are many more nodes than inputs.
    number = random.choice(sorted({part.number for part in parts}))
    if depth == 0 and random.random() < 0.9:
        number = 7
    place = random.choice([place for place, part in enumerate(parts) if part.number == number])
    part = parts[place]
    if isinstance(part.value, tuple) and (depth == 0 or random.random() < 0.85):
        new = Part(part.number, part.kind, _changed(part.value, names, random, depth + 1), part.message)
        return (*parts[:place], new, *parts[place + 1 :])
    return _changed_list(parts, place, names, random)


def _changed_list(parts: tuple[Part, ...], place: int, names: Sequence[bytes], random: Random) -> tuple[Part, ...]:
    part, kind = parts[place], random.randrange(10)
    if kind == 0:
        return parts[:place] + parts[place + 1 :]
    if kind == 1:
        return (*parts[:place], part, *parts[place:])
    if kind == 2:
        other = random.randrange(len(parts))
        swapped = list(parts)
        swapped[place], swapped[other] = swapped[other], swapped[place]
        return tuple(swapped)
    if kind == 3:
        new = Part(random.choice((part.number, part.number + 1, random.randrange(1, 32))), part.kind, part.value)
    elif isinstance(part.value, tuple):
        new = Part(part.number, 2, spoiled(joined(part.value) or b"\0", random))
    else:
        new = Part(part.number, part.kind, _changed_value(part, names, random))
    return (*parts[:place], new, *parts[place + 1 :])


def _changed_value(part: Part, names: Sequence[bytes], random: Random) -> int | bytes:
    value = part.value
    if isinstance(value, int):
        near = (value + 1, value - 1, value * 2, value // 2, value ^ 1)
        return random.choice(near) if random.random() < 0.5 else random.choice(INTEGERS)
    if not isinstance(value, bytes):
        raise TypeError("messages are changed elsewhere")
    if part.kind != 2 or len(value) > 200:
        changed = spoiled(value or b"\0", random)
        return changed if part.kind == 2 else changed[: len(value)].ljust(len(value), b"\xff")
    if part.number == 9 and random.random() < 0.7:  # of a tensor: its values
        number = random.choice(INTEGERS) % (1 << 64)
        at = random.randrange(0, max(1, len(value)), 8)
        return value[:at] + number.to_bytes(8, "little") + value[at + 8 :]
    chance = random.random()
    if chance < 0.4 and names:
        return random.choice(names)
    if chance < 0.6:
        return random.choice(_OPERATORS).encode()
    return random.choice(_NAMES).encode() if chance < 0.8 else spoiled(value or b"\0", random)
