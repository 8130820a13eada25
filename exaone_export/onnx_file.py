"""Reads what matters of an ``.onnx`` file without the onnx library: operators, tensors, and the files they lie in.

Field numbers are those of onnx.proto; the wire format is protobuf's (varints, and length-delimited messages).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import BundleError

_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 5, 6, 11
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
# Bits of a value of each of ONNX's types that has a size.
_BITS = dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8) | dict.fromkeys((4, 5, 10, 16), 16)
_BITS |= dict.fromkeys((1, 6, 12), 32) | dict.fromkeys((7, 11, 13, 14), 64) | {15: 128}
_BITS |= dict.fromkeys((21, 22, 23), 4) | dict.fromkeys((25, 26), 2)
_DEEPEST, _MOST_DIMS = 16, 64
_LARGEST = 256 << 20  # structure and tensors of at most a kilobyte each


@dataclass(frozen=True)
class ExternalData:
    """Where a tensor's bytes lie: `length` bytes (0: to the end) at `offset` of the file `location`."""

    tensor: str
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class Initializer:
    """A tensor that the graph holds: its shape, and its bytes, wherever they lie."""

    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Node:
    """An operator, with its domain where that is not ONNX's own, and its inputs' names, "" where one is left out."""

    op: str
    inputs: tuple[str, ...]


@dataclass
class OnnxFile:
    """One graph file.

    Attributes:
        ops: operator → number of nodes, subgraphs included; with its domain where that is not ONNX's own.
        functions: number of functions the file brings along.
        external: tensors that lie in other files.
        nodes: all of them, subgraphs included.
        initializers: by name.
    """

    ops: dict[str, int] = field(default_factory=dict)
    functions: int = 0
    external: list[ExternalData] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    initializers: dict[str, Initializer] = field(default_factory=dict)


def read_onnx(path: Path) -> OnnxFile:
    """Reads a graph file's structure; no weight is read.

    Raises:
        BundleError: not a graph file, or larger than any that this toolkit writes.
    """
    size = path.stat().st_size
    if size > _LARGEST:
        raise _damaged(path, f"{size} bytes, more than the {_LARGEST} a graph without weights may have")
    found = OnnxFile()
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == _MODEL_GRAPH:
                _read_graph(_message(value), found, 0)
            elif number == _MODEL_FUNCTIONS:
                found.functions += 1
    except (ValueError, IndexError) as reason:
        raise _damaged(path, f"not a sound ONNX file ({str(reason)[:80]})") from None
    if not found.ops:
        raise _damaged(path, "it holds no graph")
    return found


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError("damaged bundle", path.name, why, "Export or copy the bundle again")


def _read_graph(graph: memoryview, found: OnnxFile, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError("graphs nested too deeply")
    for number, value in _fields(graph):
        if number == _GRAPH_NODE:
            _read_node(_message(value), found, depth)
        elif number == _GRAPH_INITIALIZER:
            name, tensor = _read_tensor(_message(value), found)
            found.initializers[name] = tensor


def _read_node(node: memoryview, found: OnnxFile, depth: int) -> None:
    op_type = domain = ""
    inputs = []
    for number, value in _fields(node):
        if number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_OP_TYPE:
            op_type = _text(value)
        elif number == _NODE_DOMAIN:
            domain = _text(value)
        elif number == _NODE_ATTRIBUTE:
            for inner, part in _fields(_message(value)):
                if inner in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                    _read_graph(_message(part), found, depth + 1)
                elif inner == _ATTRIBUTE_TENSOR:
                    _read_tensor(_message(part), found)
    name = f"{domain}.{op_type}" if domain not in ("", "ai.onnx") else op_type
    found.ops[name] = found.ops.get(name, 0) + 1
    found.nodes.append(Node(name, tuple(inputs)))


def _read_tensor(tensor: memoryview, found: OnnxFile) -> tuple[str, Initializer]:
    name, kind, dims, entries = "", 0, list[int](), {}
    for number, value in _fields(tensor):
        if number == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == _TENSOR_TYPE:
            kind = value if isinstance(value, int) else 0
        elif number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_EXTERNAL:
            entry = dict(_fields(_message(value)))
            entries[_text(entry.get(_ENTRY_KEY, b""))] = _text(entry.get(_ENTRY_VALUE, b""))
    if len(dims) > _MOST_DIMS:
        raise ValueError(f"a tensor of {len(dims)} dimensions")
    if entries:
        offset, length = (_count(entries.get(key, "0")) for key in ("offset", "length"))
        found.external.append(ExternalData(name, entries.get("location", ""), offset, length))
    return name, Initializer(tuple(dims), -(-math.prod(dims) * _BITS.get(kind, 0) // 8))


def _varints(data: memoryview) -> list[int]:
    """Numbers one behind another."""
    numbers, at = list[int](), 0
    while at < len(data):
        number, at = _varint(data, at)
        numbers.append(number)
    return numbers


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise ValueError(f"external data offset or length {text[:20]!r}")
    return int(text)


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _text(value: int | memoryview | bytes) -> str:
    if isinstance(value, int):
        raise ValueError("a number where text is expected")
    return bytes(value).decode("utf-8")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of every field of a message; numbers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field runs past the end")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
