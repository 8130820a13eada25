"""Which libraries a shared library needs, read from the file: no loader, no tool (ELF, 64 bit, little endian)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, Final

_MAGIC: Final = b"\x7fELF\x02\x01"
_DYNAMIC: Final = 2  # PT_DYNAMIC
_LOAD: Final = 1  # PT_LOAD
_NEEDED, _STRINGS, _STRINGS_SIZE = 1, 5, 10  # DT_NEEDED, DT_STRTAB, DT_STRSZ
_LARGEST: Final = 1 << 24  # bytes of a table of strings that are still believed


def needed_libraries(path: Path) -> tuple[str, ...]:
    """The names of the libraries that the file says it needs, in its order; empty for what is no such file."""
    try:
        with path.open("rb") as stream:
            return _needed(stream)
    except (OSError, struct.error, ValueError):
        return ()


def _needed(stream: BinaryIO) -> tuple[str, ...]:
    header = stream.read(64)
    if not header.startswith(_MAGIC):
        return ()
    (at,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    segments = []
    for index in range(count):
        stream.seek(at + index * size)
        kind, _, offset, address, _, length = struct.unpack("<IIQQQQ", stream.read(40))
        segments.append((kind, offset, address, length))
    dynamic = next(((offset, length) for kind, offset, _, length in segments if kind == _DYNAMIC), None)
    if dynamic is None or dynamic[1] > _LARGEST:
        return ()
    stream.seek(dynamic[0])
    entries = list(struct.iter_unpack("<QQ", stream.read(dynamic[1] // 16 * 16)))
    values = dict(entries)
    if _STRINGS not in values or not 0 < values.get(_STRINGS_SIZE, 0) <= _LARGEST:
        return ()
    address = values[_STRINGS]
    place = next((address - a + o for kind, o, a, length in segments if kind == _LOAD and a <= address < a + length), 0)
    stream.seek(place)
    strings = stream.read(values[_STRINGS_SIZE])
    return tuple(_text(strings, value) for tag, value in entries if tag == _NEEDED)


def _text(strings: bytes, at: int) -> str:
    end = strings.index(b"\0", at)
    return strings[at:end].decode("utf-8", "replace")
