"""libtiff's own messages kept off the terminal: what is wrong with a file is told in our errors, once."""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import cache
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_HANDLERS = ("TIFFSetErrorHandler", "TIFFSetWarningHandler", "TIFFSetErrorHandlerExt", "TIFFSetWarningHandlerExt")


@cache
def silence_libtiff() -> None:
    """Takes away what writes to stderr, of the library that Pillow has loaded; where it is not found, it goes on."""
    with contextlib.suppress(OSError, AttributeError):
        lines = os.fsdecode(_MAPS.read_bytes()).split("\n")  # with a bundle's files, whose names may be any bytes
        for path in {line.split(maxsplit=5)[5] for line in lines if "libtiff" in line.rpartition("/")[2]}:
            library = ctypes.CDLL(path)
            for name in _HANDLERS:
                handler = getattr(library, name)
                handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
                handler(None)
