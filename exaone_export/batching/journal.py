"""What is answered so far, beside the file that will have all answers: a line for each, durable before it counts.

A killed run leaves it behind; the same command goes on from it. A line counts if its own checksum holds, so half a line
at the end, or what the disk lost, is no line, and its request is answered again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from exporter import disk
from model.errors import UsageError, printable

_SUFFIX: Final = ".partial"
_NEXT: Final = ".unfinished"
_FORMAT: Final = 1
_CHECK: Final = 16  # hexadecimal digits of a line's checksum


def journal_path(out: Path) -> Path:
    """The journal of an output file."""
    return out.with_name(out.name + _SUFFIX)


class Journal:
    """The open journal of one output file.

    Args:
        out: the output.
        header: what the answers depend on, in words.
        force: begin anew where the journal was begun with something else.

    Attributes:
        done: number of a request's line → offset and length of its answer in the journal.

    Raises:
        UsageError: the journal was begun with something else.
    """

    def __init__(self, out: Path, header: Mapping[str, str], *, force: bool = False) -> None:
        self.out, self.path = out, journal_path(out)
        self.done: dict[int, tuple[int, int]] = {}
        fresh = not self.path.exists()
        self._handle = disk.open_file(self.path)
        try:
            self._end = 0 if fresh else self._read(dict(header), force=force)
            if not self._end:
                self.done.clear()
                disk.truncate(self._handle, 0, self.path)
                self._append(_line({"format": _FORMAT, "header": dict(header)}))
                disk.sync_folder(out.parent)
            else:
                disk.truncate(self._handle, self._end, self.path)
        except BaseException:
            self.close()
            raise

    def _read(self, header: dict[str, str], *, force: bool) -> int:
        """Takes in what is there; returns where it ends, 0 for nothing that can be used."""
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                record = _record(line)
                if record is None:
                    break
                if not end:
                    reason = _difference(record, header)
                    if reason and not force:
                        remedy = "Give the same command again, or --force to begin anew"
                        raise UsageError("cannot go on", self.path.name, reason, remedy)
                    if reason:
                        return 0
                elif isinstance(record.get("line"), int):
                    self.done[record["line"]] = end + _CHECK + 1, len(line) - _CHECK - 2
                end += len(line)
        return end

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds answers, each with its ``line``; they are durable when this returns."""
        begin = self._end
        text = b""
        for record in records:
            line = _line(record)
            self.done[int(record["line"])] = begin + len(text) + _CHECK + 1, len(line) - _CHECK - 2
            text += line
        self._append(text)

    def _append(self, text: bytes) -> None:
        disk.write_at(self._handle, memoryview(text), self._end, self.path)
        disk.sync(self._handle, self.path)
        self._end += len(text)

    def records(self) -> Iterator[dict[str, Any]]:
        """All answers, in the order of the requests."""
        for number in sorted(self.done):
            record: dict[str, Any] = json.loads(self._text(number))
            yield record

    def _text(self, number: int) -> bytes:
        offset, length = self.done[number]
        return b"".join(bytes(part) for part in disk.read_at(self._handle, offset, length))

    def finish(self) -> None:
        """Writes the output in order, at once as a whole, and removes the journal."""
        unfinished = self.out.with_name(self.out.name + _NEXT)
        handle = disk.open_file(unfinished)
        try:
            end = 0
            for number in sorted(self.done):
                text = self._text(number) + b"\n"
                disk.write_at(handle, memoryview(text), end, unfinished)
                end += len(text)
            disk.truncate(handle, end, unfinished)
            disk.sync(handle, unfinished)
        finally:
            os.close(handle)
        disk.about_to("rename", self.out)
        unfinished.replace(self.out)
        disk.sync_folder(self.out.parent)
        self.close()
        disk.remove_file(self.path)
        disk.sync_folder(self.out.parent)

    def close(self) -> None:
        """Closes the file, which stays."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


def _difference(record: Mapping[str, Any], header: Mapping[str, str]) -> str:
    """Why a journal with this first line cannot be gone on with; "" if it can."""
    old = record.get("header")
    if record.get("format") != _FORMAT or not isinstance(old, Mapping):
        return "it is of another version"
    names = [name for name in sorted(old.keys() | header.keys()) if old.get(name) != header.get(name)]
    return f"it was begun with another {printable(names[0], 40)}" if names else ""


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # half a pair of surrogates, as an id may have it
        text = json.dumps(record, allow_nan=False).encode()
    return hashlib.sha256(text).hexdigest()[:_CHECK].encode() + b" " + text + b"\n"


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None if it is not as it was written."""
    check, _, text = line.partition(b" ")
    text = text.removesuffix(b"\n")
    if not line.endswith(b"\n") or check != hashlib.sha256(text).hexdigest()[:_CHECK].encode():
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
