"""Whole numbers and scales of quantized weights, unpacked from the layouts that checkpoints store them in.

Every reader gives a matrix [outputs, n] row by row, whatever the stored orientation is: codes have n = inputs, scales
and zero points n = groups. Words are little-endian int32; "low first" means that the first of the values in a word is
in its lowest bits.

    PackedRows      [outputs, inputs / w]   low first   compressed-tensors weight_packed
    PackedColumns   [outputs / w, groups]   low first   compressed-tensors weight_zero_point
    PackedInputs    [inputs / w, outputs]   low first   GPTQ qweight
    PackedOutputs   [n, outputs / w]        any order   GPTQ qzeros; AutoAWQ qweight and qzeros
    SignedBytes     [outputs, n] int8                   compressed-tensors int-quantized

with w = 32 / bits values in a word. References, read for the layouts: compressed-tensors'
compressors/pack_quantized (pack_to_int32), AutoGPTQ's qlinear_cuda (pack), GPTQModel's utils/model
(convert_gptq_v1_to_v2_format_module), AutoAWQ's modules/linear/gemm (from_linear) and utils/packing_utils.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.errors import CheckpointError, NumericalError
from model.shards import WHAT, TensorRef

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]
CodeReader = Callable[[int, int], Codes]
WORD = 32

# AutoAWQ's from_linear puts output 8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[i] into bits 4i..4i + 3, so outputs 0..7 of a
# word are found at places:
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# One in every field of a word: GPTQ's first format takes it from packed zero points when it saves them, borrows
# running on from field to field, and adding it to the word takes it back.
ONES = {4: 0x11111111, 8: 0x01010101}


class Matrix(Protocol):
    """Codes or zero points uint8 [outputs, n]."""

    def open(self) -> CodeReader:
        """A function that gives rows start..stop; what has to be read whole is read here."""


def unpack_words(words: NDArray[np.int32], bits: int) -> Codes:
    """Values of words [..., n], low first: uint8 [..., n * 32 / bits]."""
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return data
    codes = np.empty((*data.shape[:-1], 2 * data.shape[-1]), np.uint8)
    np.bitwise_and(data, 15, out=codes[..., 0::2])
    np.right_shift(data, 4, out=codes[..., 1::2])
    return codes


@dataclass(frozen=True)
class PackedRows:
    """Each output's values in words along the inputs; the last word may hold fewer than it can."""

    ref: TensorRef
    bits: int
    columns: int

    def open(self) -> CodeReader:
        return lambda start, stop: unpack_words(self.ref.rows(start, stop), self.bits)[:, : self.columns]


@dataclass(frozen=True)
class PackedColumns:
    """Values of consecutive outputs in one word."""

    ref: TensorRef
    bits: int

    def open(self) -> CodeReader:
        codes = unpack_words(self.ref.read().T, self.bits).T
        return lambda start, stop: codes[start:stop]


@dataclass(frozen=True)
class PackedInputs:
    """Values of consecutive inputs in one word, words [inputs / w, outputs]: read whole, unpacked in pieces."""

    ref: TensorRef
    bits: int

    def open(self) -> CodeReader:
        words = self.ref.read()
        return lambda start, stop: unpack_words(words[:, start:stop].T, self.bits)


@dataclass(frozen=True)
class PackedOutputs:
    """Values of neighbouring outputs in one word, words [n, outputs / w]: read whole, unpacked in pieces.

    Attributes:
        ref, bits: what to read.
        places: where in its word the value of each of w outputs is; None is low first.
        add: to the words before they are unpacked, modulo 2**32.
    """

    ref: TensorRef
    bits: int
    places: tuple[int, ...] | None = None
    add: int = 0

    def open(self) -> CodeReader:
        words = self.ref.read()
        if self.add:
            words = (words.view("<u4") + np.uint32(self.add)).view("<i4")
        per_word = WORD // self.bits

        def rows(start: int, stop: int) -> Codes:
            first, last = start // per_word, -(-stop // per_word)
            codes = unpack_words(words[:, first:last], self.bits)
            if self.places is not None:
                codes = codes.reshape(*words[:, first:last].shape, per_word)[..., self.places].reshape(len(words), -1)
            skip = first * per_word
            return np.ascontiguousarray(codes[:, start - skip : stop - skip].T)

        return rows


@dataclass(frozen=True)
class SignedBytes:
    """Signed values, one a byte; they are given with ``2**(bits - 1)`` added."""

    ref: TensorRef
    bits: int

    def open(self) -> CodeReader:
        if len(self.ref.shape) < 2:  # one a row, or one for all
            values = self._codes(self.ref.read().reshape(-1, 1))
            return lambda start, stop: values[start:stop]
        return lambda start, stop: self._codes(self.ref.rows(start, stop))

    def _codes(self, values: NDArray[np.int8]) -> Codes:
        middle = 1 << (self.bits - 1)
        codes: Codes = values.view(np.uint8) + np.uint8(middle)
        if self.bits < 8 and codes.size and int(codes.max()) >= 2 * middle:
            raise CheckpointError(WHAT, self.ref.name, f"a value outside {-middle}..{middle - 1}")
        return codes


@dataclass(frozen=True)
class Scales:
    """Scales [outputs, groups], stored so or `transposed`, or fewer that hold for all outputs.

    Attributes:
        ref: F32, F16, BF16 or F8_E8M0 (powers of two); of one dimension or none they are one a row, or one for all.
        transposed: whether they are stored [groups, outputs].
    """

    ref: TensorRef
    transposed: bool = False

    def read(self) -> Floats:
        """All scales in float32 (which holds every value of the stored types), [outputs or 1, groups].

        Raises:
            NumericalError: a scale is NaN or infinite.
        """
        values: Floats = self.ref.read().astype(np.float32)
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            first = [int(i) for i in bad[0]]
            why = f"{len(bad)} of its scales are NaN or infinite, the first at {first}"
            raise NumericalError("bad weight", self.ref.name, why, "Download the checkpoint again, or ask who made it")
        if values.ndim < 2:
            return values.reshape(-1, 1)
        return np.ascontiguousarray(values.T) if self.transposed else values


def column_groups(ref: TensorRef, groups: int) -> NDArray[np.int64] | None:
    """Which group each column belongs to, from a ``g_idx`` tensor; None where it was never filled in (all -1).

    Raises:
        CheckpointError: a number that is no group.
    """
    numbers: NDArray[Any] = ref.read().astype(np.int64)
    if numbers.size and bool((numbers == -1).all()):
        return None
    bad = np.flatnonzero((numbers < 0) | (numbers >= groups))
    if len(bad):
        column = int(bad[0])
        why = f"column {column} belongs to group {int(numbers[column])}, there are {groups}"
        raise CheckpointError(WHAT, ref.name, why, "Download the checkpoint again, or ask who made it")
    return numbers
