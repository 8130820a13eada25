"""What came of it, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.fuzz.status import CODES, Field

LARGEST_KIB = 512 << 10  # of memory beyond what an idle worker has
Rows = Mapping[str, npt.NDArray[np.int64]]
_COLUMNS = ("target", "mutants", "accepted", "refused", "crashes", "hangs", "wrong", "slowest s", "CPU s", "MiB")


def figures(rows: Rows) -> dict[str, dict[str, Any]]:
    """Plain numbers for each target, and for all of them under "all"."""
    found = {name: _figures(row) for name, row in rows.items()}
    total = np.sum(list(rows.values()), axis=0)
    total[Field.SLOWEST_NS] = max(row[Field.SLOWEST_NS] for row in rows.values())
    total[Field.RSS_KIB] = max(row[Field.RSS_KIB] for row in rows.values())
    return found | {"all": _figures(total)}


def failed(counted: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether anything is not as it should be."""
    total = counted["all"]
    return bool(total["crashes"] or total["hangs"] or total["wrong"] or total["peak_mib"] * 1024 > LARGEST_KIB)


def table(counted: Mapping[str, Mapping[str, Any]]) -> str:
    """For the terminal; refusals with their exit codes."""
    lines = ["{:18}{:>10}{:>10}  {:34}{:>8}{:>7}{:>7}{:>11}{:>8}{:>7}".format(*_COLUMNS)]
    for name, one in counted.items():
        refused = " ".join(f"{code}:{count}" for code, count in one["refused"].items())
        lines.append(
            f"{name:18}{one['mutants']:10,}{one['accepted']:10,}  {refused:34}{one['crashes']:8}{one['hangs']:7}"
            f"{one['wrong']:7}{one['slowest_s']:11.3f}{one['cpu_s']:8.1f}{one['peak_mib']:7.0f}"
        )
    return "\n".join(lines)


def _figures(row: npt.NDArray[np.int64]) -> dict[str, Any]:
    counts = {code: int(row[Field.REFUSED + place]) for place, code in enumerate(CODES)}
    return {
        "mutants": int(row[Field.MUTANTS]),
        "accepted": int(row[Field.ACCEPTED]),
        "refused": {code: count for code, count in counts.items() if count},
        "crashes": int(row[Field.CRASHES]),
        "hangs": int(row[Field.HANGS]),
        "wrong": int(row[Field.WRONG]),
        "slowest_s": float(row[Field.SLOWEST_NS]) / 1e9,
        "slowest_index": int(row[Field.SLOWEST_INDEX]),
        "cpu_s": float(row[Field.CPU_US]) / 1e6,
        "peak_mib": float(row[Field.RSS_KIB]) / 1024,
    }
