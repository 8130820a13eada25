"""The journal of a bundle that is being written: what it is made from, and one line for each part that is durable.

A killed export leaves its staging folder behind; the next one reads this file, checks the parts' bytes against it and
goes on behind the last good one. A line counts if its own checksum holds, so half a line at the end is no line.
"""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exporter import disk

FILE = "journal.jsonl"
FORMAT = 1
_CHECK = 16  # hexadecimal digits of a line's checksum
_LARGEST = 64 << 20  # bytes; a thousand times that of the largest published model is 20 MB


@dataclass(frozen=True)
class Header:
    """What the bytes of a bundle depend on.

    Attributes:
        options: name of an option → its value in words.
        versions: library → version, this package included.
        source: file name → sha256.
        graphs: digest of the graphs' initializers, in order.
        stamps: file name → what `stat` said of it when it was hashed; no part of what is compared.
    """

    options: Mapping[str, str]
    versions: Mapping[str, str]
    source: Mapping[str, str]
    graphs: str
    stamps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def difference(self, new: Header) -> str:
        """Names the first thing in which `new` differs, as a sentence without full stop; "" if it is the same."""
        found = self.difference_in_options(new.options, new.versions) or self.difference_in_source(new.source)
        return found or ("" if self.graphs == new.graphs else "it was begun with other graphs")

    def difference_in_options(self, options: Mapping[str, str], versions: Mapping[str, str]) -> str:
        """The same for what is known before any work."""
        for old, now in ((self.options, options), (self.versions, versions)):
            # The target first: it decides about others that were left open.
            for name in sorted(old.keys() | now.keys(), key=lambda name: (name != "--target", name)):
                if old.get(name) != now.get(name):
                    return f"it was begun with {name} {old.get(name, 'absent')}, now it is {now.get(name, 'absent')}"
        return ""

    def difference_in_source(self, source: Mapping[str, str]) -> str:
        """The same for the files, once they are hashed."""
        for name in sorted(self.source.keys() | source.keys()):
            if self.source.get(name) != source.get(name):
                return f"it was begun with another {name[:80]} in the source"
        return ""


@dataclass(frozen=True)
class Tensor:
    """Where an initializer's bytes are: `length` bytes at `offset` of `file`, and their sha256."""

    name: str
    file: str
    offset: int
    length: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A part that is durable.

    Attributes:
        part: its name.
        tensors: the large ones; one that was stored before has an earlier place.
        small: initializer → bytes of those that go into the .onnx file.
    """

    part: str
    tensors: tuple[Tensor, ...] = ()
    small: Mapping[str, bytes] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        small = {name: b64encode(data).decode("ascii") for name, data in self.small.items()}
        return {"part": self.part, "tensors": [asdict(tensor) for tensor in self.tensors], "small": small}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Entry:
        """The inverse of `to_json`; its text is known to be what was written."""
        small = {name: b64decode(text) for name, text in raw["small"].items()}
        return cls(raw["part"], tuple(Tensor(**tensor) for tensor in raw["tensors"]), small)


class Journal:
    """The open journal of a staging folder: first the entries that an earlier run left are gone through in order.

    Args:
        path: of the file.
        header: of this run; the file has an equal one.
        lines: entries that the file has, each with the offset where its line begins.
        end: where the last of them ends.
    """

    def __init__(self, path: Path, header: Header, lines: list[tuple[int, Entry]], end: int) -> None:
        self.path, self.header = path, header
        self._lines, self._next, self._end = lines, 0, end
        self._handle = disk.open_file(path)

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """Starts a journal."""
        content = _line({"format": FORMAT} | asdict(header))
        disk.write_file(path, content)
        return cls(path, header, [], len(content))

    @classmethod
    def reopen(cls, path: Path) -> Journal | None:
        """Opens the journal of an earlier run; None if there is none that can be read."""
        found = _read(path)
        return None if found is None else cls(path, *found)

    def take(self, part: str) -> Entry | None:
        """The entry of the part that comes next, if it is that one."""
        if self._next < len(self._lines) and self._lines[self._next][1].part == part:
            self._next += 1
            return self._lines[self._next - 1][1]
        return None

    def reject(self) -> None:
        """Says that the entry taken last does not hold."""
        self._next -= 1

    def append(self, entry: Entry) -> None:
        """Adds a part; what an earlier run wrote from here on no longer counts."""
        if self._next < len(self._lines):
            self._end = self._lines[self._next][0]
            del self._lines[self._next :]
        content = _line(entry.to_json())
        if os.fstat(self._handle).st_size != self._end:  # half a line, or lines that no longer count
            disk.truncate(self._handle, self._end, self.path)
        disk.write_at(self._handle, memoryview(content), self._end, self.path)
        disk.sync(self._handle, self.path)
        self._end += len(content)

    def close(self) -> None:
        """Closes the file; a second time does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


def read_header(path: Path) -> Header | None:
    """The header of the journal at `path`; None if there is none that can be read."""
    found = _read(path)
    return None if found is None else found[0]


def read_last(path: Path) -> str:
    """Name of the last part in the journal at `path`; "" if there is none."""
    found = _read(path)
    return found[1][-1][1].part if found is not None and found[1] else ""


def _read(path: Path) -> tuple[Header, list[tuple[int, Entry]], int] | None:
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST)
    except OSError:
        return None
    first, offset = _parse(content, 0)
    if first is None or first.pop("format", None) != FORMAT:
        return None
    try:
        stamps = {name: tuple(stamp) for name, stamp in first.pop("stamps").items()}
        header = Header(**first, stamps=stamps)
        lines = []
        while (parsed := _parse(content, offset))[0] is not None:
            lines.append((offset, Entry.from_json(parsed[0])))
            offset = parsed[1]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # made by another version
    return header, lines, offset


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True).encode()
    return _checksum(text) + b" " + text + b"\n"


def _parse(content: bytes, start: int) -> tuple[dict[str, Any] | None, int]:
    """The value of the line at `start` and where the next one begins; None if it is no whole, sound line."""
    end = content.find(b"\n", start)
    check, _, text = content[start : max(end, start)].partition(b" ")
    if end < 0 or check != _checksum(text):
        return None, start
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a checksum that somebody has made to fit
        return None, start
    return (value if isinstance(value, dict) else None), end + 1


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_CHECK].encode("ascii")
