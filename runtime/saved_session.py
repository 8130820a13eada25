r"""A conversation in a file: its turns, what they showed, and its cache.

Layout: ``EXAONE-SESSION 1\n``, the length of a JSON header as 8 bytes (little endian), the header, then the pixels of
images and videos, then the cache's tensors, then that of each copy of its windows; at the end the sha256 of all before.
Sizes follow from the header and the bundle, never from numbers beside them, and must add up to the file's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from model.bundle import MANIFEST, file_sha256
from model.errors import DISK_FULL, BundleError, ExaoneError, ResourceError, UsageError, printable
from model.jsonfile import parse_json_object
from runtime.cache_state import CacheState, finite, parts_of, state_shapes
from runtime.graphs import Graphs
from runtime.media import MediaReader, Medium
from runtime.messages import Message, check_messages, check_tools, count_media
from runtime.reuse import KeptRow
from runtime.saved_media import described_keys, described_media, keys_of, media_of, pixels_of
from runtime.session import Array
from runtime.video import Clip

MAGIC: Final = b"EXAONE-SESSION 1\n"
_LARGEST_HEADER: Final = 64 << 20
_DIGEST: Final = 32
_PIECE: Final = 1 << 22
_WHAT: Final = "cannot load session"


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
        messages, tools: of the conversation.
        media: images and videos, scaled.
        row: with the cache; None where there is none.
    """

    messages: Sequence[Message]
    tools: list[Message] | None
    media: tuple[Medium, ...]
    row: KeptRow | None


def write_session(path: str | os.PathLike[str], graphs: Graphs, saved: Saved) -> None:
    """Writes a file that its owner alone may read, whole or not at all.

    Raises:
        UsageError: there is no such folder, or another thing than an ordinary file.
        ResourceError: it cannot be written.
    """
    row = saved.row if saved.row is not None and saved.row.keys and saved.row.whole else None
    header = {
        "bundle": file_sha256(graphs.folder / MANIFEST),
        "messages": saved.messages,
        "tools": saved.tools,
        "media": described_media(saved.media),
        "keys": None if row is None else described_keys(row.keys, saved.media),
        "copies": [] if row is None else [copy.length for copy in row.copies],
    }
    text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    with _faults(path), _replaced(Path(path)) as file:
        digest = hashlib.sha256()

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(MAGIC + len(text).to_bytes(8, "little") + text)
        for medium in saved.media:
            put(pixels_of(medium))
        for array in (
            [] if row is None else [*parts_of(row.cache), *(part for copy in row.copies for part in copy.arrays)]
        ):
            put(np.ascontiguousarray(array).data.cast("B"))
        file.write(digest.digest())


def read_session(
    path: str | os.PathLike[str], graphs: Graphs, media: MediaReader, new_row: Callable[[], KeptRow]
) -> Saved:
    """Reads what `write_session` wrote; whatever else a file is, it is refused.

    Args:
        path: the file.
        graphs: of the bundle with which it was written.
        media: the bundle's reader.
        new_row: makes an empty row.

    Raises:
        BundleError: it is no session, or is damaged.
        UsageError: it cannot be opened, or was written with another bundle.
        ResourceError: its cache does not fit into memory.
    """
    with _opened(Path(path)) as (file, size):
        reader = _Reader(file, size, Path(path).name)
        header = reader.header()
        if header.get("bundle") != file_sha256(graphs.folder / MANIFEST):
            why = "it was saved with another bundle"
            raise UsageError(_WHAT, reader.name, why, "Open the bundle with which it was saved")
        try:
            messages, tools, seen, keys = _parsed(header, reader, graphs, media)
        except ExaoneError as error:
            raise error if isinstance(error, BundleError) else reader.fault(f"{error.where}: {error.why}") from None
        row = None
        if keys is not None:
            row = new_row()
            lengths = _lengths(header.get("copies"), len(keys), reader)
            states = _states(row, [len(keys), *lengths], reader)
            reader.end()
            row.restore(keys, states[0], states[1:])
        else:
            reader.end()
    return Saved(messages, tools, seen, row)


def _parsed(
    header: Mapping[str, Any], reader: _Reader, graphs: Graphs, media: MediaReader
) -> tuple[list[Message], list[Message] | None, tuple[Medium, ...], list[Any] | None]:
    """Turns, tools, media and keys; all of them checked."""
    messages = check_messages(header.get("messages")) if header.get("messages") else []
    seen = media_of(header.get("media"), reader.take, media, reader.fault)
    videos = sum(isinstance(one, Clip) for one in seen)
    for kind, found in (("image", len(seen) - videos), ("video", videos)):
        if count_media(messages, kind) != found:
            raise reader.fault(f"{found} {kind}s, its turns have {count_media(messages, kind)}")
    keys = keys_of(header.get("keys"), seen, media, graphs.config.text.vocab_size, reader.fault)
    if keys is not None and not 0 < len(keys) <= graphs.context:
        raise reader.fault(f"{len(keys)} tokens, the model takes {graphs.context}")
    return messages, check_tools(header.get("tools")), seen, keys


