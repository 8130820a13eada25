"""The header of a safetensors file: which tensors it has, and where their bytes lie.

The safetensors library checks it first. It takes a name that is given twice with the same range, so the header is
read once more here, strictly; and where the library refuses, this finds the tensor and the numbers to name.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from model.errors import CheckpointError, printable
from model.jsonfile import parse_json_object

WHAT = "cannot read checkpoint"
AGAIN = "Download or copy the file again"
# The format allows 100 MB. The largest EXAONE needs 0.2 MB; 4 MiB are 50,000 tensors, and 60 MB of memory.
LARGEST_HEADER = 4 << 20
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_Tensors = list[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `nbytes` bytes at `offset`, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> Iterator[Entry]:
    """The tensors of a safetensors file, in the header's order; their bytes tile the rest of the file exactly.

    Raises:
        CheckpointError: the file is damaged, with what is wrong in numbers.
    """
    try:
        size = path.stat().st_size
        length = _header_length(path, size)
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as reason:
        raise CheckpointError(WHAT, path.name, _explain(path, size, length, str(reason)), AGAIN) from None
    except OSError as reason:
        raise CheckpointError(WHAT, path.name, reason.strerror or "it cannot be opened") from None
    start = _LENGTH_BYTES + length
    for name, entry in _tensors(path, length):
        begin, end = entry["data_offsets"]
        yield Entry(name, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)


def _header_length(path: Path, size: int) -> int:
    if size < _LENGTH_BYTES:
        raise CheckpointError(WHAT, path.name, f"{size} bytes, too short for a safetensors header", AGAIN)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    if length == 0:
        raise CheckpointError(WHAT, path.name, "its header is empty", AGAIN)
    if length > size - _LENGTH_BYTES:
        why = f"its header should be {length} bytes long, but only {size - _LENGTH_BYTES} follow"
        raise CheckpointError(WHAT, path.name, why, AGAIN)
    if length > LARGEST_HEADER:
        raise CheckpointError(WHAT, path.name, f"a header of {length} bytes, more than the {LARGEST_HEADER} allowed")
    return length


def _tensors(path: Path, length: int) -> _Tensors:
    with path.open("rb") as stream:
        stream.seek(_LENGTH_BYTES)
        text = stream.read(length).decode("utf-8")
    header = parse_json_object(text, path.name, CheckpointError, WHAT)
    return [(name, entry) for name, entry in header.items() if name != _METADATA]


def _explain(path: Path, size: int, length: int, refusal: str) -> str:
    """What a refusal of the library means, with the tensor and the numbers that matter."""
    try:
        tensors = _tensors(path, length)
        why = _wrong_tensor(tensors) or _wrong_tiling(tensors, size, _LENGTH_BYTES + length)
    except CheckpointError as reason:
        why = f"its header: {reason.why}"
    except (UnicodeDecodeError, TypeError, ValueError, AttributeError, LookupError):
        why = None  # of another structure: the library's words must do
    short = refusal.removeprefix("Error while deserializing header: ")
    return why or f"not a sound safetensors file ({printable(short)})"


def _wrong_tensor(tensors: _Tensors) -> str | None:
    """What is wrong with the first tensor whose entry contradicts itself."""
    for raw, entry in tensors:
        name, dtype, shape, (begin, end) = printable(raw), entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _BITS:
            return f"{name} has values of the unknown type {printable(str(dtype), 40)}"
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            return f"{name} has a negative or fractional number in its shape or offsets"
        if end < begin:
            return f"{name} ends before it begins ({end} < {begin})"
        need = math.prod(shape) * _BITS[dtype]
        if need != 8 * (end - begin):
            means = f"shape {printable(str(shape), 60)} of {dtype}"
            return f"{name}: {means} takes {-(-need // 8)} bytes, its range has {end - begin}"
    return None


def _wrong_tiling(tensors: _Tensors, size: int, start: int) -> str | None:
    """Why the ranges do not follow each other from `start`, the end of the header, to the file's end at `size`."""
    reached, before = 0, "the header"
    for begin, end, raw in sorted((*entry["data_offsets"], name) for name, entry in tensors):
        name = printable(raw)
        if begin < reached:
            return f"the bytes of {name} overlap those of {before}"
        if begin > reached:
            return f"{begin - reached} bytes between {before} and {name} belong to no tensor"
        reached, before = end, name
    if start + reached == size:
        return None
    wrong = "cut short" if size < start + reached else "too long"
    return f"the file is {wrong}: {size} bytes, {start + reached} expected"
