"""A bundle appears whole or not at all: it is made in a folder beside its place and renamed at the end."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from exporter.write import sync
from model.bundle import MANIFEST
from model.errors import ResourceError, UsageError

WHAT = "cannot write bundle"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST_NAME = 255  # bytes, on every usual file system


def check_output(out: Path, source: Path, *, force: bool) -> None:
    """Refuses an output that exists (unless `force` and it is a bundle), or that overlaps with the source.

    Raises:
        UsageError: with what to do instead.
    """

    def refuse(why: str, remedy: str) -> UsageError:
        return UsageError(WHAT, out.name or str(out), why, remedy)

    try:
        target, origin = out.resolve(), source.resolve()
        out.is_symlink()
    except OSError as reason:
        raise _explain(reason, out) from reason
    if target == origin or target.is_relative_to(origin):
        raise refuse("it is the source folder or inside it", "Choose another folder")
    if origin.is_relative_to(target):
        raise refuse("the source folder is inside it", "Choose another folder")
    if out.is_symlink():
        raise refuse("it is a symbolic link", "Name a folder that does not exist yet")
    if not out.exists():
        parent = next(parent for parent in target.parents if parent.exists())
        if not parent.is_dir():
            raise refuse(f"{parent.name!r} above it is a file", "Choose another folder")
        return
    if not out.is_dir():
        raise refuse("it is a file", "Name a folder that does not exist yet")
    if not force:
        raise refuse("it exists already", "Choose another folder, or replace it with --force")
    if not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise refuse(
            "it is a folder with other things in it, not a bundle", "Only bundles are replaced; choose another"
        )


def check_space(folder: Path, needed: int) -> None:
    """Compares what will be written with the room on the disk.

    Raises:
        ResourceError: naming both.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        why = f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise ResourceError("not enough disk space", folder.parent.name or "/", why, "Free some space")


@contextmanager
def staging_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """Gives a new folder beside `out` which becomes `out` when the block ends well, and is removed when it does not.

    With `force` an existing `out` stays valid until the new one takes its place.

    Raises:
        ResourceError: the disk is full or a limit is reached.
        UsageError: `out` appeared meanwhile, or its folder cannot be written.
    """
    made = _make_parents(out)
    folder = _beside(out, "partial")
    try:
        folder.mkdir()
        yield folder
        sync(folder)
        _swap_in(folder, out, force=force)
        sync(out.parent)
    except BaseException as failure:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(failure, OSError):
            raise _explain(failure, out) from failure
        raise


def _make_parents(out: Path) -> list[Path]:
    """Creates the folders above `out`; returns those it made, innermost first."""
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise _explain(reason, out) from reason
    return missing


def _beside(out: Path, label: str) -> Path:
    suffix = f".{label}-{uuid.uuid4().hex[:8]}"
    fits = len(os.fsencode(out.name + suffix)) <= _LONGEST_NAME
    return out.with_name((out.name if fits else "bundle") + suffix)


def _swap_in(folder: Path, out: Path, *, force: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        folder.rename(out)
        return
    if not force:
        raise UsageError(WHAT, out.name, "it appeared while this export ran", "Choose another folder")
    old = _beside(out, "old")
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _explain(failure: OSError, out: Path) -> Exception:
    why = failure.strerror or type(failure).__name__
    if failure.errno in DISK_FULL:
        return ResourceError(WHAT, out.name[:80], why, "Free some space or choose another disk")
    if failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST):
        return UsageError(WHAT, out.name[:80], why, "Choose another folder")
    return failure
