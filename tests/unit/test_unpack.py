"""Layouts, word by word: every expected number was worked out by hand from the formats' own packers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.errors import CheckpointError, NumericalError
from model.shards import TensorRef, open_shards
from model.unpack import (
    AWQ_PLACES,
    ONES,
    PackedColumns,
    PackedInputs,
    PackedOutputs,
    PackedRows,
    Scales,
    SignedBytes,
    column_groups,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def stored(folder: Path, array: NDArray[Any]) -> TensorRef:
    save_file({"t": np.ascontiguousarray(array)}, folder / "model.safetensors")
    return open_shards(folder)[0]["t"]


def words(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.uint32).view(np.int32)


def test_rows_hold_their_first_value_in_the_lowest_bits(folder: Path) -> None:
    ref = stored(folder, words(0x76543210, 0xFEDCBA98, 0x00000000, 0x10000002).reshape(2, 2))
    read = PackedRows(ref, 4, 16).open()
    assert read(0, 2).tolist() == [list(range(16)), [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1]]
    assert read(1, 2)[0, 8] == 2
    assert PackedRows(ref, 8, 8).open()(0, 1).tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]


def test_the_last_word_of_a_row_may_be_partly_filled(folder: Path) -> None:
    ref = stored(folder, words(0x76543210, 0x00000A98).reshape(1, 2))
    assert PackedRows(ref, 4, 11).open()(0, 1).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]


def test_columns_hold_neighbouring_outputs_in_a_word(folder: Path) -> None:
    # Two groups, ten outputs: the second word of each group holds outputs 8 and 9.
    ref = stored(folder, words(0x76543210, 0xFFFFFFF1, 0x00000098, 0x00000032).reshape(2, 2))
    read = PackedColumns(ref, 4).open()
    assert read(0, 8).tolist() == [[0, 1], [1, 15], [2, 15], [3, 15], [4, 15], [5, 15], [6, 15], [7, 15]]
    assert read(8, 10).tolist() == [[8, 2], [9, 3]]
    assert PackedColumns(ref, 8).open()(3, 5).tolist() == [[0x76, 0xFF], [0x98, 0x32]]


def test_gptq_codes_are_packed_along_the_inputs(folder: Path) -> None:
    # [K / 8, N] = [2, 3]: output 0 has inputs 0..15 = 0..15, output 1 all 5, output 2 counts down.
    ref = stored(folder, words(0x76543210, 0x55555555, 0x89ABCDEF, 0xFEDCBA98, 0x55555555, 0x01234567).reshape(2, 3))
    read = PackedInputs(ref, 4).open()
    assert read(0, 3).tolist() == [list(range(16)), [5] * 16, list(range(15, -1, -1))]
    assert read(2, 3).tolist() == [list(range(15, -1, -1))]
    assert PackedInputs(ref, 8).open()(0, 1).tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]


@pytest.mark.parametrize(
    ("bits", "word", "expected"),
    [
        (4, 0x77777777, [8] * 8),  # symmetric
        (4, 0x654320FF, [0, 1, 2, 3, 4, 5, 6, 7]),  # 0x76543210 less 0x11111111: a zero borrows from its neighbour
        (4, 0xEEEEEEEE, [15] * 8),
        (4, 0xEEEEEEEF, [0] + [0] * 7),  # 0x00000000 less 0x11111111
        (8, 0x7F7F7F7F, [128] * 4),
        (8, 0xFEFEFEFF, [0] * 4),
        (8, 0x020100FF, [0, 2, 2, 3]),  # 0x03020200 less 0x01010101
    ],
)
def test_gptq_zero_points_of_the_first_format_are_one_too_small_word_by_word(
    folder: Path, bits: int, word: int, expected: list[int]
) -> None:
    ref = stored(folder, words(word, word).reshape(2, 1))
    found = PackedOutputs(ref, bits, add=ONES[bits]).open()(0, len(expected))
    assert found.T.tolist() == [expected] * 2
    assert PackedOutputs(ref, bits).open()(0, 1).tolist() == [[word & (1 << bits) - 1] * 2]


def test_awq_interleaves_the_outputs_of_a_word(folder: Path) -> None:
    # Outputs 0..7 with values 0..7: from_linear puts outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up.
    first, second = 0x75316420, 0xFDB9ECA8
    ref = stored(folder, words(first, second, second, first).reshape(2, 2))
    read = PackedOutputs(ref, 4, AWQ_PLACES).open()
    expected = [[j, (j + 8) % 16] for j in range(16)]
    assert read(0, 16).tolist() == expected
    for start, stop in ((0, 1), (3, 5), (5, 13), (8, 16), (15, 16), (4, 4)):
        assert read(start, stop).tolist() == expected[start:stop]


def test_signed_bytes_are_shifted_to_codes(folder: Path) -> None:
    ref = stored(folder, np.array([[-128, -1, 0, 127], [-8, -7, 6, 7]], np.int8))
    assert SignedBytes(ref, 8).open()(0, 2).tolist() == [[0, 127, 128, 255], [120, 121, 134, 135]]
    assert SignedBytes(ref, 4).open()(1, 2).tolist() == [[0, 1, 14, 15]]
    with pytest.raises(CheckpointError, match=r"t: a value outside -8\.\.7"):
        SignedBytes(ref, 4).open()(0, 1)
    one = stored(folder, np.array([3, -3], np.int8))
    assert SignedBytes(one, 8).open()(0, 2).tolist() == [[131], [125]]


def test_scales_of_every_type_and_shape(folder: Path) -> None:
    grid = np.array([[0.5, 1.5, -2.0], [4.0, 0.25, 8.0]], np.float32)
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16):
        ref = stored(folder, grid.astype(kind))
        assert Scales(ref).read().tolist() == grid.tolist()
        assert Scales(ref, transposed=True).read().tolist() == grid.T.tolist()
    assert Scales(stored(folder, np.array([1.5, 2.5], np.float32))).read().tolist() == [[1.5], [2.5]]
    assert Scales(stored(folder, np.array(0.75, np.float32))).read().tolist() == [[0.75]]
    powers = np.array([[127, 120], [130, 127]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    assert Scales(stored(folder, powers)).read().tolist() == [[1.0, 2.0**-7], [8.0, 1.0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_no_number_is_refused(folder: Path, bad: float) -> None:
    ref = stored(folder, np.array([[1, 2], [3, bad]], np.float16))
    with pytest.raises(NumericalError, match=r"t: 1 of its scales are NaN or infinite, the first at \[1, 1\]"):
        Scales(ref).read()


def test_groups_of_columns(folder: Path) -> None:
    assert column_groups(stored(folder, np.array([0, 2, 1, 2], np.int32)), 3) is not None
    assert column_groups(stored(folder, np.full(4, -1, np.int32)), 3) is None
    for bad in (3, -1):
        ref = stored(folder, np.array([0, 1, bad, 2], np.int64))
        with pytest.raises(CheckpointError, match=f"t: column 2 belongs to group {bad}, there are 3"):
            column_groups(ref, 3)
