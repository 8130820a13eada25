"""Whether a bundle can be written where it is asked for, and what it means if it cannot."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from exporter.lock import WHAT
from model.bundle import MANIFEST
from model.errors import DISK_FULL, ResourceError, UsageError
from model.memory import shown

_ANOTHER = "Choose another folder"
_USAGE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTEMPTY,
    errno.ELOOP,
)  # fmt: skip


def check_output(out: Path, source: Path, *, force: bool) -> None:
    """Refuses an output that exists (unless `force` and it is a bundle), or that overlaps with the source.

    Raises:
        UsageError: with what to do instead.
    """

    def refuse(why: str, remedy: str) -> UsageError:
        return UsageError(WHAT, out.name[:80] or str(out), why, remedy)

    try:
        target, origin = out.resolve(), source.resolve()
        out.is_symlink()
    except OSError as reason:
        raise explain(reason, out) from reason
    except RuntimeError:  # pathlib's answer to links in a circle
        raise refuse("it, or the source, is a link that leads back to itself", _ANOTHER) from None
    if out.name in ("", ".."):
        raise refuse("it is not named", "Give the folder's own name")
    if target == origin or target.is_relative_to(origin):
        raise refuse("it is the source folder or inside it", _ANOTHER)
    if origin.is_relative_to(target):
        raise refuse("the source folder is inside it", _ANOTHER)
    if out.is_symlink():
        raise refuse("it is a symbolic link", "Name a folder that does not exist yet")
    if not out.exists():
        parent = next(parent for parent in target.parents if parent.exists())
        if not parent.is_dir():
            raise refuse(f"{parent.name!r} above it is a file", _ANOTHER)
        return
    if not out.is_dir():
        raise refuse("it is a file", "Name a folder that does not exist yet")
    if not force:
        raise refuse("it exists already", "Choose another folder, or replace it with --force")
    if not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise refuse(
            "it is a folder with other things in it, not a bundle", "Only bundles are replaced; choose another"
        )


def check_space(out: Path, needed: int, present: int = 0) -> None:
    """Compares what will be written with the room on the disk.

    Args:
        out: the folder to make; the one above it exists.
        needed: bytes of the whole bundle.
        present: bytes of it that are on the disk already.

    Raises:
        ResourceError: naming both.
    """
    free = shutil.disk_usage(out.parent).free
    if needed > free + present:
        raise ResourceError(
            "not enough disk space", out.name[:80],
            f"{shown(needed - present)} are needed, {shown(free)} are free", "Free some space",
        )  # fmt: skip


def make_parents(out: Path) -> list[Path]:
    """Creates the folders above `out`; returns those it made, innermost first."""
    missing = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def explain(failure: OSError, out: Path, needed: int = 0) -> Exception:
    """What a failure to write `out` means to the user; failures that are about something else stay as they are.

    Args:
        failure: what the system said.
        out: the folder to make.
        needed: bytes of the whole bundle; 0 where not known yet.
    """
    why = failure.strerror or type(failure).__name__
    if failure.errno in DISK_FULL:
        return ResourceError(
            WHAT, out.name[:80], f"{why}{_room(failure, out, needed)}", "Free some space or choose another disk"
        )
    if failure.errno in _USAGE and _is_about(failure, out):
        return UsageError(WHAT, out.name[:80], why, _ANOTHER)
    return failure


def _room(failure: OSError, out: Path, needed: int) -> str:
    """Need and room, as far as known."""
    if not needed:
        return ""
    need = f" ({shown(needed)} are needed in all, "
    if failure.errno == errno.EFBIG:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return f"{need}one file may hold {shown(limit)})" if limit != resource.RLIM_INFINITY else ""
    try:
        free = shutil.disk_usage(out.parent).free
    except OSError:
        return ""
    return f"{need}{shown(free)} are free without what was written)"


def _is_about(failure: OSError, out: Path) -> bool:
    """Whether the failure is about the output folder, its staging or its lock: those lie side by side."""
    if not isinstance(failure.filename, str | bytes):
        return True
    path = Path(os.fsdecode(failure.filename))
    if path == out.parent or not path.is_relative_to(out.parent):
        return path == out.parent
    entry = path.relative_to(out.parent).parts[0]
    return entry == out.name or ".partial-" in entry or entry.endswith(".export-lock")
