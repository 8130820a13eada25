"""Positions of texts under two models, and the figures that llama.cpp's perplexity tool prints of them.

Standard errors take positions as independent of each other, as that tool does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
_QUANTILES = {"p99_kld": 0.99, "p999_kld": 0.999}
_ROWS = 64  # log-probabilities in double precision are large


@dataclass(frozen=True)
class Scores:
    """Of some positions, each array [positions].

    Attributes:
        divergence: KL divergence of the bundle's distribution from the source's, nats.
        agrees: whether both like the same token best.
        found, expected: log-probability of the true next token under the bundle and under the source.
    """

    divergence: Floats
    agrees: npt.NDArray[np.bool_]
    found: Floats
    expected: Floats


@dataclass(frozen=True)
class Figures:
    """Of some positions; KL divergences in nats, shares and probabilities from 0 to 1.

    Attributes:
        tokens: number of positions.
        mean_kld, p99_kld, p999_kld, max_kld: of the positions' divergences.
        same_top: share of positions where both like the same token best.
        ppl, ppl_source: perplexity of the texts under the bundle and under the source.
        ppl_ratio: ppl / ppl_source.
        mean_dp, rms_dp: mean, and root of the mean square, of the difference that the bundle makes to the probability
            of the true token.
        standard_errors: name of a figure above → its standard error; the largest divergence has none, nor has
            anything of less than two positions. Of percentiles, half the distance between the order statistics one
            binomial standard deviation to either side.
    """

    tokens: int
    mean_kld: float
    p99_kld: float
    p999_kld: float
    max_kld: float
    same_top: float
    ppl: float
    ppl_source: float
    ppl_ratio: float
    mean_dp: float = 0.0
    rms_dp: float = 0.0
    standard_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """All but the standard errors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int | float)}


@dataclass(frozen=True)
class Quality(Figures):
    """Over all scored positions, and over parts of them.

    Attributes:
        groups: "modality" or "language" → "text", "image", "ko", ... → their positions' figures.
    """

    groups: Mapping[str, Mapping[str, Figures]] = field(default_factory=dict)


def compare(given: Logits, wanted: Logits, ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Scores:
    """Scores of some positions.

    Args:
        given, wanted: the bundle's and the source's logits [tokens, vocabulary].
        ids: the tokens [tokens].
        positions: which to score, all before the last token.
    """
    parts = []
    for start in range(0, len(positions), _ROWS):
        at = positions[start : start + _ROWS]
        parts.append(_compared(given[at], wanted[at], ids[at + 1]))
    return joined(parts)


def _compared(given: Logits, wanted: Logits, targets: npt.NDArray[np.int64]) -> Scores:
    q, p = _log_softmax(given), _log_softmax(wanted)
    divergence = np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)  # rounding can make it slightly negative; NaN stays
    rows = np.arange(len(targets))
    return Scores(divergence, q.argmax(-1) == p.argmax(-1), q[rows, targets], p[rows, targets])


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of all parts' positions."""
    if not parts:
        nothing = np.zeros(0)
        return Scores(nothing, nothing.astype(np.bool_), nothing, nothing)
    return Scores(
        np.concatenate([part.divergence for part in parts]),
        np.concatenate([part.agrees for part in parts]),
        np.concatenate([part.found for part in parts]),
        np.concatenate([part.expected for part in parts]),
    )


def summed_up(scores: Iterable[tuple[Mapping[str, str], Scores]]) -> Quality:
    """The figures of all positions and of every group.

    Args:
        scores: of each text, with its place in each kind of group: {"modality": "text", "language": "ko"}. An empty
            place is none.
    """
    texts = list(scores)
    groups: dict[str, dict[str, list[Scores]]] = {}
    for places, score in texts:
        for kind, place in places.items():
            if place:
                groups.setdefault(kind, {}).setdefault(place, []).append(score)
    found = {
        kind: {place: figures(joined(parts)) for place, parts in sorted(members.items())}
        for kind, members in groups.items()
    }
    return Quality(**vars(figures(joined([score for _, score in texts]))), groups=found)


def figures(scores: Scores) -> Figures:
    """Sums positions up; there is at least one."""
    gap = scores.found - scores.expected
    dp = np.exp(scores.found) - np.exp(scores.expected)
    ordered = np.sort(scores.divergence)
    rms = math.sqrt(float(np.mean(dp * dp)))
    ppl, ppl_source = (float(np.exp(-np.mean(values))) for values in (scores.found, scores.expected))
    ratio = float(np.exp(-np.mean(gap)))
    count = len(ordered)
    same = float(scores.agrees.mean())
    errors = {}
    if count > 1:
        errors = {
            "mean_kld": _error(scores.divergence),
            **{name: _quantile_error(ordered, share) for name, share in _QUANTILES.items()},
            "same_top": math.sqrt(same * (1 - same) / (count - 1)),
            "ppl": ppl * _error(scores.found),
            "ppl_source": ppl_source * _error(scores.expected),
            "ppl_ratio": ratio * _error(gap),
            "mean_dp": _error(dp),
            "rms_dp": _error(dp * dp) / (2 * rms) if rms else 0.0,
        }
    return Figures(
        tokens=count,
        mean_kld=float(ordered.mean()),
        p99_kld=float(np.quantile(ordered, 0.99)),
        p999_kld=float(np.quantile(ordered, 0.999)),
        max_kld=float(ordered[-1]),  # NaN is sorted to the end
        same_top=same,
        ppl=ppl,
        ppl_source=ppl_source,
        ppl_ratio=ratio,
        mean_dp=float(np.mean(dp)),
        rms_dp=rms,
        standard_errors=errors,
    )


def _error(values: Floats) -> float:
    """Standard error of a mean."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _quantile_error(ordered: Floats, share: float) -> float:
    count = len(ordered)
    middle, spread = count * share, math.sqrt(count * share * (1 - share))
    low, high = (min(max(round(place), 0), count - 1) for place in (middle - spread, middle + spread))
    return float(ordered[high] - ordered[low]) / 2


def _log_softmax(logits: Logits) -> Floats:
    wide: Floats = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide
