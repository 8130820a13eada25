"""The machine's own speed of reading memory, as the roof that decoding runs under.

A decoded token reads every weight once and computes little with each (the roofline model: Williams, Waterman and
Patterson, 2009). The roof is measured by what has even less to do: `threads` threads stream through a buffer far
larger than the caches and OR its 64-bit words together, with numpy, which lets go of the interpreter's lock meanwhile.
That loop is vectorized, reads forward, and reaches what a core can draw from memory.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from model.memory import available_bytes

PASSES: Final = 4
_SMALLEST, _LARGEST = 32 << 20, 2 << 30
_USUAL_CACHE: Final = 64 << 20
_TIMES_THE_CACHE: Final = 16
_PIECE: Final = 1 << 25  # bytes at a time: with 2 MiB the interpreter costs a twentieth
_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class ReadBandwidth:
    """Measures again and again, with one buffer and one set of threads; a context manager.

    Args:
        threads: that read side by side.
        size: bytes of the buffer; None takes sixteen times the last cache, as far as a quarter of the free memory goes.
    """

    def __init__(self, threads: int, size: int | None = None) -> None:
        self.size = buffer_bytes() if size is None else size
        # Pages that were never written all map to one page of zeros, which stays in the cache.
        self._words: NDArray[np.int64] = np.ones(self.size // 8, np.int64)
        self._parts = np.array_split(self._words, threads)
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def measure(self, passes: int = PASSES) -> float:
        """Bytes per second of the fastest of `passes` passes over the buffer: what the memory gives undisturbed."""
        return max(self._one_pass() for _ in range(passes))

    def _one_pass(self) -> float:
        start = time.perf_counter()
        found = set(self._pool.map(_read, self._parts))
        took = time.perf_counter() - start
        if found != {1}:
            raise RuntimeError("the buffer does not hold what was written")
        return self._words.nbytes / took


def _read(words: NDArray[np.int64]) -> int:
    step, seen = _PIECE // 8, 1
    for start in range(0, len(words), step):
        seen |= int(np.bitwise_or.reduce(words[start : start + step]))
    return seen


def buffer_bytes() -> int:
    """Size of a buffer that the caches hold little of."""
    there = available_bytes()
    wanted = min(_LARGEST, _TIMES_THE_CACHE * last_cache_bytes())
    return wanted if there is None else max(_SMALLEST, min(wanted, there // 4))


def last_cache_bytes() -> int:
    """Size of the largest cache of the first core; 64 MiB where the system does not say."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        unit = _UNITS.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdecimal():
            sizes.append(int(digits) * unit)
    return max(sizes, default=_USUAL_CACHE)
