"""Scale search: for every block the scale, and the zero point, that bring its weights closest to their grid.

Round to nearest spans each block from end to end. A little less or more than that is nearly always better: it clips
one weight and gives all others finer steps, or it only places the codes luckily. Per block this tries a dozen grids,
fits the scale of the best one to its codes by least squares, rounds and fits once more, and keeps what round to
nearest gives where that is as good. With statistics, a weight counts as much as the mean square of its input, which
makes the sum the error of the layer's output as far as inputs are uncorrelated.

Only operations that IEEE 754 rounds exactly are used, and sums are taken in a fixed order: the bytes are the same on
every machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from quantize.grid import (
    SMALLEST_SCALE,
    affine_scales,
    as_fours,
    nearest_on_grid,
    over_blocks,
    reciprocals,
    split_blocks,
    symmetric_scales,
)
from quantize.scheme import Codes, Floats, Quantized, Scheme, Statistics

# The grids that are tried take a multiple of the steps per largest weight that round to nearest takes: where they
# begin, by block size, and how far they are apart. Found greedily on normal, t5 and Laplace weights: twelve come within
# 0.3 % of the error that a hundred leave. In 8 bits nothing is worth clipping; there they only place the codes.
_POINTS = 12
_FIRST, _STEP = {16: 0.825, 32: 0.85, 64: 0.9, 128: 0.975, 256: 1.05}, 0.025
_FIRST_OF_8_BITS, _STEP_OF_8_BITS = 0.9648, 0.004
# With a zero point, half as many, each with the two whole zero points next to the true one.
_FIRST_AFFINE, _STEP_AFFINE = {16: 0.8, 32: 0.85, 64: 0.9, 128: 0.95, 256: 1.0}, 0.05
_FIRST_AFFINE_OF_8_BITS, _STEP_AFFINE_OF_8_BITS = 0.97, 0.0065
# Better than round to nearest is an error smaller by more than float32 can be wrong about it.
_CLEARLY = np.float32(1 - 2**-12)

# One value for every block, or one a block: [n].
_PerBlock = np.float32 | Floats


def quantize(weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
    """Searches scales and zero points; no block's squared error is larger than with round to nearest.

    Args:
        weight: float32 [N, K], finite.
        statistics: of the K inputs; None counts all alike.
        scheme: bits, block size, symmetry, and the type that scales will be stored in: codes are those nearest on the
            grid as it is stored.

    Raises:
        NumericalError: the weight holds NaN or Inf.
    """
    importance = None if statistics is None else _importance(statistics.mean_square, scheme.block_size)
    return nearest_on_grid(weight, scheme, lambda blocks: grid(blocks, importance, scheme))


def grid(blocks: Floats, importance: Floats | None, scheme: Scheme) -> tuple[Floats, Codes | None]:
    """Scales and, if asymmetric, zero points, both [N, blocks], of weights [N, blocks, block size]."""
    if scheme.symmetric:
        plain, plain_zero = symmetric_scales(blocks, scheme).ravel(), None
        middle: _PerBlock = np.float32(scheme.middle)
    else:
        spanning, plain_zero = affine_scales(blocks, scheme)
        plain, middle = spanning.ravel(), plain_zero.ravel().astype(np.float32)
    plain = as_stored(plain, scheme)
    search = _Search(blocks, importance, scheme)
    ratio, zero = search.best()
    scales = as_stored(ratio * search.largest, scheme)
    better = search.error(scales, zero) < _CLEARLY * search.error(plain, middle)
    better &= plain != 0  # zeros, or nearly: nothing to be found
    chosen = np.where(better, scales, plain).reshape(blocks.shape[:2])
    if plain_zero is None:
        return chosen, None
    return chosen, np.where(better, zero, middle).astype(np.uint8).reshape(blocks.shape[:2])


def as_stored(scales: Floats, scheme: Scheme) -> Floats:
    """Scales rounded to the type they are stored in; those too small for it become its smallest number.

    Too large ones stay what they are: whoever stores them refuses them.
    """
    kind = scheme.scale_type
    if kind == np.float32:
        return scales
    with np.errstate(over="ignore", under="ignore"):
        cast = scales.astype(kind).astype(np.float32)
    smallest = np.nextafter(kind.type(0), kind.type(1)).astype(np.float32)
    cast = np.where((cast == 0) & (scales != 0), np.copysign(smallest, scales), cast)
    return np.where(np.isfinite(cast), cast, scales)


def _importance(mean_square: Floats, size: int) -> Floats:
    """What the inputs of each block weigh, the heaviest of a block 1: [size / 4, 4 * blocks]."""
    blocks = split_blocks(np.maximum(mean_square, np.float32(0))[None], size)
    heaviest = blocks.max(axis=-1, keepdims=True)
    return as_fours(np.divide(blocks, heaviest, out=np.zeros_like(blocks), where=heaviest > 0))


class _Search:
    """Grids for the n blocks of a piece of a weight, whose weights are held relative to the largest of their block.

    Attributes:
        largest: float32 [n], the weight of largest magnitude, without its sign if zero points can be chosen; 1 where
            it is next to nothing.
    """

    def __init__(self, blocks: Floats, importance: Floats | None, scheme: Scheme) -> None:
        self._scheme = scheme
        weights = as_fours(blocks)
        high = over_blocks(np.maximum, np.maximum.reduce(weights, axis=0))
        low = over_blocks(np.minimum, np.minimum.reduce(weights, axis=0))
        largest = np.where(high > -low, high, low) if scheme.symmetric else np.maximum(high, -low)
        self.largest = np.where(np.abs(largest) < scheme.largest * SMALLEST_SCALE, np.float32(1), largest)
        weights /= np.repeat(self.largest, 4)
        self._low = np.minimum(low / self.largest, np.float32(0))
        self._high = np.maximum(high / self.largest, np.float32(0))
        self._weights = self._weighted = weights
        self._importance = None
        if importance is not None:
            self._importance = np.tile(importance, (1, len(blocks)))
            self._weighted = weights * self._importance
        self._codes, self._products = np.empty_like(weights), np.empty_like(weights)

    def best(self) -> tuple[Floats, _PerBlock]:
        """Of the best grid: the scales, relative to the largest weights, and the zero points."""
        count = len(self.largest)
        score, ratio = np.zeros(count, np.float32), np.ones(count, np.float32)
        best_zero: _PerBlock = np.float32(self._scheme.middle)
        if not self._scheme.symmetric:
            best_zero = np.zeros(count, np.float32)
        for factor, zero in self._tried():
            explained, fitted = self._fit(factor, zero)
            better = explained > score
            np.copyto(score, explained, where=better)
            np.copyto(ratio, fitted, where=better)
            if isinstance(best_zero, np.ndarray):
                np.copyto(best_zero, zero, where=better)
        explained, fitted = self._fit(reciprocals(ratio), best_zero)
        np.copyto(ratio, fitted, where=explained > score)
        return ratio, best_zero

    def error(self, scales: Floats, zero: _PerBlock) -> Floats:
        """The squared error [n] on a grid, relative to the square of the largest weight."""
        ratio: Floats = np.divide(scales, self.largest, dtype=np.float32)
        errors = self._round(reciprocals(ratio), zero)
        errors *= np.repeat(ratio, 4)
        errors -= self._weights
        errors *= errors
        return _sums(errors, self._importance)

    def _tried(self) -> Iterator[tuple[_PerBlock, _PerBlock]]:
        """The grids that are tried, as codes per largest weight and zero points."""
        scheme = self._scheme
        if scheme.symmetric:
            first, step = (_near(_FIRST, scheme), _STEP) if scheme.bits == 4 else (_FIRST_OF_8_BITS, _STEP_OF_8_BITS)
            for point in range(_POINTS):
                yield np.float32(-scheme.middle * (first + step * point)), np.float32(scheme.middle)
            return
        first, step = _FIRST_AFFINE_OF_8_BITS, _STEP_AFFINE_OF_8_BITS
        if scheme.bits == 4:
            first, step = _near(_FIRST_AFFINE, scheme), _STEP_AFFINE
        span = self._high - self._low  # at least 1, but for zeros
        across = np.divide(np.float32(scheme.largest), span, out=np.zeros_like(span), where=span >= 1)
        below = np.floor(-self._low * across)
        above = np.minimum(below + np.float32(1), np.float32(scheme.largest))
        for point in range(_POINTS // 2):
            for zero in (below, above):
                yield across * np.float32(first + step * point), zero

    def _fit(self, factor: _PerBlock, zero: _PerBlock) -> tuple[Floats, Floats]:
        """Rounds, and fits the scale to the codes: what it explains of the squared weights, and the scale; both [n]."""
        codes = self._round(factor, zero)
        along = _sums(np.multiply(self._weighted, codes, out=self._products), None)
        codes *= codes
        squared = _sums(codes, self._importance)
        ratio = np.divide(along, squared, out=np.zeros_like(along), where=squared > 0)
        return along * ratio, ratio

    def _round(self, factor: _PerBlock, zero: _PerBlock) -> Floats:
        """The nearest codes, less the zero point."""
        largest = np.float32(self._scheme.largest)
        codes = np.multiply(self._weights, np.repeat(factor, 4) if np.ndim(factor) else factor, out=self._codes)
        np.rint(codes, out=codes)
        if not np.ndim(zero):
            return np.clip(codes, -zero, largest - zero, out=codes)
        lowest = np.repeat(-zero, 4)
        np.maximum(codes, lowest, out=codes)
        return np.minimum(codes, lowest + largest, out=codes)


def _near(table: dict[int, float], scheme: Scheme) -> float:
    return table[min(max(scheme.block_size, min(table)), max(table))]


def _sums(fours: Floats, importance: Floats | None) -> Floats:
    """Sums [n] of the blocks in [size / 4, 4 * n], which may be overwritten.

    Along the first axis numpy adds row by row; along the last one the order would be the machine's.
    """
    if importance is not None:
        fours *= importance
    return over_blocks(np.add, np.add.reduce(fours, axis=0))
