"""Reads what matters of an ``.onnx`` file without the onnx library: operators, tensors, and the files they lie in.

Keys are those of onnx.proto. A file that anybody may have written is read strictly: what a part may not hold, or may
hold once and holds twice, is refused, so that no other reader can take the file for something else. Nothing that our
exporter does not write is known here: functions, sparse tensors, strings, training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from model.bundle import CHECKED_ON_LOAD
from model.errors import BundleError, printable
from runtime.finite import FLOATS, FiniteCheck
from runtime.onnx_parts import Initializer, Node, OnnxFile, Value
from runtime.onnx_tensor import read_tensor
from runtime.protobuf import content_key, fields, number_key, unknown_field

_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSET = number_key(1), content_key(7), content_key(8)
_MODEL_FUNCTIONS: Final = content_key(25)
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = map(content_key, (1, 5, 11, 12))
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = map(content_key, (1, 2, 4, 5, 7))
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER = content_key(1), number_key(3)
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = map(content_key, (5, 6, 10, 11))
_OPSET_DOMAIN, _OPSET_VERSION = content_key(1), number_key(2)
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TYPE_SHAPE, _SHAPE_DIM = map(content_key, (1, 2, 1, 2, 1))
_TYPE_KIND, _DIM_VALUE = number_key(1), number_key(1)

# What else a part may hold, which says nothing of what it computes: names, documentation, types of values in between.
_MODEL_REST: Final = frozenset((*map(content_key, (2, 3, 4, 6, 14)), number_key(5)))
_GRAPH_REST: Final = frozenset(map(content_key, (2, 10, 13, 14, 16)))
_NODE_REST: Final = frozenset(map(content_key, (3, 6, 8, 9)))
# Numbers, texts, and lists of them, packed or not.
_ATTRIBUTE_REST: Final = frozenset(
    (number_key(20), number_key(8), 2 << 3 | 5, 7 << 3 | 5, *map(content_key, (4, 7, 8, 9, 13))),
)

_DEEPEST: Final = 16
# Of a model of sixty layers they are a tenth of this; every part takes time and memory to look at.
_MOST_PARTS: Final = 500_000


def read_onnx(path: Path) -> OnnxFile:
    """Reads a graph file's structure; no weight is read.

    Raises:
        BundleError: not a graph file, larger than any that this toolkit writes, or with parts that it never writes.
    """
    try:
        size = path.stat().st_size
        if size > CHECKED_ON_LOAD:
            raise _damaged(path, f"{size} bytes, more than the {CHECKED_ON_LOAD} a graph without weights may have")
        found = _Reader(path.read_bytes()).model()
    except OSError as reason:
        raise _damaged(path, reason.strerror or "unreadable") from None
    except (ValueError, IndexError) as reason:
        why = printable(str(reason), 80)
        if isinstance(reason, IndexError | UnicodeDecodeError):
            why = "cut short" if isinstance(reason, IndexError) else "a name that is not UTF-8"
        raise _damaged(path, f"not a sound ONNX file ({why})") from None
    if not found.ops:
        raise _damaged(path, "it holds no graph")
    return found


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError("damaged bundle", path.name, why, "Export or copy the bundle again")


class _Reader:
    """Walks through one file; every method takes where its part begins and ends."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.found = OnnxFile()
        self.parts = 0

    def count(self, parts: int = 1) -> None:
        """Adds to the parts seen."""
        self.parts += parts
        if self.parts > _MOST_PARTS:
            raise ValueError(f"more than {_MOST_PARTS} parts")

    def model(self) -> OnnxFile:
        graphs = 0
        for key, at, end in fields(self.data, 0, len(self.data)):
            if key == _MODEL_GRAPH:
                graphs += 1
                self.graph(at, end, 0)
            elif key == _MODEL_FUNCTIONS:
                self.found.functions += 1
            elif key == _MODEL_OPSET:
                self.opset(at, end)
            elif key == _MODEL_IR:
                self.found.ir_version = at
            elif key not in _MODEL_REST:
                raise unknown_field("a model", key)
        if graphs > 1:
            raise ValueError("several graphs")
        return self.found

    def opset(self, at: int, end: int) -> None:
        domain, version = "", 0
        for key, start, stop in fields(self.data, at, end):
            if key == _OPSET_DOMAIN:
                domain = self.text(start, stop)
            elif key == _OPSET_VERSION:
                version = start
            else:
                raise unknown_field("an opset", key)
        self.found.opsets[domain] = max(version, self.found.opsets.get(domain, 0))

    def graph(self, at: int, end: int, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError("graphs nested too deeply")
        for key, start, stop in fields(self.data, at, end):
            if key == _GRAPH_NODE:
                self.node(start, stop, depth)
            elif key == _GRAPH_INITIALIZER:
                name, tensor = self.tensor(start, stop)
                if name in self.found.initializers:
                    raise ValueError(f"two tensors of the name {name[:40]!r}")
                self.found.initializers[name] = tensor
                if tensor.place is not None:
                    self.found.external.append(tensor.place)
            elif key in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                self.value(start, stop, self.found.inputs if key == _GRAPH_INPUT else self.found.outputs, depth)
            elif key not in _GRAPH_REST:
                raise unknown_field("a graph", key)

    def value(self, at: int, end: int, values: dict[str, Value], depth: int) -> None:
        self.count()
        name, kind, shape, types = "", 0, list[int | None](), 0
        for key, start, stop in fields(self.data, at, end):
            if key == _VALUE_NAME:
                name = self.text(start, stop)
            elif key == _VALUE_TYPE:
                types += 1
                for inner, begin, behind in fields(self.data, start, stop):
                    if inner == _TYPE_TENSOR:
                        types += 1
                        kind = self.tensor_type(begin, behind, shape)
        if depth == 0:
            if types != 2 or name in values:
                raise ValueError(f"the input or output {name[:40]!r}, which is no tensor, or is there twice")
            values[name] = Value(kind, tuple(shape))

    def tensor_type(self, at: int, end: int, shape: list[int | None]) -> int:
        kind = shapes = 0
        for key, start, stop in fields(self.data, at, end):
            if key == _TYPE_KIND:
                kind = start
            elif key == _TYPE_SHAPE:
                shapes += 1
                for inner, begin, behind in fields(self.data, start, stop):
                    if inner == _SHAPE_DIM:
                        sizes = [size for part, size, _ in fields(self.data, begin, behind) if part == _DIM_VALUE]
                        shape.append(sizes[-1] if sizes else None)
        if shapes > 1:
            raise ValueError("a type with two shapes")
        return kind

    def node(self, at: int, end: int, depth: int) -> None:
        op_type = domain = ""
        inputs: list[str] = []
        numbers: dict[str, int] = {}
        attributes: set[str] = set()
        for key, start, stop in fields(self.data, at, end):
            if key == _NODE_INPUT:
                inputs.append(self.text(start, stop))
            elif key == _NODE_ATTRIBUTE:
                self.attribute(start, stop, depth, numbers, attributes)
            elif key == _NODE_OP and not op_type:
                op_type = self.text(start, stop)
            elif key == _NODE_DOMAIN and not domain:
                domain = self.text(start, stop)
            elif key != _NODE_OUTPUT and key not in _NODE_REST:
                raise unknown_field("a node", key)
        self.count(1 + len(inputs))
        name = op_type if domain in ("", "ai.onnx") else f"{domain}.{op_type}"
        self.found.ops[name] = self.found.ops.get(name, 0) + 1
        self.found.nodes.append(Node(name, tuple(inputs), numbers))

    def attribute(self, at: int, end: int, depth: int, numbers: dict[str, int], attributes: set[str]) -> None:
        self.count()
        name, value, parts = "", None, 0
        for key, start, stop in fields(self.data, at, end):
            if key == _ATTRIBUTE_NAME:
                name = self.text(start, stop)
            elif key == _ATTRIBUTE_INTEGER:
                value = start
            elif key in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                parts += key == _ATTRIBUTE_GRAPH
                self.graph(start, stop, depth + 1)
            elif key in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                parts += key == _ATTRIBUTE_TENSOR
                self.constant(self.tensor(start, stop)[1])
            elif key not in _ATTRIBUTE_REST:
                raise unknown_field("an attribute", key)
        if parts > 1 or name in attributes:  # read as one by others
            raise ValueError(f"the attribute {name[:40]!r} twice")
        attributes.add(name)
        if value is not None:
            numbers[name] = value

    def constant(self, tensor: Initializer) -> None:
        """Refuses an attribute's tensor that lies elsewhere or holds NaN; a single infinity may be a mask's."""
        if tensor.place is not None:
            raise ValueError("an attribute whose tensor lies in another file")
        if tensor.kind in FLOATS and math.prod(tensor.shape) > 1:
            start, stop = tensor.inside
            if FiniteCheck(tensor.kind).fails(memoryview(self.data)[start:stop]):
                raise ValueError("a constant that holds NaN or an infinity")

    def tensor(self, at: int, end: int) -> tuple[str, Initializer]:
        self.count()
        return read_tensor(self.data, at, end)

    def text(self, at: int, end: int) -> str:
        return self.data[at:end].decode("utf-8")
