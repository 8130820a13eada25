"""Round to nearest: the grid spans each block, every weight takes the nearest code. Needs no calibration."""

from __future__ import annotations

import numpy as np

from quantize.grid import affine_scales, nearest_codes, refuse_not_finite, split_blocks, symmetric_scales
from quantize.scheme import Floats, Quantized, Scheme, Statistics

# Weights worked on at a time: their temporaries stay in a core's cache.
PIECE = 1 << 17


def quantize(weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
    """Rounds every weight to the nearest point of its block's grid.

    Args:
        weight: float32 [N, K], finite.
        statistics: not used; rounding looks at one weight at a time.
        scheme: bits, block size and symmetry.

    Raises:
        NumericalError: the weight holds NaN or Inf.
    """
    del statistics
    refuse_not_finite(weight)
    rows = weight.shape[0]
    blocks = -(-weight.shape[1] // scheme.block_size)
    codes = np.empty((rows, blocks, scheme.block_size), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zero_points = None if scheme.symmetric else np.empty((rows, blocks), np.uint8)
    step = max(1, PIECE // max(1, weight.shape[1]))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        piece = split_blocks(weight[part], scheme.block_size)
        if zero_points is None:
            scales[part] = symmetric_scales(piece, scheme)
            codes[part] = nearest_codes(piece, scales[part], None, scheme)
        else:
            scales[part], zero_points[part] = affine_scales(piece, scheme)
            codes[part] = nearest_codes(piece, scales[part], zero_points[part], scheme)
    return Quantized(codes, scales, zero_points)
