"""The staging folders beside an output folder: their names, who works in them, and what the dead left.

A folder whose process is dead is taken over by giving it a name of one's own: of two processes one succeeds. Its
owner is the file that bears its name, which is written before, so no folder is ever without its true owner.
"""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from exporter import disk, journal
from exporter.interrupt import surely
from exporter.journal import Header
from exporter.lock import Owner, short_name

BUNDLE = "bundle"
OLD = "old"
_LABEL = ".partial-"
_OWNER = "owner-"
_UUID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Partial:
    """A staging folder that a dead process left; `header` is None if its journal cannot be read."""

    folder: Path
    header: Header | None


def abandoned(out: Path, *, locks_hold: bool) -> list[Partial]:
    """What dead processes left beside an output folder whose lock this process has.

    Args:
        out: the output folder.
        locks_hold: whether the file system honours locks.
    """
    folders = [folder for folder in staging_folders(out) if _is_abandoned(folder, locks_hold=locks_hold)]
    return [Partial(folder, journal.read_header(folder / journal.FILE)) for folder in folders]


def staging_folders(out: Path) -> list[Path]:
    """All of them, of the living too."""
    prefix = _named(out, "").name
    try:
        names = [entry.name for entry in os.scandir(out.parent) if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    ours = [name for name in names if name.startswith(prefix) and _UUID.fullmatch(name.removeprefix(prefix))]
    return [out.with_name(name) for name in sorted(ours)]


def create(out: Path) -> Path:
    """A new staging folder of this process."""
    name = uuid.uuid4().hex
    folder = _named(out, name)
    try:
        disk.make_folder(folder)
        disk.write_file(folder / f"{_OWNER}{name}", Owner.current().dump())
        disk.make_folder(folder / BUNDLE)
    except BaseException:
        surely(lambda: remove(folder))
        raise
    return folder


def claim(partial: Partial, out: Path) -> Path | None:
    """Makes a dead process's staging folder ours; returns its new name, or None if another process was faster."""
    name = uuid.uuid4().hex
    folder = _named(out, name)
    try:
        disk.write_file(partial.folder / f"{_OWNER}{name}", Owner.current().dump())
        disk.rename(partial.folder, folder)
    except FileNotFoundError:
        return None
    if not (folder / BUNDLE).exists():
        disk.make_folder(folder / BUNDLE)
    return folder


def disown(folder: Path) -> None:
    """Lets the next export have it, even one of this process."""
    disk.remove_file(folder / f"{_OWNER}{_uuid_of(folder)}")


def size(folder: Path) -> int:
    """Bytes of all files in it."""
    total = 0
    for parent, _, files in os.walk(folder):
        total += sum(Path(parent, name).lstat().st_size for name in files)
    return total


def remove(folder: Path) -> None:
    """Removes a staging folder, the journal first: without it nobody goes on with the rest."""
    disk.remove_file(folder / journal.FILE)
    disk.remove_tree(folder)


def _is_abandoned(folder: Path, *, locks_hold: bool) -> bool:
    try:
        content = (folder / f"{_OWNER}{_uuid_of(folder)}").read_bytes()
    except OSError:
        content = b""
    owner = Owner.parse(content)
    runs = None if owner is None else owner.runs()
    # Whoever works in a staging folder holds the lock that is ours now.
    return locks_hold if runs is None else not runs


def _named(out: Path, name: str) -> Path:
    return out.with_name(f"{short_name(out.name, len(_LABEL) + 32)}{_LABEL}{name}")


def _uuid_of(folder: Path) -> str:
    return folder.name.rpartition("-")[2]
