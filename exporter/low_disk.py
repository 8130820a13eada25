"""Shards that come while the export runs: fetched by a thread, checked, read through a gate, and removed after use.

With a folder of our own (``--low-disk``) only few shards are on the disk at any time. Without one they go to the hub's
cache, in the order in which the writer needs them, as fast as they come. What the cache has already is read there and
never removed.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from exporter.hub import HubModel
from exporter.hub_errors import Stopped
from exporter.order import in_source_order, origin_of
from exporter.placeholders import same_header
from model.errors import CheckpointError, ResourceError
from model.memory import shown
from model.progress import Progress, beside

WHAT = "cannot get checkpoint"
LARGEST_STOCK = 4  # shards of ours on the disk at most: one being read, those around it, one still to come
_FAREWELL = 1.0  # seconds that the thread gets to notice the end

Stamp = tuple[int, int, int]


@dataclass
class _Shard:
    """One shard.

    `path` is where it is once it is here; it is `ours` if it lies in our folder. Nobody asks for it again once it is
    `done` with, or if somebody does, it is fetched again.
    """

    path: Path | None = None
    stamp: Stamp | None = None
    coming: bool = False
    ours: bool = False
    done: bool = False
    readers: int = 0
    waiting: int = 0
    failure: Exception | None = None


class ShardSupply:
    """Gives the bytes of a hub model's shards to whoever reads the placeholders.

    Args:
        model: with the files of a commit.
        placeholders: the folder of the placeholders.
        names: of the shards.
        folder: where to keep them while they are in use; None is the hub's cache, for good.
        progress: told how much arrived.
    """

    def __init__(
        self, model: HubModel, placeholders: Path, names: Iterable[str], folder: Path | None, progress: Progress
    ) -> None:
        assert model.files is not None
        self._model, self._placeholders, self._folder = model, placeholders, folder
        self._files = {name: model.files[name] for name in names}
        self._shards = {name: _Shard() for name in self._files}
        self._order: list[str] = []  # in which they are read, a name more than once if it is come back to
        self._position = 0
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._progress = beside(progress)

    @property
    def hashes(self) -> Mapping[str, str]:
        """Shard → sha256, as the hub states it; no byte of a shard is given out before it is checked."""
        return {name: file.sha256 for name, file in self._files.items()}

    def room(self, out: Path) -> int:
        """Bytes of shards that will come to the disk, at most at one time, on which `out` will be."""
        place, needed = self._needed()
        return needed if place.stat().st_dev == out.parent.stat().st_dev else 0

    def check_space(self) -> None:
        """Compares what will be on the disk of the shards at one time with the room there.

        Raises:
            ResourceError: naming both.
        """
        place, needed = self._needed()
        free = shutil.disk_usage(place).free
        if needed > free:
            why = f"{shown(needed)} are needed for its shards, {shown(free)} are free"
            less = "Free some space, or export with --low-disk" if self._folder is None else "Free some space"
            raise ResourceError(WHAT, self._model.id, why, less)

    def plan(self, models: Mapping[str, ir.Model]) -> None:
        """Learns the order in which the shards of these graphs will be read; from then on one is fetched ahead."""
        order: list[str] = []
        for model in models.values():
            for value in in_source_order(model.graph.initializers.values()):
                origin = origin_of(value.const_value)
                if origin is not None and origin[0] in self._shards and origin[0] not in order[-1:]:
                    order.append(origin[0])
        with self._change:
            self._order, self._position = order, 0
            self._change.notify_all()

    @contextmanager
    def gate(self, file: Path) -> Iterator[Path]:
        """Waits for a placeholder's shard, and gives its path for as long as it is read.

        Raises:
            CheckpointError: the shard is damaged, or changed since it was checked.
            EnvironmentFault, ResourceError: it cannot be fetched.
        """
        shard = self._shards.get(file.name)
        if shard is None:  # a file of git's, which is here as it is
            yield file
            return
        with self._change:
            self._move_to(file.name)
            shard.readers += 1
            try:
                path = self._wait_for(shard)
            except BaseException:
                shard.readers -= 1
                raise
        try:
            self._check_unchanged(file.name, shard)
            yield path
            self._check_unchanged(file.name, shard)
        finally:
            with self._change:
                shard.readers -= 1
                self._change.notify_all()

    def release(self, file: Path) -> None:
        """Removes a shard that nobody will read again, if it is ours."""
        with self._change:
            if file.name in self._shards:
                self._shards[file.name].done = True
                self._remove(file.name)
                self._change.notify_all()

    def close(self) -> None:
        """Ends the transfer that is going on; one that does not notice is left to the end of the process."""
        self._model.stopped.set()
        with self._change:
            self._change.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_FAREWELL)
        self._progress.finish()

    def _needed(self) -> tuple[Path, int]:
        """Where shards will be put, and the bytes that are not there yet."""
        absent = {name: file.size for name, file in self._files.items() if self._model.cached(name) is None}
        if self._folder is None:
            return self._model.snapshot, sum(absent.values())
        here = sum(size for name, size in absent.items() if (self._folder / name).exists())
        stock = sum(sorted(absent.values(), reverse=True)[:LARGEST_STOCK])
        return self._folder, max(0, stock - here)

    def _wait_for(self, shard: _Shard) -> Path:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shards", daemon=True)
            self._thread.start()
        shard.waiting += 1
        self._change.notify_all()
        try:
            while shard.path is None:
                if shard.failure is not None:
                    raise shard.failure
                self._change.wait()
            return shard.path
        finally:
            shard.waiting -= 1

    def _work(self) -> None:
        absent = [file.size for name, file in self._files.items() if self._model.cached(name) is None]
        if absent:
            self._progress.start("downloading weights", sum(absent), "bytes")
        while (name := self._take()) is not None:
            shard = self._shards[name]
            try:
                path = self._model.fetch(name, self._progress.advance, self._folder)
                if not same_header(self._placeholders / name, path):
                    why = "its header is not the one that the hub gave before"
                    raise CheckpointError(WHAT, name, why, "Export again")
                stamp = _stamp(path)
            except Stopped:
                return
            except Exception as failure:  # noqa: BLE001 - raised by the gate, in the thread that waits
                self._arrived(shard, None, None, failure)
            else:
                self._arrived(shard, path, stamp, None)

    def _arrived(self, shard: _Shard, path: Path | None, stamp: Stamp | None, failure: Exception | None) -> None:
        with self._change:
            shard.path, shard.stamp, shard.failure, shard.coming = path, stamp, failure, False
            shard.ours = path is not None and path.parent == self._folder
            self._change.notify_all()

    def _take(self) -> str | None:
        """The next shard to fetch, when there is one; None at the end."""
        with self._change:
            while not self._model.stopped.is_set():
                name = self._next()
                if name is not None:
                    self._shards[name].coming = True
                    return name
                self._change.wait()
        return None

    def _next(self) -> str | None:
        """A shard that somebody waits for, after making room; else the next of the order, where there is room."""
        absent = [name for name, shard in self._shards.items() if shard.path is None and shard.failure is None]
        awaited = next((name for name in absent if self._shards[name].waiting), None)
        if awaited is not None:
            self._make_room()
            return awaited
        for ahead, name in enumerate(self._order[self._position :]):
            if self._folder is not None and (ahead > 1 or len(self._stock()) >= LARGEST_STOCK):
                return None
            if name in absent and not self._shards[name].done:
                return name
        return None

    def _stock(self) -> list[str]:
        return [name for name, shard in self._shards.items() if shard.ours]

    def _make_room(self) -> None:
        """Removes shards until one more fits, those first that are needed again last; they are fetched again then."""
        later = self._order[self._position :]
        idle = [name for name in self._stock() if not self._shards[name].readers]
        idle.sort(key=lambda name: later.index(name) if name in later else len(later))
        while idle and len(self._stock()) >= LARGEST_STOCK:
            self._remove(idle.pop())

    def _remove(self, name: str) -> None:
        shard = self._shards[name]
        if shard.ours and shard.path is not None:
            with suppress(FileNotFoundError):
                shard.path.unlink()
            shard.path, shard.ours = None, False

    def _move_to(self, name: str) -> None:
        """Follows the reader through the order; several readers may be one shard apart."""
        around = self._order[max(0, self._position - 1) : self._position + 1]
        if name not in around and name in self._order[self._position :]:
            self._position = self._order.index(name, self._position)

    def _check_unchanged(self, name: str, shard: _Shard) -> None:
        if shard.path is not None and _stamp(shard.path) != shard.stamp:
            raise CheckpointError(WHAT, name, "the file changed during the export", "Export again")


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
