"""Inputs of a product turned, block by block, so that a massive one is shared by its whole block.

With the matrix H of Sylvester, of ones and minus ones and with ``H @ H = b I``, a product of inputs x and a weight W in
blocks of b is

    x @ W.T = (x H) @ (W H / b).T

A row of x with few massive values has none in x H: every value is a sum of all b of its block, with signs. So one scale
for the row, rounded to 8 bits, takes less from the others (Ashkboos et al., "QuaRot", 2024, of whole rows). The graph
computes x H, a product of [rows * K / b, b] with [b, b]; the weight holds W H / b.

H is applied to weights by additions and subtractions in a fixed order, so the bytes are the same on every machine.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from quantize.scheme import Floats, Statistics

# The largest costs a sixteenth of the additions of a product with 2048 outputs.
ROTATIONS = (16, 32, 64, 128)


def hadamard(size: int) -> Floats:
    """Sylvester's matrix float32 [size, size] of ones and minus ones; size is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotated(weight: Floats, block: int) -> Floats:
    """W H / b: what is multiplied with inputs x H.

    Args:
        weight: float32 [N, K]; not changed.
        block: b, a power of two that divides K.
    """
    turned = _times_hadamard(weight, block)
    turned *= np.float32(1 / block)
    return turned


def restored(turned: Floats, block: int) -> Floats:
    """W, of W H / b."""
    return _times_hadamard(turned, block)


def rotated_statistics(statistics: Statistics, block: int) -> Statistics:
    """What is known about x, of x H; without products of inputs they count as uncorrelated."""
    if statistics.hessian is None:
        squares = statistics.mean_square.reshape(-1, block).sum(-1, dtype=np.float64)
        return replace(statistics, mean_square=np.repeat(squares, block).astype(np.float32))
    products = _times_hadamard(_times_hadamard(statistics.hessian, block).T, block)
    squares = np.maximum(products.diagonal(), np.float32(0))
    return replace(statistics, mean_square=squares, hessian=products)


def _times_hadamard(rows: Floats, block: int) -> Floats:
    """Every block of every row times H, by sums and differences of halves."""
    count = rows.size // block
    # Blocks lie along the first axis, where numpy adds long rows.
    values = np.ascontiguousarray(rows.reshape(count, block).T)
    half = 1
    while half < block:
        pairs = values.reshape(block // (2 * half), 2, half, count)
        first, second = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
        pairs[:, 0], pairs[:, 1] = first, second
        half *= 2
    return np.ascontiguousarray(values.T).reshape(rows.shape)
