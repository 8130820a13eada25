"""Keeps what a compiled library writes on stderr from the user, where its failure is told by an error of ours."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_STDERR: Final = 2
_LARGEST: Final = 1 << 20
_lock = threading.RLock()


@contextmanager
def stderr_held_back() -> Iterator[None]:
    """What the process writes on stderr meanwhile appears afterwards; if the block raises, not at all.

    Rust tells of a panic, with addresses and paths of the machine it was built on, before it becomes an exception.
    Some ten microseconds; one thread at a time.
    """
    with _lock:
        try:
            saved = os.dup(_STDERR)
        except OSError:  # there is none
            yield
            return
        held = _memory()
        try:
            os.dup2(held, _STDERR)
            try:
                yield
            finally:
                os.dup2(saved, _STDERR)
            os.lseek(held, 0, os.SEEK_SET)
            while piece := os.read(held, _LARGEST):
                os.write(_STDERR, piece)
        finally:
            os.close(held)
            os.close(saved)


def _memory() -> int:
    """A new file without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stderr", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
