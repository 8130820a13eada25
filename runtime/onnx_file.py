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
from runtime.onnx_parts import BITS, ExternalData, Initializer, Node, OnnxFile, Value
from runtime.protobuf import fields, read_variable


def _number(field_number: int) -> int:
    return field_number << 3


def _content(field_number: int) -> int:
    return field_number << 3 | 2


_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSET = _number(1), _content(7), _content(8)
_MODEL_FUNCTIONS: Final = _content(25)
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = map(_content, (1, 5, 11, 12))
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = map(_content, (1, 2, 4, 5, 7))
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER = _content(1), _number(3)
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = map(_content, (5, 6, 10, 11))
_TENSOR_DIM, _TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_PLACE = _number(1), _content(1), _number(2), _number(14)
_TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = map(_content, (8, 9, 13))
_PAIR = (_content(1), _content(2))
_OPSET_VERSION: Final = _number(2)
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TYPE_SHAPE, _SHAPE_DIM = map(_content, (1, 2, 1, 2, 1))
_TYPE_KIND, _DIM_VALUE = _number(1), _number(1)

# What else a part may hold, which says nothing of what it computes: names, documentation, types of values in between.
_MODEL_REST: Final = frozenset((*map(_content, (2, 3, 4, 6, 14)), _number(5)))
_GRAPH_REST: Final = frozenset(map(_content, (2, 10, 13, 14, 16)))
_NODE_REST: Final = frozenset(map(_content, (3, 6, 8, 9)))
# Numbers, texts, and lists of them, packed or not.
_ATTRIBUTE_REST: Final = frozenset(
    (_number(20), _number(8), 2 << 3 | 5, 7 << 3 | 5, *map(_content, (4, 7, 8, 9, 13))),
)
_TENSOR_REST: Final = frozenset(map(_content, (12, 16)))

_DEEPEST, _MOST_DIMS, _LARGEST_DIM = 16, 16, 1 << 40
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
                raise _unknown("a model", key)
        if graphs > 1:
            raise ValueError("several graphs")
        return self.found

    def opset(self, at: int, end: int) -> None:
        domain, version = "", 0
        for key, start, stop in fields(self.data, at, end):
            if key == _PAIR[0]:
                domain = self.text(start, stop)
            elif key == _OPSET_VERSION:
                version = start
            else:
                raise _unknown("an opset", key)
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
                raise _unknown("a graph", key)

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
                raise _unknown("a node", key)
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
                raise _unknown("an attribute", key)
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
        names, kinds, dims, entries, raw, typed = list[str](), list[int](), list[int](), dict[str, str](), 0, 0
        inside, elsewhere = (0, 0), 0
        for key, start, stop in fields(self.data, at, end):
            if key == _TENSOR_DIM:
                dims.append(start)
            elif key == _TENSOR_DIMS:
                dims += self.variables(start, stop)
            elif key == _TENSOR_TYPE:
                kinds.append(start)
            elif key == _TENSOR_NAME:
                names.append(self.text(start, stop))
            elif key == _TENSOR_RAW:
                inside, raw = (start, stop), raw + 1
            elif key == _TENSOR_EXTERNAL:
                self.entry(start, stop, entries)
            elif key == _TENSOR_PLACE:
                elsewhere = start
            elif key in _VALUES:
                typed += self.values(key, start, stop)
            elif key not in _TENSOR_REST:
                raise _unknown("a tensor", key)
        if len(names) > 1 or len(kinds) != 1 or raw > 1 or kinds[0] not in BITS:
            raise ValueError("a tensor with parts twice, or of no known type")
        if len(dims) > _MOST_DIMS or any(dim >= _LARGEST_DIM for dim in dims):
            raise ValueError("a tensor of impossible dimensions")
        name, count, bits = "".join(names), math.prod(dims), BITS[kinds[0]]
        nbytes = -(-count * bits // 8)
        if elsewhere not in (0, 1) or bool(elsewhere) != bool(entries) or (entries and (raw or typed)):
            raise ValueError("a tensor that lies in two places")
        if entries:
            place = ExternalData(name, entries.get("location", ""), *(_count(entries.get(k)) for k in _EXTENT))
            return name, Initializer(tuple(dims), nbytes, kinds[0], place)
        # Of fewer bits than eight several are in one of the numbers.
        held = inside[1] - inside[0] == nbytes if raw else typed == (count if bits >= 8 else -(-count * bits // 8))
        if not held or (raw and typed):
            raise ValueError(f"the values of {name[:40]!r} are not as many as its shape says")
        if typed > 1 and kinds[0] in FLOATS:  # which nobody would hold against NaN
            raise ValueError(f"floats written as numbers: {name[:40]!r}")
        return name, Initializer(tuple(dims), nbytes, kinds[0], None, inside)

    def entry(self, at: int, end: int, entries: dict[str, str]) -> None:
        pair = ["", ""]
        for key, start, stop in fields(self.data, at, end):
            if key not in _PAIR:
                raise _unknown("an entry", key)
            pair[_PAIR.index(key)] = self.text(start, stop)
        if pair[0] in entries:
            raise ValueError("an entry twice")
        entries[pair[0]] = pair[1]

    def values(self, key: int, at: int, end: int) -> int:
        """How many numbers a field of a tensor's values holds."""
        width = _VALUES[key]
        if width:
            return (end - at) // width
        if key & 7 == 0:
            return 1
        if end > at and self.data[end - 1] > 127:
            raise ValueError("a number runs past the end")
        return sum(byte < 128 for byte in self.data[at:end])

    def variables(self, at: int, end: int) -> list[int]:
        """A few numbers one behind another."""
        numbers = []
        if end - at > 10 * _MOST_DIMS:
            raise ValueError("a tensor of impossible dimensions")
        while at < end:
            number, at = read_variable(self.data, at)
            numbers.append(number)
        if at != end:
            raise ValueError("a number runs past the end")
        return numbers

    def text(self, at: int, end: int) -> str:
        return self.data[at:end].decode("utf-8")


_EXTENT: Final = ("offset", "length")
# Of a tensor's values that are not in raw_data: key → bytes of one, 0 for variable ones.
_VALUES: Final = {
    _content(4): 4, 4 << 3 | 5: 4, _content(10): 8, 10 << 3 | 1: 8,
    **dict.fromkeys((_content(5), _number(5), _content(7), _number(7), _content(11), _number(11)), 0),
}  # fmt: skip


def _count(text: str | None) -> int:
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise ValueError(f"external data offset or length {str(text)[:20]!r}")
    return int(text)


def _unknown(what: str, key: int) -> ValueError:
    return ValueError(f"{what} with a field {key >> 3} of type {key & 7}, or with one twice")
