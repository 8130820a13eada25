"""Reads what matters of a tensor of an ``.onnx`` file: its shape and type, and where its values lie.

As strict as `runtime.onnx_file`: a tensor that another reader could take for something else is refused.
"""

from __future__ import annotations

import math
from typing import Final

from runtime.finite import FLOATS
from runtime.onnx_parts import BITS, ExternalData, Initializer
from runtime.protobuf import content_key, fields, number_key, read_variable, unknown_field

_DIM, _DIMS, _TYPE, _PLACE = number_key(1), content_key(1), number_key(2), number_key(14)
_NAME, _RAW, _EXTERNAL = map(content_key, (8, 9, 13))
# What else it may hold, which says nothing of its values.
_REST: Final = frozenset(map(content_key, (12, 16)))
_PAIR: Final = (content_key(1), content_key(2))
_EXTENT: Final = ("offset", "length")
# Of a tensor's values that are not in raw_data: key → bytes of one, 0 for variable ones.
_VALUES: Final = {
    content_key(4): 4, 4 << 3 | 5: 4, content_key(10): 8, 10 << 3 | 1: 8,
    **dict.fromkeys((content_key(5), number_key(5), content_key(7), number_key(7), content_key(11), number_key(11)), 0),
}  # fmt: skip
_MOST_DIMS, _LARGEST_DIM = 16, 1 << 40


def read_tensor(data: bytes, at: int, end: int) -> tuple[str, Initializer]:
    """Reads a tensor's structure, none of its values: its name, and what it is.

    Args:
        data: of the file.
        at, end: where the tensor begins and ends.

    Raises:
        ValueError, IndexError: it is none, is larger than any, or could be read in two ways.
    """
    names, kinds, dims, entries, raw, typed = list[str](), list[int](), list[int](), dict[str, str](), 0, 0
    inside = number = (0, 0)
    elsewhere = 0
    for key, start, stop in fields(data, at, end):
        if key == _DIM:
            dims.append(start)
        elif key == _DIMS:
            dims += _variables(data, start, stop)
        elif key == _TYPE:
            kinds.append(start)
        elif key == _NAME:
            names.append(data[start:stop].decode("utf-8"))
        elif key == _RAW:
            inside, raw = (start, stop), raw + 1
        elif key == _EXTERNAL:
            _entry(data, start, stop, entries)
        elif key == _PLACE:
            elsewhere = start
        elif key in _VALUES:
            typed += _values(data, key, start, stop)
            number = (start, stop) if _VALUES[key] else (0, 0)
        elif key not in _REST:
            raise unknown_field("a tensor", key)
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
    if typed == 1 and number[1] - number[0] == nbytes:  # a single one stands there as it would in raw_data
        inside = number
    return name, Initializer(tuple(dims), nbytes, kinds[0], None, inside)


def _entry(data: bytes, at: int, end: int, entries: dict[str, str]) -> None:
    pair = ["", ""]
    for key, start, stop in fields(data, at, end):
        if key not in _PAIR:
            raise unknown_field("an entry", key)
        pair[_PAIR.index(key)] = data[start:stop].decode("utf-8")
    if pair[0] in entries:
        raise ValueError("an entry twice")
    entries[pair[0]] = pair[1]


def _values(data: bytes, key: int, at: int, end: int) -> int:
    """How many numbers a field of a tensor's values holds."""
    width = _VALUES[key]
    if width:
        return (end - at) // width
    if key & 7 == 0:
        return 1
    if end > at and data[end - 1] > 127:
        raise ValueError("a number runs past the end")
    return sum(byte < 128 for byte in data[at:end])


def _variables(data: bytes, at: int, end: int) -> list[int]:
    """A few numbers one behind another."""
    numbers = []
    if end - at > 10 * _MOST_DIMS:
        raise ValueError("a tensor of impossible dimensions")
    while at < end:
        number, at = read_variable(data, at)
        numbers.append(number)
    if at != end:
        raise ValueError("a number runs past the end")
    return numbers


def _count(text: str | None) -> int:
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise ValueError(f"external data offset or length {str(text)[:20]!r}")
    return int(text)
