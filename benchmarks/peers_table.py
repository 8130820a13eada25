"""Figures of several engines, measured in turns, as medians and as ratios of the same round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MIB = 1e6


@dataclass
class Measured:
    """What is known of one engine with one file.

    Attributes:
        name, megabytes, version: of it.
        ours: whether the engine is ours.
        load_s: of every time it was loaded.
        peak_bytes: after the run that warms up, of the prompt that `prefill` names.
        prefill: context → seconds to the first token, one for each round.
        decode: context → seconds for one token after it, one for each round.
    """

    name: str
    megabytes: float
    version: str = ""
    load_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    prefill: dict[int, list[float]] = field(default_factory=dict)
    decode: dict[int, list[float]] = field(default_factory=dict)
    ours: bool = False


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the baseline: median, least and most over rounds."""

    median: float
    least: float
    most: float


def ratio(times: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Speeds are compared within a round, where the machine was the same."""
    found = sorted(theirs / ours for ours, theirs in zip(times, baseline, strict=True))
    return Ratio(statistics.median(found), found[0], found[-1])


def table(results: Sequence[Measured], baseline: Measured, prefill: int, contexts: Sequence[int]) -> str:
    """A Markdown table: median tokens a second, and in brackets the ratio to the baseline with its range."""
    headings = ["", "file, MB", f"prefill {prefill}, tokens/s", *(f"decode after {context}" for context in contexts)]
    lines = [[*headings, "load, s", f"peak RSS at {prefill}, MB"]]
    lines.append(["---"] * len(lines[0]))
    for one in results:
        cells = [one.name, f"{one.megabytes:.0f}", _cell(one.prefill, baseline.prefill, prefill, prefill)]
        cells += [_cell(one.decode, baseline.decode, context, 1) for context in contexts]
        lines.append([*cells, f"{statistics.median(one.load_s):.2f}", f"{one.peak_bytes / MIB:.0f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def against(results: Sequence[Measured], prefill: int, contexts: Sequence[int]) -> str:
    """A Markdown table: how many times as fast each of ours is as each of the others; empty without both kinds."""
    pairs = [(mine, other) for mine in results if mine.ours for other in results if not other.ours]
    lines = [["", "over", f"prefill {prefill}", *(f"decode after {context}" for context in contexts)]]
    lines.append(["---"] * len(lines[0]))
    for mine, other in pairs:
        cells = [_ratio(mine.prefill, other.prefill, prefill)]
        cells += [_ratio(mine.decode, other.decode, context) for context in contexts]
        lines.append([mine.name, other.name, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if pairs else ""


def _ratio(mine: Mapping[int, Sequence[float]], other: Mapping[int, Sequence[float]], context: int) -> str:
    if not mine.get(context) or not other.get(context):
        return "–"
    found = ratio(mine[context], other[context])
    return f"{found.median:.2f} ({found.least:.2f}–{found.most:.2f})"


def _cell(
    mine: Mapping[int, Sequence[float]], baseline: Mapping[int, Sequence[float]], context: int, tokens: int
) -> str:
    times = mine.get(context)
    if not times:
        return "–"
    speed = tokens / statistics.median(times)
    shown = f"{speed:.0f}" if tokens > 1 else f"{speed:.1f}"
    if mine is baseline:
        return shown
    found = ratio(times, baseline[context])
    return f"{shown} (× {found.median:.2f}; {found.least:.2f}–{found.most:.2f})"


def as_json(results: Sequence[Measured], baseline: Measured) -> list[dict[str, Any]]:
    """Every time that was measured, and the ratios: to the baseline, and of ours to every other engine."""
    rows: list[dict[str, Any]] = []
    for one in results:
        others = {other.name: _ratios(one, other) for other in results if one.ours and not other.ours}
        rows.append({**vars(one), "ratios": _ratios(one, baseline), "against": others})
    return rows


def _ratios(one: Measured, other: Measured) -> dict[str, dict[str, dict[str, float]]]:
    return {
        kind: {
            str(context): vars(ratio(times, getattr(other, kind)[context]))
            for context, times in getattr(one, kind).items()
        }
        for kind in ("prefill", "decode")
    }
