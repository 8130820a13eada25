from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quantize.pack import dequantize, pack_codes, packed_shapes, unpack_codes
from quantize.scheme import BLOCK_SIZES, Codes, Quantized, Scheme

SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=33)


def code_arrays(largest: int) -> st.SearchStrategy[Codes]:
    return arrays.arrays(np.uint8, SHAPES, elements=st.integers(0, largest))


@given(code_arrays(15))
def test_four_bits_round_trip(codes: Codes) -> None:
    packed = pack_codes(codes, 4)
    assert packed.shape == (*codes.shape[:-1], -(-codes.shape[-1] // 2))
    np.testing.assert_array_equal(unpack_codes(packed, 4, codes.shape[-1]), codes)


@given(code_arrays(255))
def test_eight_bits_round_trip(codes: Codes) -> None:
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, 8), 8, codes.shape[-1]), codes)


def test_the_first_code_lies_in_the_low_half() -> None:
    assert pack_codes(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]


def test_packs_what_is_not_contiguous() -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(8, 8) % 16
    np.testing.assert_array_equal(pack_codes(codes.T, 4), pack_codes(codes.T.copy(), 4))


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 600),
    bits=st.sampled_from((4, 8)),
    size=st.sampled_from(BLOCK_SIZES),
    symmetric=st.booleans(),
)
def test_shapes_are_those_of_the_parts(rows: int, columns: int, bits: int, size: int, symmetric: bool) -> None:
    shapes = packed_shapes(rows, columns, Scheme(bits, size, symmetric))
    blocks = -(-columns // size)
    codes = np.zeros((rows, blocks, size), np.uint8)
    assert shapes["codes"] == pack_codes(codes, bits).shape
    assert shapes["scales"] == (rows, blocks)
    assert shapes.get("zero_points") == (None if symmetric else pack_codes(codes[:, :, 0], bits).shape)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize(bits: int) -> None:
    middle = 1 << (bits - 1)
    codes = np.array([[[middle, middle + 2]], [[0, middle]]], np.uint8)
    scales = np.array([[0.5], [-2]], np.float32)
    symmetric = dequantize(Quantized(codes, scales, None), Scheme(bits), 2)
    assert symmetric.tolist() == [[0, 1], [2 * middle, 0]]
    assert symmetric.dtype == np.float32
    zero_points = np.array([[1], [0]], np.uint8)
    shifted = dequantize(Quantized(codes, scales, zero_points), Scheme(bits, symmetric=False), 1)
    assert shifted.tolist() == [[(middle - 1) / 2], [0]]
