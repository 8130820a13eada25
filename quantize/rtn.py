"""Round to nearest: the grid spans each block, every weight takes the nearest code. Needs no calibration."""

from __future__ import annotations

from quantize.grid import affine_scales, nearest_on_grid, symmetric_scales
from quantize.scheme import Codes, Floats, Quantized, Scheme, Statistics


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
    return nearest_on_grid(weight, scheme, lambda blocks: _grid(blocks, scheme))


def _grid(blocks: Floats, scheme: Scheme) -> tuple[Floats, Codes | None]:
    """Scales and, if asymmetric, zero points, both [N, blocks], that span weights [N, blocks, block size]."""
    return (symmetric_scales(blocks, scheme), None) if scheme.symmetric else affine_scales(blocks, scheme)
