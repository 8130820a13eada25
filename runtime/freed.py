"""Memory that was freed, and that malloc keeps for later."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def give_back_freed() -> None:
    """Returns freed memory to the system; takes milliseconds. Does nothing where malloc is not glibc's.

    glibc gives every thread a heap, and what several threads have freed lies in pieces between what is in use: as much
    as all of them ever held together may stay with the process.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    if sys.platform != "linux":
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    trim.argtypes = [ctypes.c_size_t]
    return trim
