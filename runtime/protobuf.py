"""Messages of protobuf, written out field by field and read strictly: what this package needs of ONNX, without onnx."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    return variable(number_key(field)) + variable(value)


def content(field: int, value: bytes) -> bytes:
    """A protobuf field with bytes: text, or another message."""
    return variable(content_key(field)) + variable(len(value)) + value


def number_key(field: int) -> int:
    """What `fields` says of such a field, and what stands before its value: here, of one with a number."""
    return field << 3


def content_key(field: int) -> int:
    """The same of a field with bytes."""
    return field << 3 | 2


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


def fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Every field of the message that lies from `at` to `end`, as protobuf's own parsers see them.

    Yields:
        A field's key, which is its number times 8 and its wire type; then a number and 0, or where its bytes begin and
        end.

    Raises:
        ValueError, IndexError: it is no message. What has been yielded then means nothing.
    """
    while at < end:
        key = data[at]
        at += 1
        if key > 127:
            key, at = read_variable(data, at - 1)
        wire = key & 7
        if key < 8 or key >= 1 << 32:  # parsers that keep 32 bits would take it for another field
            raise ValueError(f"field {key >> 3}")
        if wire == 2:
            size = data[at]
            at += 1
            if size > 127:
                size, at = read_variable(data, at - 1)
            stop = at + size
        elif wire == 0:
            value, at = read_variable(data, at)
            yield key, value, 0
            continue
        elif wire in (1, 5):
            stop = at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if stop > end:
            raise ValueError("a field runs past the end")
        yield key, at, stop
        at = stop
    if at != end:
        raise ValueError("a number runs past the end")


def unknown_field(what: str, key: int) -> ValueError:
    """The error for a field that a message may not have, or not twice."""
    return ValueError(f"{what} with a field {key >> 3} of type {key & 7}, or with one twice")


def read_variable(data: bytes, at: int) -> tuple[int, int]:
    """The number that `variable` wrote at `at`, and where the next begins; raises as `fields`."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            if value >= 1 << 64:
                break
            return value, at
    raise ValueError("a number of more than 64 bits")
