"""Whether something grows: a slope with an interval that holds for measurements which hang together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom.
_T: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Slope:
    """A line's slope, and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def level(self) -> bool:
        """Whether the interval includes 0."""
        return self.low <= 0 <= self.high


def by_batches(at: Sequence[float], values: Sequence[float], batches: int = 9) -> Slope:
    """Least squares through the means of so many stretches of neighbouring measurements.

    What stays for a while makes neighbours alike, but hardly the means of long stretches; Student's t for them.
    """
    x, y = (
        np.array([part.mean() for part in np.array_split(np.array(one, np.float64), batches)]) for one in (at, values)
    )
    away = x - x.mean()
    spread = float((away**2).sum())
    slope = float(away @ y) / spread
    left = y - y.mean() - slope * away
    error = math.sqrt(float((left**2).sum()) / (batches - 2) / spread)
    return Slope(slope, slope - _t(batches - 2) * error, slope + _t(batches - 2) * error)


def _t(degrees: int) -> float:
    return _T[min(degrees, len(_T)) - 1]
