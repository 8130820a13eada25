"""One export at a time to one folder: a lock file beside it, and who holds it.

The lock is flock's, which ends with its process however that dies; what the file says is for people, and for file
systems that do not honour flock. Those are found out by locking twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from exporter import disk
from exporter.interrupt import surely
from model.errors import LockedError, UsageError

WHAT = "cannot write bundle"
_SUFFIX = ".export-lock"
_LARGEST = 4096  # bytes of a lock or owner file that are read
LONGEST_NAME = 255  # bytes, on every usual file system


@dataclass(frozen=True)
class Owner:
    """A process, so that another one can tell whether it still runs.

    Attributes:
        pid: process id.
        start: when it started, in clock ticks since boot, as /proc says; "" where there is no /proc.
        host: the machine's name.
        boot: id of this run of the machine's kernel; "" where unknown.
        space: id of the process-id namespace (containers have their own); "" where unknown.
    """

    pid: int
    start: str
    host: str
    boot: str
    space: str

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        boot = _text(Path("/proc/sys/kernel/random/boot_id"))
        try:
            space = str(Path("/proc/self/ns/pid").readlink())
        except OSError:
            space = ""
        return cls(os.getpid(), _start_of(os.getpid()), platform.node(), boot, space)

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """What `dump` wrote; None for anything else, such as half of it."""
        try:
            raw = json.loads(content)
            owner = cls(**raw)
        except (ValueError, TypeError, RecursionError):
            return None
        texts = (owner.start, owner.host, owner.boot, owner.space)
        return owner if type(owner.pid) is int and all(isinstance(text, str) for text in texts) else None

    def dump(self) -> bytes:
        """JSON, one line."""
        return json.dumps(asdict(self), sort_keys=True).encode() + b"\n"

    def runs(self) -> bool | None:
        """Whether the process still runs; None where that cannot be seen from here."""
        here = Owner.current()
        if self.host == here.host and self.boot != here.boot:
            return False  # the machine was started anew
        if (self.boot, self.space) != (here.boot, here.space):
            return None
        if here.start:
            return self.start != "" and self.start == _start_of(self.pid)
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        return True


@contextmanager
def output_lock(out: Path) -> Iterator[bool]:
    """Holds the lock on an output folder; the lock file is removed at the end.

    Gives whether the file system honours locks, which proves that whoever had this one before is gone.

    Raises:
        LockedError: another process, or another thread of this one, holds it.
        OSError: the lock file cannot be made.
    """
    path = lock_path(out)
    handle = -1
    try:
        handle = _take(path, out)
        honoured = not _try_lock_again(path)
        holder = Owner.parse(os.pread(handle, _LARGEST, 0))
        if not honoured and holder is not None and holder.runs():
            raise _locked(out, holder)
        content = Owner.current().dump()
        disk.write_at(handle, memoryview(content), 0, path)
        disk.truncate(handle, len(content), path)
        yield honoured
    finally:
        surely(lambda: _remove_if_free(path, handle))


def refuse_if_locked(out: Path) -> None:
    """Raises LockedError if another process exports to `out` right now."""
    path = lock_path(out)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        if not _try_lock(handle):
            raise _locked(out, Owner.parse(os.pread(handle, _LARGEST, 0)))
    finally:
        os.close(handle)


def lock_path(out: Path) -> Path:
    """Where the lock of an output folder is."""
    return out.with_name(f".{short_name(out.name, len(_SUFFIX) + 1)}{_SUFFIX}")


def short_name(name: str, room: int) -> str:
    """The name itself, or its hash if `room` more bytes would make it longer than a file's name can be."""
    raw = os.fsencode(name)
    return name if len(raw) + room <= LONGEST_NAME else f"bundle-{hashlib.sha256(raw).hexdigest()[:16]}"


def _take(path: Path, out: Path) -> int:
    while True:
        handle = disk.open_file(path)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UsageError(WHAT, path.name[:80], "it is not an ordinary file", "Remove it")
            if not _try_lock(handle):
                raise _locked(out, Owner.parse(os.pread(handle, _LARGEST, 0)))
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it between our opening and our locking


def _remove_if_free(path: Path, handle: int) -> None:
    """Removes the lock file while it is locked by `handle`, or by nobody (-1: locking was interrupted)."""
    with suppress(OSError):
        own = handle if handle >= 0 else os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            holder = Owner.parse(os.pread(own, _LARGEST, 0))
            mine = holder is None or holder == Owner.current() or not holder.runs()
            # Who waits for this file, and gets the lock when it is gone, sees that it is.
            if mine and _try_lock(own) and _is_at(own, path):
                disk.remove_file(path)
        finally:
            os.close(own)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(handle: int) -> bool:
    """Whether the lock is ours now; also true where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, EOPNOTSUPP: not honoured, which `_try_lock_again` finds out
        return True
    return True


def _try_lock_again(path: Path) -> bool:
    """Whether a second descriptor gets the lock too, which means that locks are not honoured here."""
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _try_lock(handle)
    finally:
        os.close(handle)


def _locked(out: Path, holder: Owner | None) -> LockedError:
    who = "another process" if holder is None else f"process {holder.pid}"
    where = f" on {holder.host[:40]}" if holder is not None and holder.host != platform.node() else ""
    return LockedError(
        WHAT, out.name[:80], f"{who}{where} exports to it right now", "Wait until it is done, or choose another folder"
    )


def _start_of(pid: int) -> str:
    # The name, in parentheses, may hold anything; the start time is the 20th field behind it.
    fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
