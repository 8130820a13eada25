"""Messages of protobuf written out field by field: enough for ONNX models of a node or three, without onnx."""

from __future__ import annotations

from collections.abc import Sequence

# Element types of ONNX: number, and bytes of one element.
ELEMENTS = {
    "float32": (1, 4),
    "uint8": (2, 1),
    "int8": (3, 1),
    "int32": (6, 4),
    "int64": (7, 8),
    "float16": (10, 2),
    "bfloat16": (16, 2),
}


def number(field: int, value: int) -> bytes:
    """A protobuf field with a number that is not negative."""
    return variable(field << 3) + variable(value)


def content(field: int, value: bytes) -> bytes:
    """A protobuf field with bytes: text, or another message."""
    return variable(field << 3 | 2) + variable(len(value)) + value


def variable(value: int) -> bytes:
    """A number in as many groups of seven bits as it needs."""
    groups = [value & 127]
    while value := value >> 7:
        groups.append(value & 127)
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], attributes: bytes = b"") -> bytes:
    """An ONNX NodeProto; `attributes` are encoded fields of it."""
    names = b"".join(content(1, name.encode()) for name in inputs)
    return names + b"".join(content(2, name.encode()) for name in outputs) + content(4, kind.encode()) + attributes


def integer_attribute(name: str, value: int) -> bytes:
    """An attribute of a node that is one number."""
    return content(5, content(1, name.encode()) + number(3, value) + number(20, 2))


def tensor_value(name: str, kind: str, shape: Sequence[int | str]) -> bytes:
    """An ONNX ValueInfoProto: an input or output; a size may be a name, which stands for any."""
    sizes = (number(1, size) if isinstance(size, int) else content(2, size.encode()) for size in shape)
    dimensions = b"".join(content(1, size) for size in sizes)
    return content(1, name.encode()) + content(2, content(1, number(1, ELEMENTS[kind][0]) + content(2, dimensions)))


def constant(name: str, kind: str, shape: Sequence[int], raw: bytes) -> bytes:
    """An ONNX TensorProto: a weight, its elements given as they lie in memory."""
    sizes = b"".join(number(1, size) for size in shape)
    return sizes + number(2, ELEMENTS[kind][0]) + content(8, name.encode()) + content(9, raw)


def model(
    nodes: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    constants: Sequence[bytes] = (),
    opset: int = 13,
) -> bytes:
    """An ONNX model of operators of the standard domain."""
    graph = b"".join(content(1, one) for one in nodes) + content(2, b"graph")
    for field, parts in ((5, constants), (11, inputs), (12, outputs)):
        graph += b"".join(content(field, part) for part in parts)
    return number(1, 8) + content(7, graph) + content(8, number(2, opset))  # ir_version, graph, opset
