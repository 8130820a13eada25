"""Quantized weights of a checkpoint: exact grids of whole numbers, and 8-bit floats.

Both give their values in float32, row by row: ``(code - zero point) * scale`` and ``float8 * scale``. With scales of
16 bits the product is exact; with float32 scales it is rounded once. Other implementations round it further, to the
type they compute in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import CheckpointError
from model.shards import DTYPES, WHAT, TensorRef
from model.unpack import Codes, Floats, Matrix, Scales, column_groups

Order = NDArray[np.int64]
_PIECE = 1 << 20  # values
_AGAIN = "Download the checkpoint again, or ask who made it"


@dataclass(frozen=True)
class GridRows:
    """Some rows of a weight [n, K] on its grid, columns as they stand in the checkpoint.

    Attributes:
        codes: uint8 [n, K].
        scales: float32 [n, groups], the stored values.
        zero_points: uint8 [n, groups]; None where all are ``2**(bits - 1)``.
    """

    codes: Codes
    scales: Floats
    zero_points: Codes | None


@dataclass(frozen=True)
class _Dequantized(ABC):
    """What the two kinds have in common: a weight [N, K] of a linear layer whose values are float32.

    Attributes:
        name: as a plain weight would be called ("...q_proj.weight").
        shape: (N, K).
        parts: the stored tensors, the main one first.
        label: how it is stored, in words.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorRef, ...]
    label: str

    @property
    def dtype(self) -> str:
        """Of the values."""
        return "F32"

    @property
    def nbytes(self) -> int:
        """Of the values."""
        return 4 * prod(self.shape)

    @property
    def file(self) -> Path:
        """Where the main part lies."""
        return self.parts[0].file

    @property
    def offset(self) -> int:
        """Where the main part lies in its file."""
        return self.parts[0].offset

    @abstractmethod
    def open(self) -> Callable[[int, int], Floats]:
        """A function that gives the values of rows start..stop."""

    def rows(self, start: int, stop: int) -> Floats:
        """Values of rows start..stop; for many calls use `open`."""
        return self.open()(start, stop)

    def read(self) -> Floats:
        """All values; beside them only a few rows' parts are unpacked at a time."""
        values = np.empty(self.shape, np.float32)
        rows = self.open()
        step = max(1, _PIECE // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            values[start:stop] = rows(start, stop)
        return values


@dataclass(frozen=True)
class IntegerWeight(_Dequantized):
    """Codes of 4 or 8 bits with a scale, and perhaps a zero point, for every group of a row's columns.

    Attributes:
        method: who made it, as `model.quantization` calls it.
        bits: of a code.
        group_size: columns of a group, K for one group; the last group may be smaller.
        codes, scales, zero_points: where they are; no zero points mean ``2**(bits - 1)``.
        symmetric: whether zero points, where there are any, must all be ``2**(bits - 1)``.
        groups: tensor with each column's group; None where they stand in order.
        act_order: whether `groups` may be in any order; else it is only checked.
        less_one: whether zero points were stored one too small (and have been corrected).
        stored_shape: tensor with N and K, to be checked.
    """

    method: str
    bits: int
    group_size: int
    codes: Matrix
    scales: Scales
    zero_points: Matrix | None = None
    symmetric: bool = True
    groups: TensorRef | None = None
    act_order: bool = False
    less_one: bool = False
    stored_shape: TensorRef | None = None

    @property
    def group_count(self) -> int:
        """Groups in a row."""
        return -(-self.shape[1] // self.group_size)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight."""
        return 1 << (self.bits - 1)

    def column_groups(self) -> Order | None:
        """The group of each column, int64 [K]; None where columns stand in the order of their groups.

        Raises:
            CheckpointError: a group that does not exist, or an order that the configuration says there is not.
        """
        if self.groups is None:
            return None
        numbers = column_groups(self.groups, self.group_count)
        if numbers is None or np.array_equal(numbers, np.arange(self.shape[1]) // self.group_size):
            return None
        if not self.act_order:
            why = "columns are not in the order of their groups, though the configuration says that they are"
            raise CheckpointError(WHAT, self.groups.name, why, _AGAIN)
        return numbers

    def open_grid(self) -> Callable[[int, int], GridRows]:
        """A function that gives codes, scales and zero points of rows start..stop.

        Raises (as the function does):
            NumericalError: a scale is NaN or infinite.
            CheckpointError: zero points or the stored shape are not what they must be.
        """
        self._check_shape()
        scales = self.scales.read()
        one_for_all = len(scales) == 1
        zero_points = self._open_zero_points()
        codes = self.codes.open()

        def rows(start: int, stop: int) -> GridRows:
            some = np.repeat(scales, stop - start, axis=0) if one_for_all else scales[start:stop]
            return GridRows(codes(start, stop), some, None if zero_points is None else zero_points[start:stop])

        return rows

    def open(self) -> Callable[[int, int], Floats]:
        """A function that gives the values of rows start..stop. Raises as `open_grid` and `column_groups`."""
        grid, groups = self.open_grid(), self.column_groups()

        def spread(numbers: NDArray[Any]) -> NDArray[Any]:
            """Numbers [n, groups] as [n, K]."""
            if groups is not None:
                return np.take(numbers, groups, axis=1)
            return np.repeat(numbers, self.group_size, axis=1)[:, : self.shape[1]]

        def rows(start: int, stop: int) -> Floats:
            some = grid(start, stop)
            values = some.codes.astype(np.float32)
            values -= np.float32(self.middle) if some.zero_points is None else spread(some.zero_points)
            values *= spread(some.scales)
            return values

        return rows

    def _open_zero_points(self) -> Codes | None:
        if self.zero_points is None:
            return None
        values = self.zero_points.open()(0, self.shape[0])
        if len(values) < self.shape[0]:
            values = np.repeat(values, self.shape[0], axis=0)
        if not self.symmetric:
            return values
        # Some writers mark the second format of GPTQ as the first, where readers of symmetric weights do not notice.
        allowed = (self.middle, self.middle + 1) if self.less_one else (self.middle,)
        if not any(bool((values == value).all()) for value in allowed):
            why = f"zero points are not all {self.middle}, though the configuration says that the weight is symmetric"
            raise CheckpointError(WHAT, self.name, why, _AGAIN)
        return None

    def _check_shape(self) -> None:
        if self.stored_shape is None:
            return
        stored = [int(size) for size in self.stored_shape.read()]
        if stored != list(self.shape):
            raise CheckpointError(WHAT, self.stored_shape.name, f"{stored}, but config.json means {list(self.shape)}")


@dataclass(frozen=True)
class Float8Weight(_Dequantized):
    """8-bit floats with one scale, one a row, or one a block of rows and columns.

    Attributes:
        codes: the values before scaling, float8 [N, K].
        scales: [1 or row blocks, 1 or column blocks].
        block: rows and columns of a block; the last ones may be smaller.
        zero_points: tensor that some writers add; all zeros.
    """

    codes: TensorRef
    scales: Scales
    block: tuple[int, int]
    zero_points: TensorRef | None = None

    def open(self) -> Callable[[int, int], Floats]:
        """A function that gives the values of rows start..stop; NaN stays NaN.

        Raises:
            NumericalError: a scale is NaN or infinite.
            CheckpointError: a zero point other than 0.
        """
        scales = self.scales.read()
        if self.zero_points is not None and self.zero_points.read().astype(np.float32).any():
            raise CheckpointError(WHAT, self.zero_points.name, "8-bit floats with a zero point other than 0")
        table = np.arange(256, dtype=np.uint8).view(DTYPES[self.codes.dtype]).astype(np.float32)
        tall, wide = self.block
        columns = self.shape[1]

        def rows(start: int, stop: int) -> Floats:
            values: Floats = table[self.codes.rows(start, stop).view(np.uint8)]
            factors: NDArray[Any] = scales[np.arange(start, stop) // tall]
            values *= factors if factors.shape[1] == 1 else np.repeat(factors, wide, axis=1)[:, :columns]
            return values

        return rows
