"""Memory of an NVIDIA GPU, asked of its driver: no library of CUDA's is needed for that."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from runtime.meanwhile import meanwhile

_DRIVERS: Final = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
_INTERVAL_S: Final = 0.02


def device_memory(device: int = 0) -> tuple[int, int] | None:
    """Free and total bytes of a GPU, numbered as CUDA numbers them; None without a driver, or such a GPU."""
    context = _context(device)
    if context is None:
        return None
    driver, handle = context
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuCtxPushCurrent_v2(handle):
        return None
    failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    return None if failed else (free.value, total.value)


def free_bytes(device: int = 0) -> int | None:
    """Free bytes of a GPU; None where nobody can tell."""
    found = device_memory(device)
    return None if found is None else found[0]


@dataclass
class Peak:
    """The most that was taken of a GPU while somebody watched, by all processes together; None where unknown."""

    bytes: int | None = None


@contextmanager
def watched_peak(device: int = 0) -> Iterator[Peak]:
    """Watches how much of a GPU is taken until the block ends; looks fifty times a second."""
    peak = Peak()

    def look() -> None:
        found = device_memory(device)
        if found is not None:
            peak.bytes = max(peak.bytes or 0, found[1] - found[0])

    look()
    with meanwhile(look, _INTERVAL_S):
        yield peak
    look()


@cache
def _context(device: int) -> tuple[Any, ctypes.c_void_p] | None:
    """The driver, and the context of a GPU that everything in this process shares; it is kept to the end."""
    driver = _driver()
    if driver is None or driver.cuInit(0):
        return None
    handle, place = ctypes.c_void_p(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(place), device):
        return None
    return None if driver.cuDevicePrimaryCtxRetain(ctypes.byref(handle), place) else (driver, handle)


def _driver() -> Any:
    for name in _DRIVERS:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
