"""NaN and infinities are found in files wherever they lie, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.bundle_files import PIECE, file_sha256
from runtime.finite import Extent, FiniteWatch, first_not_finite

FLOAT, HALF, BRAIN, DOUBLE = 1, 10, 16, 11
# The bits of the largest finite number, of the smallest, of minus zero, and of four that are none.
BITS: dict[int, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    FLOAT: (np.uint32, (0x7F7F_FFFF, 1, 1 << 31), (0x7F80_0000, 0xFF80_0000, 0x7F80_0001, 0xFFC0_0000)),
    HALF: (np.uint16, (0x7BFF, 1, 1 << 15), (0x7C00, 0xFC00, 0x7C01, 0xFE00)),
    BRAIN: (np.uint16, (0x7F7F, 1, 1 << 15), (0x7F80, 0xFF80, 0x7F81, 0xFFC0)),
    DOUBLE: (np.uint64, ((0x7FF << 52) - 1, 1, 1 << 63), (0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1, 0xFFF8 << 48)),
}


def watched(path: Path, extents: list[Extent]) -> str:
    """What is found while a file is hashed."""
    watch = FiniteWatch(extents)
    file_sha256(path, look=watch)
    return watch.bad


@pytest.mark.parametrize("kind", BITS)
def test_every_kind_of_number_that_is_none(tmp_path: Path, kind: int) -> None:
    unsigned, finite, not_finite = BITS[kind]
    path, count = tmp_path / "x", 3 * PIECE // np.dtype(unsigned).itemsize
    numbers = np.resize(np.array(finite, unsigned), count)
    path.write_bytes(numbers.tobytes())
    extent = Extent("x", path, 0, numbers.nbytes, kind)
    assert first_not_finite([extent]) is None
    assert watched(path, [extent]) == ""
    for bits in not_finite:
        for place in (0, count // 2, count - 1):
            spoiled = numbers.copy()
            spoiled[place] = bits
            path.write_bytes(spoiled.tobytes())
            assert first_not_finite([extent]) is extent
            assert watched(path, [extent]) == "x"


def test_only_what_is_asked_for_is_looked_at(tmp_path: Path) -> None:
    """Tensors lie apart, across pieces and next to one another; NaN between them is somebody else's."""
    path, size = tmp_path / "x", PIECE // 4
    numbers = np.full(4 * size, np.nan, np.float32)
    ranges = {"a": (16, 100), "b": (100, size + 64), "c": (2 * size - 16, 2 * size + 16), "d": (4 * size - 4, 4 * size)}
    for start, stop in ranges.values():
        numbers[start:stop] = 1
    extents = [Extent(name, path, 4 * start, 4 * (stop - start), FLOAT) for name, (start, stop) in ranges.items()]
    path.write_bytes(numbers.tobytes())
    assert first_not_finite(extents) is None
    assert watched(path, extents[::-1]) == ""
    for name, (start, stop) in ranges.items():
        for place in (start, stop - 1):
            spoiled = numbers.copy()
            spoiled[place] = np.inf
            path.write_bytes(spoiled.tobytes())
            found = first_not_finite(extents)
            assert found is not None
            assert found.name == watched(path, extents) == name


def test_a_tensor_that_is_not_all_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10))
    assert first_not_finite([Extent("x", path, 0, 12, FLOAT)]) is not None
    assert first_not_finite([Extent("x", path, 20, 4, FLOAT)]) is not None
    assert watched(path, [Extent("x", path, 0, 12, FLOAT)]) == ""  # its length is for others to tell
