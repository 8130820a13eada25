"""Scales the frames of a video: the arithmetic of torch's antialiased bicubic filter for uint8, bit for bit, in numpy.

transformers' video processor scales with it, and its image processor with Pillow's, which differs by a step of 255 here
and there: Pillow keeps weights of 22 bits, torch of as many as fit into int16.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

_CURVE: Final = -0.5  # the cubic's parameter, Pillow's as well
_MOST_BITS: Final = 22
# Outputs computed by one product: its inputs overlap little, and most of what it multiplies is not zero.
_TOGETHER: Final = 32


def resize_bicubic(pixels: Pixels, height: int, width: int) -> Pixels:
    """One frame at another size.

    Args:
        pixels: [height, width, channels].
        height, width: of the result.
    """
    if pixels.shape[1] != width:
        columns = pixels.transpose(1, 0, 2).reshape(pixels.shape[1], -1)
        pixels = _along(columns, width).reshape(width, pixels.shape[0], -1).transpose(1, 0, 2)
    if pixels.shape[0] != height:
        pixels = _along(pixels.reshape(pixels.shape[0], -1), height).reshape(height, width, -1)
    return np.ascontiguousarray(pixels)


def _along(lines: Pixels, size: int) -> Pixels:
    """[old, n] to [size, n]."""
    weights, starts, bits = _weights(len(lines), size)
    taps = weights.shape[1]
    out = np.empty((size, lines.shape[1]), np.uint8)
    for first in range(0, size, _TOGETHER):
        rows = range(first, min(first + _TOGETHER, size))
        low = int(starts[first])
        high = min(len(lines), int(starts[rows[-1]]) + taps)
        band = np.zeros((len(rows), high - low + taps))
        for place, row in enumerate(rows):
            band[place, starts[row] - low : starts[row] - low + taps] = weights[row]
        # Whole numbers below 2**53: exact in any order.
        sums = band[:, : high - low] @ lines[low:high].astype(np.float64)
        whole = (sums.astype(np.int64) + (1 << (bits - 1))) >> bits
        out[first : first + len(rows)] = whole.clip(0, 255)
    return out


@lru_cache(maxsize=32)
def _weights(old: int, new: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Whole-number weights [new, taps], the first input of each output [new], and the bits after the point."""
    scale = old / new
    support = 2.0 * scale if scale >= 1.0 else 2.0
    narrowing = 1.0 / scale if scale >= 1.0 else 1.0
    taps = math.ceil(support) * 2 + 1
    centres = scale * (np.arange(new) + 0.5)
    starts = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    counts = np.minimum((centres + support + 0.5).astype(np.int64), old) - starts
    counts = counts.clip(0, taps)
    places = np.arange(taps)
    distances = np.abs((places + starts[:, None] - centres[:, None] + 0.5) * narrowing)
    weights = np.where(places < counts[:, None], _cubic(distances), 0.0)
    totals = weights.sum(1, keepdims=True)
    weights = np.divide(weights, totals, out=weights, where=totals != 0)
    largest = weights.max()
    bits = 0
    while bits < _MOST_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    scaled = weights * (1 << bits)
    return np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int64), starts, bits


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    near = ((_CURVE + 2.0) * x - (_CURVE + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _CURVE
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
