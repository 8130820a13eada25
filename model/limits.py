"""What a verification may hold a bundle to: a recipe's own limits, or a caller's."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

# Figure of `verify` → whether its limit is the most or the least that passes.
MOST = ("mean_kld", "p99_kld", "p999_kld", "max_kld", "rms_dp", "ppl_ratio")
LEAST = ("same_top", "exact")
SHARES = ("same_top", "exact", "rms_dp")
NAMES = (*MOST, *LEAST)


def fault(name: str, value: Any) -> str:
    """Why a limit cannot be used; empty if it can.

    Args:
        name: of a figure.
        value: its limit.
    """
    if name not in NAMES:
        return f"there is no figure {name[:40]!r} to limit; known: {', '.join(NAMES)}"
    if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
        return f"{name} is {str(value)[:40]!r}, a number from 0 on is wanted"
    if name in SHARES and value > 1:
        return f"{name} is {value:g}, a share from 0 to 1 is wanted"
    return ""


def passed(figures: Mapping[str, float], limits: Mapping[str, float]) -> Iterator[str]:
    """What is beyond its limit, one sentence each; a limited figure that was not measured is not in them.

    Args:
        figures: name → measured value. NaN is beyond every limit.
        limits: name → most or least.
    """
    for name, limit in limits.items():
        value = figures.get(name)
        if value is None:
            continue
        if name in MOST and not value <= limit:
            yield f"{name} {value:.4g} is above {limit:g}"
        elif name in LEAST and not value >= limit:
            yield f"{name} {value:.4g} is below {limit:g}"
