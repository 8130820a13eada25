"""Huge pages for weights that ONNX Runtime packs as it opens a graph.

Every token reads all weights, and in pages of 4 KiB a tenth of that is looking addresses up. Linux gives pages of
2 MiB to who asks (transparent huge pages, "madvise"), but ONNX Runtime takes its memory from malloc, and glibc asks
only where the process was started with GLIBC_TUNABLES=glibc.malloc.hugetlb=1. So here malloc is given, before a graph
is opened, one stretch of address space that is marked for huge pages, and is kept from mapping anything elsewhere until
it is open. What other threads take comes from heaps of their own, which are looked for and marked as they appear. Pages
that were not used are given back. Where any of this is not to be had, nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from runtime.freed import give_back_freed
from runtime.meanwhile import meanwhile

SWITCH: Final = "EXAONE_EXPORT_HUGE_PAGES"  # environment variable: 0 leaves malloc alone
LEAST: Final = 64 << 20  # bytes of weights below which it is not worth it

_SETTINGS: Final = Path("/sys/kernel/mm/transparent_hugepage")
_PAGE: Final = 2 << 20
_SLACK: Final = (5, 4)  # packed weights are a little larger than stored ones, and the graph itself needs room
_ADVICE: Final = 14  # MADV_HUGEPAGE
_HEAP: Final = 64 << 20  # size and alignment of a heap that is not the main one
_INTERVAL_S: Final = 0.01
# Parameters of mallopt. Those it had cannot be asked for; afterwards they are what glibc's own adaptation ends with.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
# Nothing is mapped or given back, and a heap is opened as a whole: what grows piece by piece gets small pages.
_MEANWHILE: Final = {_TRIM_THRESHOLD: -1, _TOP_PAD: _HEAP, _MMAP_MAX: 0}
_AFTERWARDS: Final = {_TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}

_one_at_a_time = threading.Lock()
_used = threading.Event()


@contextmanager
def huge_pages(size: int) -> Iterator[None]:
    """Makes what is allocated in this block lie in huge pages, as far as the system can.

    Args:
        size: bytes of weights that will be packed.
    """
    libc = _libc()
    if libc is None or size < LEAST or not _one_at_a_time.acquire(blocking=False):
        yield
        return
    try:
        _used.set()
        for parameter, value in _MEANWHILE.items():
            libc.mallopt(parameter, value)
        _reserve(libc, size * _SLACK[0] // _SLACK[1])
        with meanwhile(_Marker(libc).mark, _INTERVAL_S):
            yield
    finally:
        for parameter, value in _AFTERWARDS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
        _one_at_a_time.release()


def give_back() -> None:
    """Returns memory that was freed to the system; call it when graphs have been closed."""
    if _used.is_set():
        give_back_freed()


def _reserve(libc: Any, size: int) -> None:
    """Lets the main heap grow by untouched memory, marked for huge pages."""
    before = libc.sbrk(0)
    libc.free(libc.malloc(size))
    grown = libc.sbrk(0) - before
    if grown > 0:
        libc.madvise(before, grown, _ADVICE)


class _Marker:
    """Marks heaps of other threads that were not there at first."""

    def __init__(self, libc: Any) -> None:
        self._libc, self._known = libc, set(_heaps())

    def mark(self) -> None:
        """Marks those that have come since the last time."""
        for start in set(_heaps()) - self._known:
            self._known.add(start)
            self._libc.madvise(start, _HEAP, _ADVICE)


def _heaps() -> Iterator[int]:
    """Where anonymous memory begins that looks like a heap."""
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        place, _, rest = line.partition(b" ")
        start = int(place.partition(b"-")[0], 16)
        if start % _HEAP == 0 and rest.startswith(b"rw-p") and len(rest.split()) == 4:  # no file, no name
            yield start


@cache
def _libc() -> Any:
    """The C library, or None where there are no huge pages to be had or malloc is not glibc's."""
    if sys.platform != "linux" or os.environ.get(SWITCH) == "0" or not _offered() or _limited():
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_size_t, [ctypes.c_ssize_t]
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.mallopt.argtypes, libc.malloc_trim.argtypes = [ctypes.c_int, ctypes.c_int], [ctypes.c_size_t]
    except (OSError, AttributeError):
        return None
    return libc


def _offered() -> bool:
    try:
        enabled = (_SETTINGS / "enabled").read_text()
        size = int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return False
    return "[never]" not in enabled and size == _PAGE


def _limited() -> bool:
    """Whether address space is counted, so that reserving some could take it from others."""
    import resource

    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    if any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds):
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return True
