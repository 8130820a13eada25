"""GPTQ: weights are rounded one column after another, and what an error does to the output is made up for by those
that are still to come.

The error of a layer's output is ``(W - Q) H (W - Q).T``, H being the mean outer product of its inputs. With the factors
``H = U D U.T``, U unit upper triangular and D diagonal, the best that column k can do given the columns before it is

    Q[:, k] = round(W[:, k] + (W - Q)[:, :k] @ U[:k, k])

(LDLQ in Chee et al., QuIP, arXiv 2307.13304, who prove it equal to GPTQ, arXiv 2210.17323, which inverts H first). So
one factorization and no inverse is all there is to it. Columns go from those with the largest inputs to those with the
smallest, but every one keeps the scale of the block where it stands, which is searched for before
(`quantize.search`, weighted by the diagonal of H); so what comes out is stored like any other weight.

With scaled inputs (`quantize.awq`), which the recipes call "awq-gptq", the same is done to the weights and the Hessian
of the product as it is then: held-out errors get 5 to 30 % smaller by that, the more the larger some inputs are.

Sums are BLAS's: the same inputs give the same bytes on one machine and number of threads, not on all machines.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from model.errors import NumericalError, UsageError
from quantize import awq, search
from quantize.factor import NotPositiveDefinite, unit_upper
from quantize.grid import reciprocals, refuse_not_finite
from quantize.scheme import AnyArray, Codes, Floats, Quantized, Scheme, Statistics

# Weights worked on at a time, in whole rows, of which there are at least so many.
PIECE, _LEAST_ROWS = 1 << 21, 64
# Columns between two products with all errors so far.
_BLOCK = 128
# Added to the diagonal of H, in parts of its mean: makes it positive definite. And correlations count a tenth less than
# the prompts say: with 2 tokens a channel held-out errors get 6 % smaller by that, with 32 at most 0.1 % larger.
_DAMPING, _TRUST = 0.01, 0.9
# Where rounding leaves it indefinite all the same, ten times more is added, and once more.
_ATTEMPTS = 3
# Up to so many columns are factored in float64, which takes twice the memory.
_FLOAT64_COLUMNS = 8192
# Prepared Hessians that are kept: modules that read one input are neighbours.
_KEPT = 2


@dataclass(frozen=True)
class Prepared:
    """A Hessian as the columns are worked off.

    Attributes:
        order: int64 [K], the columns from the first to be rounded to the last.
        feedback: float32 [K, K], U of the reordered Hessian.
    """

    order: NDArray[np.int64]
    feedback: Floats


_prepared: WeakKeyDictionary[Statistics, Prepared] = WeakKeyDictionary()
_lock = threading.Lock()


def quantize(weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
    """Searches scales and zero points, then rounds column by column.

    Args:
        weight: float32 [N, K], finite; hundreds of rows at a time are faster than tens.
        statistics: of the K inputs, with a Hessian, which is prepared once for all weights; and with an input scale
            where inputs are divided by one.
        scheme: bits, block size, symmetry, and the type that scales will be stored in.

    Raises:
        UsageError: there is no Hessian.
        NumericalError: the weight or the Hessian holds NaN or Inf, the Hessian is none, or errors overflow.
    """
    if statistics is None or statistics.hessian is None:
        raise UsageError("cannot quantize", "method gptq", "it needs calibrated inputs", "Give --calibration")
    weight, seen = awq.scaled(weight, statistics)
    refuse_not_finite(weight)
    known = prepared(statistics)
    grid = search.quantize(weight, seen, scheme)
    codes = grid.codes.reshape(len(weight), -1)
    step = max(_LEAST_ROWS, PIECE // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        zero_points = None if grid.zero_points is None else grid.zero_points[part]
        columns = np.ascontiguousarray(weight[part].T[known.order])
        found = _Rounding(grid.scales[part], zero_points, scheme).codes(columns, known)
        codes[part, known.order] = found.T
    return replace(grid, input_scale=statistics.input_scale)


def quantize_scaled(weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
    """The same with scaled inputs; raises UsageError also where no scale was chosen for them."""
    return quantize(weight, awq.with_scale(statistics), scheme)


def prepared(statistics: Statistics) -> Prepared:
    """The factor of a Hessian, of the scaled inputs' where they are; kept until two others were asked for, or the
    statistics are gone.

    Beside the Hessian this takes one more array of its size, twice that below 8193 columns: for the 27,392 inputs of
    the largest down_proj 3 GB each, and about 7e12 multiplications.

    Raises:
        NumericalError: the Hessian holds NaN or Inf, or is none.
    """
    with _lock:  # others who wait here nearly always wait for the same one
        known = _prepared.get(statistics)
        if known is None:
            known = _prepare(statistics)
            while len(_prepared) >= _KEPT:
                del _prepared[next(iter(_prepared))]
            _prepared[statistics] = known
        return known


def _prepare(statistics: Statistics) -> Prepared:
    hessian, scale = statistics.hessian, statistics.input_scale
    if hessian is None:
        raise ValueError("there is no Hessian")
    diagonal = np.diagonal(hessian).astype(np.float64)
    if not np.isfinite(hessian.sum(dtype=np.float64)) or (diagonal < 0).any():
        raise _no_hessian("it holds NaN, infinite values or a negative mean square")
    if scale is not None:
        diagonal /= np.square(scale, dtype=np.float64)
    order = np.argsort(-diagonal, kind="stable")
    unit = float(diagonal.mean()) or 1.0
    for attempt in range(_ATTEMPTS):
        matrix = _reordered(hessian, order)
        if scale is not None:
            matrix /= scale[order]
            matrix /= scale[order][:, None]
        matrix *= _TRUST / unit
        matrix.flat[:: len(matrix) + 1] = diagonal[order] / unit + _DAMPING * 10**attempt
        try:
            unit_upper(matrix)
        except NotPositiveDefinite:
            continue
        return Prepared(order, matrix.astype(np.float32, copy=False))
    raise _no_hessian("it is not positive semidefinite")


def _reordered(hessian: Floats, order: NDArray[np.int64]) -> AnyArray:
    """A copy with rows and columns in another order."""
    kind = np.float64 if len(hessian) <= _FLOAT64_COLUMNS else np.float32
    matrix = np.empty(hessian.shape, kind)
    for start in range(0, len(hessian), _BLOCK):
        part = slice(start, start + _BLOCK)
        matrix[part] = hessian[order[part]][:, order]
    return matrix


def _no_hessian(why: str) -> NumericalError:
    return NumericalError("cannot quantize", "Hessian of the inputs", why, "Calibrate again")


class _Rounding:
    """The grids of some rows of a weight, and the codes on them.

    Args:
        scales, zero_points: [n, blocks]; zero points None for symmetric blocks.
        scheme: bits and block size.
    """

    def __init__(self, scales: Floats, zero_points: Codes | None, scheme: Scheme) -> None:
        self._scheme = scheme
        self._scales = np.ascontiguousarray(scales.T)
        self._inverse = reciprocals(self._scales)
        if zero_points is None:
            zero_points = np.full(scales.shape, scheme.middle, np.uint8)
        self._zeros = np.ascontiguousarray(zero_points.T, np.float32)

    def codes(self, columns: Floats, prepared: Prepared) -> Codes:
        """The codes uint8 [K, n] of a weight's columns [K, n], both in the order that is prepared."""
        codes, errors = np.empty(columns.shape, np.uint8), np.empty_like(columns)
        feedback = prepared.feedback
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(columns), _BLOCK):
                part = slice(start, min(start + _BLOCK, len(columns)))
                wanted = feedback[:start, part].T @ errors[:start]
                wanted += columns[part]
                within = np.ascontiguousarray(feedback[part, part].T)
                for j, block in enumerate(prepared.order[part] // self._scheme.block_size):
                    wanted[j] += within[j, :j] @ errors[start : start + j]
                    rounded = self._round(wanted[j], block, codes[start + j])
                    np.subtract(columns[start + j], rounded, out=errors[start + j])
            if not np.isfinite(errors.sum()):
                why = "what its rounding errors add up to is more than float32 can hold"
                raise NumericalError("cannot quantize weight", "a part of it", why, "Use another method")
        return codes

    def _round(self, wanted: Floats, block: int, codes: Codes) -> Floats:
        """What the nearest codes, which are written to `codes`, stand for."""
        zeros = self._zeros[block]
        rounded = wanted * self._inverse[block]
        np.rint(rounded, out=rounded)
        rounded += zeros
        np.clip(rounded, 0, self._scheme.largest, out=rounded)
        codes[:] = rounded
        rounded -= zeros
        rounded *= self._scales[block]
        return rounded
