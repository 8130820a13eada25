"""Counters that a worker and its parent share, so that nothing is lost when the worker is killed."""

from __future__ import annotations

import mmap
from enum import IntEnum, auto
from pathlib import Path

import numpy as np
import numpy.typing as npt

CODES = (2, 3, 4, 5, 6, 7, 8)


class Field(IntEnum):
    """Places in a row. `NEXT` is the index that runs, or is next; `STARTED_NS` is 0 where none runs."""

    NEXT = 0
    STARTED_NS = auto()
    MUTANTS = auto()
    ACCEPTED = auto()
    CRASHES = auto()
    HANGS = auto()
    WRONG = auto()
    SLOWEST_NS = auto()
    SLOWEST_INDEX = auto()
    CPU_US = auto()
    RSS_KIB = auto()
    DONE = auto()
    REFUSED = auto()  # and one more for each of CODES


class Status:
    """Rows of int64 in a file: one for each target.

    Args:
        path: created with zeros where it is not there.
        targets: number of rows.
    """

    def __init__(self, path: Path, targets: int) -> None:
        width = Field.REFUSED + len(CODES)
        if not path.exists():
            path.write_bytes(bytes(8 * width * targets))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.rows: npt.NDArray[np.int64] = np.frombuffer(self._map, np.int64).reshape(targets, width)

    def refused(self, target: int, code: int) -> None:
        """Counts a refusal."""
        self.rows[target, Field.REFUSED + CODES.index(code)] += 1
