"""Whether numbers in a file are finite, at the speed at which the file can be read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

# ONNX's number of a type → unsigned integers as long, and the exponent's bits: all are set in NaN and infinity alone.
_EXPONENTS: Final[dict[int, tuple[npt.DTypeLike, int]]] = {
    1: (np.uint32, 0x7F80_0000), 10: (np.uint16, 0x7C00), 16: (np.uint16, 0x7F80), 11: (np.uint64, 0x7FF0 << 48),
}  # fmt: skip
FLOATS: Final = frozenset(_EXPONENTS)
_PIECE: Final = 1 << 18  # bytes, which stay in a core's cache


@dataclass(frozen=True)
class Extent:
    """Floats in a file: a tensor's name, the file, first byte, number of bytes, and ONNX's number of the type."""

    name: str
    path: Path
    offset: int
    length: int
    kind: int


class FiniteCheck:
    """Looks at floats of one type, piece by piece.

    Args:
        kind: ONNX's number of the type.
    """

    def __init__(self, kind: int) -> None:
        self._unsigned, exponent = _EXPONENTS[kind]
        self._exponent = np.array(exponent, self._unsigned)
        self.width = np.dtype(self._unsigned).itemsize

    def fails(self, piece: memoryview) -> bool:
        """Whether bytes hold NaN or an infinity; what is left over behind the last whole number is not looked at."""
        numbers = np.frombuffer(piece, self._unsigned, len(piece) // self.width)
        return bool((numbers & self._exponent).max(initial=0) == self._exponent)


def first_not_finite(extents: Iterable[Extent]) -> Extent | None:
    """The first tensor that holds NaN or an infinity, or is not all there. Raises OSError if a file cannot be read.

    Args:
        extents: those of one file next to one another.
    """
    buffer = memoryview(bytearray(_PIECE))
    for path, group in itertools.groupby(extents, key=lambda extent: extent.path):
        with path.open("rb", buffering=0) as stream:
            for extent in group:
                check, left = FiniteCheck(extent.kind), extent.length
                stream.seek(extent.offset)
                while left:
                    size = stream.readinto(buffer[: min(left, _PIECE)]) or 0
                    if size == 0 or size % check.width or check.fails(buffer[:size]):
                        return extent
                    left -= size
    return None


class FiniteWatch:
    """Looks at the floats of one file while somebody reads it from its beginning to its end.

    Args:
        extents: where they lie. They begin at multiples of their size.

    Attributes:
        bad: the first tensor that holds NaN or an infinity; "" for none so far.
    """

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._extents = sorted(extents, key=lambda extent: extent.offset)
        self._checks = {extent.kind: FiniteCheck(extent.kind) for extent in self._extents}
        self._next = 0
        self.bad = ""

    def __call__(self, start: int, piece: memoryview) -> None:
        """Is shown the piece of the file that begins at `start`; its length is a multiple of 8, but for the last."""
        end = start + len(piece)
        while self._next < len(self._extents) and not self.bad:
            extent = self._extents[self._next]
            stop = extent.offset + extent.length
            if extent.offset >= end:
                return
            part = piece[max(extent.offset, start) - start : min(stop, end) - start]
            for at in range(0, len(part), _PIECE):
                if self._checks[extent.kind].fails(part[at : at + _PIECE]):
                    self.bad = extent.name
            if stop > end:
                return
            self._next += 1
