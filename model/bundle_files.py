"""The files of a bundle: names that stay inside its folder, ordinary files and nothing else, and their hashes."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from model.errors import BundleError

PIECE = 1 << 20


def bundle_path(folder: Path, name: str) -> Path:
    """The path of a file the manifest or a graph names.

    Raises:
        BundleError: the name is not a plain relative path, or leads outside the folder.
    """

    def fail(why: str) -> BundleError:
        return BundleError("refusing bundle", repr(name[:80]), why, "Do not use this bundle")

    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or "\0" in name or ":" in name or ".." in parts:
        raise fail("a file name that leads outside the folder")
    path = folder / name
    try:
        leads_out = path.is_symlink() or not path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # too long, or half of a surrogate pair
        raise fail("a file name that no file can have") from None
    if leads_out:
        raise fail("a link that may lead outside the folder")
    return path


def ordinary_size(path: Path) -> int | str:
    """The size of an ordinary file, or what is wrong with what is there instead.

    A file with several names may be one of somebody's own: nothing tells that apart from a copy, so it is refused, as
    the onnx library refuses it. Opening a pipe would wait for ever, and devices never end.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return "the file is missing"
    except (OSError, ValueError) as reason:
        return getattr(reason, "strerror", None) or "the file cannot be found"
    if not stat.S_ISREG(status.st_mode):
        return "it is not an ordinary file"
    if status.st_nlink > 1:
        return "it is a hard link: a file elsewhere is the same one"
    return status.st_size


def file_sha256(
    path: Path,
    advance: Callable[[int], None] = lambda size: None,
    look: Callable[[int, memoryview], None] = lambda start, piece: None,
) -> str:
    """Hexadecimal sha256 of a file. A thread that reads ahead would gain nothing: copying is ten times as fast.

    Args:
        path: the file.
        advance: told the bytes of each piece.
        look: shown each piece, and where in the file it begins; all but the last are `PIECE` bytes.
    """
    digest, start, buffer = hashlib.sha256(), 0, memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as stream:
        while filled := stream.readinto(buffer):
            while filled < PIECE and (size := stream.readinto(buffer[filled:])):
                filled += size
            digest.update(buffer[:filled])
            look(start, buffer[:filled])
            advance(filled)
            start += filled
    return digest.hexdigest()
