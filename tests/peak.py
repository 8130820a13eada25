"""How much memory a piece of code takes at its highest, whatever this process has taken before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak_growth() -> Iterator[Callable[[], int]]:
    """Gives what tells the highest growth so far, in bytes; skips the test where the system does not tell it.

    `ru_maxrss` would not do: what an earlier test has taken hides what this one takes.
    """
    try:
        _RESET.write_text("5")  # forgets the largest size so far
    except OSError:
        pytest.skip("the system does not tell a process's largest size")
    before = _kib("VmRSS")
    yield lambda: (_kib("VmHWM") - before) << 10


def _kib(name: str) -> int:
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
