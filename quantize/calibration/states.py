"""The hidden states of all prompts between two steps, in a file: memory holds those of one prompt at a time.

Reading them again costs little, as the system keeps files that were just written in memory where there is room.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from exporter import disk
from quantize.scheme import Floats

_FLOAT = np.dtype("<f4")


class States:
    """float32 [rows, width] of every prompt, one after the other.

    Args:
        path: of the file.
        counts: rows of each prompt.
        width: of a row.
    """

    def __init__(self, path: Path, counts: Sequence[int], width: int) -> None:
        self.path, self.counts, self.width = path, tuple(counts), width
        self._starts = [0, *accumulate(self.counts)]
        self._handle = disk.open_file(path)
        self._hash = hashlib.sha256()
        self._next = 0

    def write(self, values: Floats) -> None:
        """Adds the rows of the next prompt."""
        index = self._next
        if values.shape != (self.counts[index], self.width):
            raise ValueError(f"prompt {index} has states {values.shape}, not {(self.counts[index], self.width)}")
        data = np.ascontiguousarray(values, _FLOAT).data.cast("B")
        disk.write_at(self._handle, data, self._starts[index] * self._row, self.path)
        self._hash.update(data)
        self._next = index + 1

    def read(self, index: int) -> Floats:
        """The rows of a prompt, float32 [rows, width]."""
        count = self.counts[index]
        values = np.empty((count, self.width), _FLOAT)
        view, done = values.data.cast("B"), 0
        for block in disk.read_at(self._handle, self._starts[index] * self._row, values.nbytes):
            view[done : done + len(block)] = block
            done += len(block)
        if done < values.nbytes:
            raise ValueError(f"{self.path.name} ends in prompt {index}")
        return values.astype(np.float32, copy=False)

    def seal(self) -> str:
        """Makes the whole file durable; its sha256."""
        size = self._starts[-1] * self._row
        if os.fstat(self._handle).st_size != size:  # what a killed run left behind
            disk.truncate(self._handle, size, self.path)
        disk.sync(self._handle, self.path)
        return self._hash.hexdigest()

    def holds(self, digest: str) -> bool:
        """Whether the file is what was sealed with this sha256."""
        found, size = hashlib.sha256(), self._starts[-1] * self._row
        if os.fstat(self._handle).st_size != size:
            return False
        for block in disk.read_at(self._handle, 0, size):
            found.update(block)
        return found.hexdigest() == digest

    def close(self) -> None:
        """Closes the file; a second time does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    @property
    def _row(self) -> int:
        return self.width * _FLOAT.itemsize
