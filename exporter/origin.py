"""The files a bundle is made from: their hashes, taken before anything is written, and whether they stay as they are.

A file that `stat` says is untouched (size, device, inode, both times) is trusted, any other is hashed again.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import CheckpointError, ExaoneError
from model.progress import Progress

if TYPE_CHECKING:  # they take their time to be imported
    import onnx_ir as ir

    from model.shards import Gate

Stamp = tuple[int, ...]
_BLOCK = 1 << 20
_PATIENCE = 0.05  # seconds between two looks at the thread that hashes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class SourceChanged(CheckpointError):
    """A source file has other content than when the export began: what was made of it is worth nothing."""


@dataclass(frozen=True)
class Feed:
    """A source whose files come and go, such as shards that are fetched when they are needed.

    Attributes:
        hashes: file name → sha256 of files that are not to be looked at here, because they may be absent.
        release: is told each path that no tensor will be read from any more, once what was read from it is durable.
        gate: gives the file behind a path for as long as it is read.
        plan: is told the graphs when everything is checked, before the first weight is read.
        room: bytes that will come to the disk of the bundle besides it.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    release: Callable[[Path], None] | None = None
    gate: Gate | None = None
    plan: Callable[[Mapping[str, ir.Model]], None] | None = None
    room: int = 0


class SourceFiles:
    """Hashes files in a background thread, and tells later whether they are still the same.

    Args:
        files: name → path.
        known: name → sha256 of files that are neither hashed nor looked at.
        remembered: name → stamp and sha256, as an earlier run saw them.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        known: Mapping[str, str] | None = None,
        remembered: Mapping[str, tuple[Stamp, str]] | None = None,
    ) -> None:
        self._known = dict(known or {})
        self._files = {name: path for name, path in sorted(files.items()) if name not in self._known}
        self.stamps = {name: _stamp(name, path) for name, path in self._files.items()}
        self._digests: dict[str, str] = {}
        for name, (stamp, digest) in (remembered or {}).items():
            if self.stamps.get(name) == stamp:
                self._digests[name] = digest
        self._todo = [name for name in self._files if name not in self._digests]
        self._done = 0
        self._failure: Exception | None = None
        self._waited = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._hash_all, name="source hashes", daemon=True)

    @contextmanager
    def hashing(self) -> Iterator[None]:
        """Hashes in the background from here on; what is not done at the end of the block is given up."""
        self._thread.start()
        try:
            yield
        finally:
            self._stopped.set()

    def digests(self, progress: Progress) -> dict[str, str]:
        """Name → sha256 of every file, in order of the names; waits for those that are not ready.

        Raises:
            CheckpointError: a file cannot be read.
        """
        if not self._waited:
            progress.start("hashing", sum(self.stamps[name][0] for name in self._todo), "bytes")
            shown, running = 0, True
            while running:
                self._thread.join(_PATIENCE)
                running = self._thread.is_alive()
                progress.advance(self._done - shown)
                shown = self._done
            progress.finish()
        self._waited = True
        if self._failure is not None:
            raise self._failure
        return dict(sorted((self._known | self._digests).items()))

    def confirm(self) -> None:
        """Looks at every file again, and hashes those that were touched.

        Raises:
            SourceChanged: one has other content now.
        """
        for name, path in self._files.items():
            try:
                stamp = _stamp(name, path)
                if stamp == self.stamps[name]:
                    continue
                same = self._hash(name, path) == self._digests[name]
            except CheckpointError:
                same = False
            if not same:
                raise _changed(name)
            self.stamps[name] = stamp

    def _hash_all(self) -> None:
        try:
            for name in self._todo:
                digest = self._hash(name, self._files[name])
                if self._stopped.is_set():
                    return
                if _stamp(name, self._files[name]) != self.stamps[name]:
                    raise _changed(name)  # what was read of it before may be older than its hash
                self._digests[name] = digest
        except Exception as failure:  # noqa: BLE001 - raised again by `digests`
            self._failure = failure

    def _hash(self, name: str, path: Path) -> str:
        digest = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as stream:
                block = memoryview(bytearray(_BLOCK))
                while (count := stream.readinto(block)) and not self._stopped.is_set():
                    digest.update(block[:count])
                    self._done += count
        except OSError as reason:
            raise _unreadable(name, reason) from None
        return digest.hexdigest()


def source_id(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """What a plain folder's checkpoint is called: where it says it comes from, else its type and a hash of its content.

    Args:
        config: content of config.json.
        digests: name → sha256 of its files.
    """
    origin = config.get("_name_or_path")
    if isinstance(origin, str) and _HUB_ID.fullmatch(origin):
        return origin
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    content = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{config.get('model_type', 'model')}-{content[:12]}"


def _stamp(name: str, path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as reason:
        raise _unreadable(name, reason) from None
    return status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _changed(name: str) -> SourceChanged:
    return SourceChanged("cannot export", name, "the file changed during the export", "Export again")


def _unreadable(name: str, reason: OSError) -> ExaoneError:
    return CheckpointError("cannot read source", name[:80], reason.strerror or "it cannot be read", "Check the file")
