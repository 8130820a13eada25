"""Half-quadratic quantization (HQQ): grids that a few large weights do not decide about, without calibration.

Of the errors of a block, the p-th powers are made small, p < 1, instead of the squares: outliers may be rounded badly
if that makes the rest good. Half-quadratic splitting (Badri and Shaji, "Half-Quadratic Quantization of Large Machine
Learning Models", 2023) does so with squares only: the errors are shrunk by the proximal operator of their p-th power,
what is left is taken off the weights, and the grid is fitted to them by least squares; then again, with the splitting
ever tighter.

The published method fits float zero points to scales that span the block. Here zero points are whole numbers, for
which there are fast kernels, and so scales and zero points are fitted, from the grid on that `quantize.search` finds. p
is 1/2, so that a square root will do, which is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from quantize import search
from quantize.grid import as_fours, nearest_on_grid, over_blocks, reciprocals
from quantize.scheme import Codes, Floats, Quantized, Scheme, Statistics

# How tight the splitting is at first, in steps of the grid, and by how much it grows each time. Of what was tried (1 to
# 8, 1.05 to 1.3) this is best or nearly so for blocks of all sizes; more turns bring another 0.4 %.
_TURNS, _BETA, _KAPPA = 8, 3.0, 1.3


def quantize(weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
    """Fits scales and zero points; no block's sum of square roots of errors is larger than with `search`.

    Args:
        weight: float32 [N, K], finite.
        statistics: not used.
        scheme: bits, block size, symmetry, and the type that scales will be stored in.

    Raises:
        NumericalError: the weight holds NaN or Inf.
    """
    del statistics
    return nearest_on_grid(weight, scheme, lambda blocks: _grid(blocks, scheme))


def _grid(blocks: Floats, scheme: Scheme) -> tuple[Floats, Codes | None]:
    """Scales and, if asymmetric, zero points, both [N, blocks], of weights [N, blocks, block size]."""
    start, points = search.grid(blocks, None, scheme)
    zero = np.full(start.size, scheme.middle, np.float32) if points is None else points.ravel().astype(np.float32)
    # Relative to the steps of the grid that it starts from, all blocks are alike.
    unit = np.where(start == 0, np.float32(1), start).ravel()
    weights = as_fours(blocks)
    weights /= np.repeat(unit, 4)
    fit = _HalfQuadratic(weights, zero, scheme)
    best, best_zero = np.ones(start.size, np.float32), zero
    least = fit.error(best, zero)
    for ratio, zero in fit:
        ratio = np.divide(search.as_stored(ratio * unit, scheme), unit, dtype=np.float32)
        error = fit.error(ratio, zero)
        better = (error < least) & (ratio != 0)
        least = np.where(better, error, least)
        best, best_zero = np.where(better, ratio, best), np.where(better, zero, best_zero)
    scales = np.where(start.ravel() == 0, np.float32(0), search.as_stored(best * unit, scheme)).reshape(start.shape)
    return scales, None if points is None else best_zero.astype(np.uint8).reshape(start.shape)


class _HalfQuadratic:
    """Grids for n blocks, each closer to what remains of the weights without their outliers.

    Args:
        weights: float32 [size / 4, 4 * n], in steps of the first grid.
        zero: float32 [n], its zero points.
        scheme: bits and symmetry.
    """

    def __init__(self, weights: Floats, zero: Floats, scheme: Scheme) -> None:
        self._weights, self._zero, self._scheme = weights, zero, scheme

    def __iter__(self) -> Iterator[tuple[Floats, Floats]]:
        """Scales, in the first grid's steps, and zero points, both [n]."""
        ratio, zero, beta = np.ones_like(self._zero), self._zero, _BETA
        for _ in range(_TURNS):
            codes, errors = self._round(ratio, zero)
            wanted = self._weights - _shrunk(errors, beta)
            ratio, zero = self._fit(wanted, codes, ratio, zero)
            yield ratio, zero
            beta *= _KAPPA

    def error(self, ratio: Floats, zero: Floats) -> Floats:
        """Sums of the square roots of the errors [n]."""
        errors = self._round(ratio, zero)[1]
        return _sums(np.sqrt(np.abs(errors, out=errors), out=errors))

    def _round(self, ratio: Floats, zero: Floats) -> tuple[Floats, Floats]:
        """The nearest codes, less the zero point, and how far the weights are from them."""
        codes = self._weights * np.repeat(reciprocals(ratio), 4)
        np.rint(codes, out=codes)
        lowest = np.repeat(-zero, 4)
        np.maximum(codes, lowest, out=codes)
        np.minimum(codes, lowest + np.float32(self._scheme.largest), out=codes)
        errors = codes * np.repeat(ratio, 4)
        return codes, np.subtract(self._weights, errors, out=errors)

    def _fit(self, wanted: Floats, codes: Floats, ratio: Floats, zero: Floats) -> tuple[Floats, Floats]:
        """The scales, and the whole zero points, that bring codes closest to what is wanted of them."""
        squared, along = _sums(codes * codes), _sums(codes * wanted)
        if not self._scheme.symmetric:
            count = np.float32(4 * len(codes))
            mean, mean_wanted = _sums(codes) / count, _sums(wanted) / count
            spread = squared - count * mean * mean
            slope = np.divide(along - count * mean * mean_wanted, spread, out=ratio.copy(), where=spread > 0)
            # wanted = slope * (codes - shift), and so the zero point moves by the shift.
            shift = np.rint(mean - mean_wanted * reciprocals(slope))
            moved = np.clip(zero + shift, 0, np.float32(self._scheme.largest))
            shift = moved - zero
            along -= shift * mean_wanted * count
            squared -= shift * (np.float32(2) * mean - shift) * count
            zero = moved
        return np.divide(along, squared, out=ratio.copy(), where=squared > 0), zero


def _shrunk(errors: Floats, beta: float) -> Floats:
    """What is left of errors that are outliers: ``sign(e) * max(|e| - |e| ** (p - 1) / beta, 0)``, p = 1 / 2."""
    size = np.abs(errors)
    threshold = np.sqrt(size)
    np.divide(np.float32(1 / beta), threshold, out=threshold, where=threshold > 0)
    size -= threshold
    np.maximum(size, np.float32(0), out=size)
    return np.copysign(size, errors, out=size)


def _sums(fours: Floats) -> Floats:
    return over_blocks(np.add, np.add.reduce(fours, axis=0))
