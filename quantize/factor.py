"""Symmetric positive definite matrices as products of triangular ones, in place, for matrices of gigabytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]  # float32 or float64

# Columns factored at a time: large enough for fast products, small enough for float64 copies.
_BLOCK = 128


class NotPositiveDefinite(Exception):
    """A matrix, as far as its precision tells, is not positive definite."""


def unit_upper(matrix: Matrix) -> None:
    """Overwrites H [K, K], of which the upper half is read, with the unit upper triangular U of ``H = U D U.T``.

    D is positive and diagonal. From the last column to the first, blocks of columns are factored in float64 and taken
    out of what is left in the matrix's own type. Needs a panel of K x 128 in float64 besides the matrix. The
    lower half and the diagonal are left as zeros and ones.

    Raises:
        NotPositiveDefinite: a pivot is not positive; the matrix is spoiled then.
    """
    size = len(matrix)
    pivots = np.empty(size)
    for end in range(size, 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        corner = _upper_root(matrix[start:end, start:end].astype(np.float64))
        pivots[start:end] = np.diagonal(corner)
        panel = (matrix[:start, start:end].astype(np.float64) @ np.linalg.inv(corner).T).astype(matrix.dtype)
        matrix[:start, start:end] = panel
        matrix[start:end, start:end] = corner
        for right in range(start, 0, -_BLOCK):
            left = max(0, right - _BLOCK)
            matrix[:right, left:right] -= panel[:right] @ panel[left:right].T
    for end in range(size, 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        matrix[start:end, :start] = 0
        matrix[start:end] /= pivots.astype(matrix.dtype)


def _upper_root(block: NDArray[np.float64]) -> NDArray[np.float64]:
    """The upper triangular R with ``R @ R.T`` = block, of which the upper half counts."""
    turned = np.triu(block)[::-1, ::-1]  # the lower half is what LAPACK reads
    if not (np.isfinite(turned).all() and (np.diagonal(turned) > 0).all()):
        raise NotPositiveDefinite
    try:
        root: NDArray[np.float64] = np.linalg.cholesky(turned)[::-1, ::-1].astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        raise NotPositiveDefinite from None
    return root
