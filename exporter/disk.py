"""Every change that an export makes on the disk, in one place, so that tests can stop it or fail it at each of them.

A change counts once it is durable: a file after `sync`, a name in a folder after `sync_folder`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

_BLOCK = 1 << 20
_NO_REPLACE, _EXCHANGE = 1, 2  # flags of Linux's renameat2
_AT_FDCWD = -100
# What the kernel, or a file system, says to a flag that it does not know.
_UNKNOWN_FLAG = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def about_to(operation: str, path: Path) -> None:
    """Called before each change. It does nothing; tests put their faults here."""


def make_folder(path: Path) -> None:
    """Makes a folder that must not exist."""
    about_to("make folder", path)
    path.mkdir()


def open_file(path: Path) -> int:
    """A descriptor of a file to read and write; made if it is not there."""
    about_to("open", path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def write_at(handle: int, data: memoryview, offset: int, path: Path) -> None:
    """Writes all of `data` at a place of an open file."""
    about_to("write", path)
    done = 0
    while done < data.nbytes:
        done += os.pwrite(handle, data[done:], offset + done)


def start_writing(handle: int, offset: int, length: int) -> None:
    """Lets the system begin to bring written bytes to the disk, so that `sync` has less to wait for."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_DONTNEED)


def read_at(handle: int, offset: int, length: int) -> Iterator[memoryview]:
    """The bytes at a place of an open file in pieces; fewer than `length` where the file ends before."""
    buffer = memoryview(bytearray(min(_BLOCK, length)))
    done = 0
    while done < length:
        count = os.preadv(handle, [buffer[: length - done]], offset + done)
        if not count:
            return
        done += count
        yield buffer[:count]


def truncate(handle: int, size: int, path: Path) -> None:
    """Gives an open file another length."""
    about_to("truncate", path)
    os.ftruncate(handle, size)


def sync(handle: int, path: Path) -> None:
    """Makes an open file's content durable."""
    about_to("sync", path)
    os.fsync(handle)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    about_to("sync folder", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Writes a whole file, over one that is there, and makes it durable."""
    handle = open_file(path)
    try:
        write_at(handle, memoryview(content), 0, path)
        truncate(handle, len(content), path)
        sync(handle, path)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Gives a file or folder another name, which nothing may have yet.

    Raises:
        FileExistsError: something has that name.
    """
    about_to("rename", target)
    if _rename_at(source, target, _NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False, and nothing is done, where the system cannot."""
    about_to("exchange", other)
    return _rename_at(one, other, _EXCHANGE)


def remove_file(path: Path) -> None:
    """Removes a file, if it is there."""
    about_to("remove", path)
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Removes a folder and what is in it, links themselves and not what they lead to."""
    for parent, folders, files in os.walk(path, topdown=False):
        for name in (*folders, *files):
            entry = Path(parent, name)
            if name in files or entry.is_symlink():
                remove_file(entry)
            else:
                _remove_folder(entry)
    _remove_folder(path)


def remove_strays(folder: Path, wanted: Collection[str]) -> None:
    """Removes what else is in a folder than `wanted`, paths of files with slashes, and in the folders they lie in."""
    homes = {name.rpartition("/")[0] for name in wanted} - {""}
    for entry in sorted(entry for home in ("", *homes) for entry in (folder / home).iterdir()):
        if entry.relative_to(folder).as_posix() not in {*wanted, *homes}:
            (remove_tree if entry.is_dir() and not entry.is_symlink() else remove_file)(entry)


def _remove_folder(path: Path) -> None:
    about_to("remove folder", path)
    with suppress(FileNotFoundError):
        path.rmdir()


def _rename_at(source: Path, target: Path, flag: int) -> bool:
    """Linux's renameat2, which Python does not offer; False where there is none or it does not know the flag."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN_FLAG:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