def _lengths(value: Any, tokens: int, reader: _Reader) -> list[int]:
    """Of the copies of windows: rising, and not beyond the cache."""
    good = isinstance(value, list) and all(type(length) is int and 0 < length <= tokens for length in value)
    if not good or sorted(set(value)) != value:
        raise reader.fault("its copies of windows have no good lengths")
    return list(value)


def _states(row: KeptRow, lengths: Sequence[int], reader: _Reader) -> list[CacheState]:
    """The cache after `lengths[0]` tokens, and what windows held after the others."""
    shapes = [state_shapes(row.cache, length, windows_only=place > 0) for place, length in enumerate(lengths)]
    if not row.cache.layout.window_layers and len(lengths) > 1:
        raise reader.fault("it has copies of windows, and the model has none")
    needed = sum(math.prod(shape) * np.dtype(dtype).itemsize for one in shapes for shape, dtype in one)
    if needed != reader.left:
        raise reader.fault(f"{reader.left} bytes of cache, {needed} are expected")
    row.reserve(lengths[0])  # refused before anything is read
    states = []
    for length, one in zip(lengths, shapes, strict=True):
        arrays = tuple(reader.array(shape, dtype) for shape, dtype in one)
        if not all(map(finite, arrays)):
            raise reader.fault("NaN or Inf in its cache")
        states.append(CacheState(length, arrays))
    return states


class _Reader:
    """Reads a file from its beginning to its digest, and adds up the digest on the way."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.name = name
        self.left = size - _DIGEST
        self._file = file
        self._digest = hashlib.sha256()

    def fault(self, why: str) -> BundleError:
        return BundleError(_WHAT, self.name, why, "Use a file that was saved here, and is whole")

    def header(self) -> dict[str, Any]:
        if self.left < len(MAGIC) + 8 or self.take(len(MAGIC)) != MAGIC:
            raise self.fault("it is no saved session of this version")
        length = int.from_bytes(self.take(8), "little")
        if length > min(_LARGEST_HEADER, self.left):
            raise self.fault(f"its header is said to have {length} bytes")
        try:
            text = self.take(length).decode()
        except UnicodeDecodeError:
            raise self.fault("its header is not UTF-8") from None
        return parse_json_object(text, self.name, BundleError, _WHAT)

    def take(self, count: int) -> bytes:
        """The next bytes; `count` is compared with what is left before there is room for them."""
        self._count(count)
        data = self._file.read(count)
        self._hash(data, count)
        return data

    def array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """The next tensor."""
        array: Array = np.empty(shape, dtype)
        self._count(array.nbytes)
        view = array.data.cast("B") if array.nbytes else memoryview(b"")
        for start in range(0, array.nbytes, _PIECE):
            piece = view[start : start + _PIECE]
            self._hash(piece, self._file.readinto(piece))  # type: ignore[attr-defined]
        return array

    def end(self) -> None:
        """Compares the digest, where everything before it was read."""
        if self.left:
            raise self.fault(f"{self.left} bytes too many")
        if self._file.read(_DIGEST + 1) != self._digest.digest():
            raise self.fault("its sha256 is another: bytes have changed")

    def _count(self, count: int) -> None:
        if count > self.left:
            raise self.fault(f"it ends too early: {count} bytes wanted, {max(0, self.left)} are left")
        self.left -= count

    def _hash(self, data: bytes | memoryview, count: int) -> None:
        if len(data) != count:
            raise self.fault("it became shorter while it was read")
        self._digest.update(data)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """An ordinary file and its size; a pipe or a device would block, or never end."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as reason:
        why = getattr(reason, "strerror", None) or "not a usable file name"
        raise UsageError(_WHAT, printable(path.name), why, "Check its name") from None
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode):
        os.close(number)
        raise UsageError(_WHAT, path.name, "it is not an ordinary file", "Check its name")
    with os.fdopen(number, "rb") as file:
        yield file, status.st_size


@contextmanager
def _faults(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says in our words what is wrong with a place to write to."""
    shown, what = printable(os.fsdecode(path), 200), "cannot save session"
    try:
        target = Path(path)
        # Who replaces a device by a file takes it from everybody.
        if not target.name or "\0" in target.name or (os.path.lexists(target) and not target.is_file()):
            raise UsageError(what, shown, "it is not an ordinary file", "Name a file to make")
        yield
    except (FileNotFoundError, NotADirectoryError) as reason:
        raise UsageError(what, shown, reason.strerror or "no such folder", "Check its name") from None
    except OSError as reason:
        remedy = "Free some space or choose another folder" if reason.errno in DISK_FULL else "Check its permissions"
        raise ResourceError(what, shown, reason.strerror or str(reason), remedy) from None


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place when it is whole and on the disk."""
    beside = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    number = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(number)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
