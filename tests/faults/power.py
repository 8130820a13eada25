"""A disk that loses what nobody asked it to keep: exports are recorded, and the disk of a power cut is made from that.

What is durable: a file's content at its last `sync`, a name at its folder's last `sync_folder`. Of what came after, an
arbitrary part has arrived: the names that changed up to some moment, and of each file some of what was written.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from exporter import disk

Step = tuple[Any, ...]
_NAMES = {
    "make_folder": "make folder", "rename": "rename", "remove_file": "remove", "sync_folder": "sync folder",
    "_remove_folder": "remove folder",
}  # fmt: skip


@dataclass
class _File:
    """A file's content now and as it is durable, and the writings in between."""

    durable: bytes = b""
    since: list[Step] = field(default_factory=list)

    def content(self, draw: random.Random) -> bytes:
        """After a power cut: the durable content, with some of the writings since."""
        arrived = []
        for kind, at, *data in self.since[: draw.randint(0, len(self.since))]:
            if kind == "write":
                whole = data[0]
                data = [draw.choice((whole, whole, whole, bytes(len(whole)), whole[: len(whole) // 2]))]
            arrived.append((kind, at, *data))
        return _applied(self.durable, arrived)


class Recorder:
    """Records every change of the disk below a folder while an export runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[Step] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Puts itself around the functions of `exporter.disk`."""
        for name, kind in _NAMES.items():
            patch.setattr(disk, name, self._recorded(kind, getattr(disk, name)))
        opened, write, truncate, sync = disk.open_file, disk.write_at, disk.truncate, disk.sync

        def open_file(path: Path) -> int:
            if not path.exists():
                self.steps.append(("create", path))
            return opened(path)

        def write_at(handle: int, data: memoryview, offset: int, path: Path) -> None:
            write(handle, data, offset, path)
            self.steps.append(("write", path, offset, bytes(data)))

        def cut(handle: int, size: int, path: Path) -> None:
            truncate(handle, size, path)
            self.steps.append(("truncate", path, size))

        def synced(handle: int, path: Path) -> None:
            sync(handle, path)
            self.steps.append(("sync", path))

        replaced = {"open_file": open_file, "write_at": write_at, "truncate": cut, "sync": synced}
        for name, function in replaced.items():
            patch.setattr(disk, name, function)

    def _recorded(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*paths: Path) -> Any:
            result = function(*paths)
            self.steps.append((kind, *paths))
            return result

        return recorded


def after_power_cut(steps: list[Step], root: Path, target: Path, draw: random.Random) -> None:
    """Makes in `target` what is left of `root` when the power goes after `steps`.

    Args:
        steps: of a `Recorder` on `root`.
        root: the folder they were recorded on, empty then.
        target: an empty folder.
        draw: decides what of the undurable has arrived.
    """
    lasting = max((i for i, step in enumerate(steps) if step[0] == "sync folder"), default=-1)
    upto = draw.randint(lasting + 1, len(steps))
    names: dict[Path, _File | None] = {}  # None is a folder
    files: dict[Path, _File] = {}  # by the name it has when a step speaks of it
    for i, step in enumerate(steps):
        kind, path = step[0], step[1]
        if kind == "create":
            files[path] = _File()
        elif kind in ("write", "truncate"):
            files[path].since.append((kind, *step[2:]))
        elif kind == "sync":
            files[path].durable, files[path].since = _applied(files[path].durable, files[path].since), []
        elif kind == "rename":
            files |= {_moved(old, path, step[2]): file for old, file in list(files.items()) if _inside(old, path)}
        if i < upto:
            _apply(names, step, files)
    for path, file in sorted(names.items()):
        place = target / path.relative_to(root)
        if file is None:
            place.mkdir()
        else:
            place.write_bytes(file.content(draw))


def _apply(names: dict[Path, _File | None], step: Step, files: dict[Path, _File]) -> None:
    """What a step does to the names of files and folders."""
    kind, path = step[0], step[1]
    if kind == "create":
        names[path] = files[path]
    elif kind == "make folder":
        names[path] = None
    elif kind in ("remove", "remove folder"):
        names.pop(path, None)
    elif kind == "rename":
        for old in [name for name in names if _inside(name, path)]:
            names[_moved(old, path, step[2])] = names.pop(old)


def _applied(content: bytes, steps: list[Step]) -> bytes:
    result = bytearray(content)
    for kind, at, *data in steps:
        if kind == "truncate":
            del result[at:]
        result.extend(bytes(max(0, at - len(result))))
        if kind == "write":
            result[at : at + len(data[0])] = data[0]
    return bytes(result)


def _inside(path: Path, folder: Path) -> bool:
    return path == folder or path.is_relative_to(folder)


def _moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path != source else target
