"""How far a bundle's next-token distribution is from its source's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from exaone_export.samples import Sample
from model.exaone import Exaone
from model.progress import Progress
from runtime.graphs import Graphs

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """Figures over all scored positions; KL divergence is of the bundle's distribution from the source's, in nats.

    Attributes:
        tokens: number of positions.
        mean_kld, p99_kld, p999_kld, max_kld: of the positions' divergences.
        same_top: share of positions where both like the same token best.
        ppl, ppl_source: perplexity of the texts under the bundle and under the source.
        ppl_ratio: ppl / ppl_source.
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


@dataclass(frozen=True)
class _Scores:
    """Of one sample's positions: divergence, whether the top token agrees, log-probabilities of the next token."""

    divergence: Floats
    agrees: npt.NDArray[np.bool_]
    found: Floats
    expected: Floats


def measure_quality(model: Exaone, graphs: Graphs, samples: Sequence[Sample], progress: Progress) -> Quality:
    """Scores both models on the same sequences, every position given the true ones before it.

    Positions whose next token is an image placeholder are left out: nothing predicts those.

    Raises:
        ResourceError, BundleError, NumericalError: from running the bundle.
    """
    progress.start("measuring quality", len(samples), "prompts")
    scores = []
    for sample in samples:
        scores.append(_score(model, graphs, sample))
        progress.advance(1)
    progress.finish()
    divergence = np.concatenate([score.divergence for score in scores])
    found, expected = (
        -float(np.mean(np.concatenate(part))) for part in zip(*((s.found, s.expected) for s in scores), strict=True)
    )
    return Quality(
        tokens=len(divergence),
        mean_kld=float(divergence.mean()),
        p99_kld=float(np.quantile(divergence, 0.99)),
        p999_kld=float(np.quantile(divergence, 0.999)),
        max_kld=float(divergence.max()),
        same_top=float(np.concatenate([score.agrees for score in scores]).mean()),
        ppl=float(np.exp(found)),
        ppl_source=float(np.exp(expected)),
        ppl_ratio=float(np.exp(found - expected)),
    )


def _score(model: Exaone, graphs: Graphs, sample: Sample) -> _Scores:
    ids = np.array([sample.ids], np.int64)
    wanted = _eager_logits(model, sample)
    given = _bundle_logits(graphs, sample)
    parts = []
    media = [token for token in (model.config.image_token_id, model.config.video_token_id) if token is not None]
    positions = np.flatnonzero(~np.isin(ids[0, 1:], media))
    for start in range(0, len(positions), 64):  # log-probabilities in double precision are large
        at = positions[start : start + 64]
        parts.append(_compare(given[at], wanted[at], ids[0, at + 1]))
    return _Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _compare(
    given: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.float64] | npt.NDArray[np.bool_]]:
    q, p = _log_softmax(given), _log_softmax(wanted)
    yield np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)  # rounding can make it slightly negative; NaN stays
    yield q.argmax(-1) == p.argmax(-1)
    rows = np.arange(len(targets))
    yield q[rows, targets]
    yield p[rows, targets]


def _log_softmax(logits: npt.NDArray[np.float32]) -> Floats:
    wide: Floats = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def _eager_logits(model: Exaone, sample: Sample) -> npt.NDArray[np.float32]:
    pixels = grid = None
    if sample.images:
        pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in sample.images]))
        grid = torch.from_numpy(np.concatenate([grid for _, grid in sample.images]))
    with torch.inference_mode():
        logits, _, _ = model(torch.tensor([sample.ids]), pixels, grid)
    values: npt.NDArray[np.float32] = logits[0].numpy()
    return values


def _bundle_logits(graphs: Graphs, sample: Sample) -> npt.NDArray[np.float32]:
    config = graphs.config
    features = None
    if sample.images and config.vision is not None:
        merge = config.vision.spatial_merge_size**2
        encoded = [graphs.encode(pixels, grid, int(grid.prod()) // merge) for pixels, grid in sample.images]
        features = np.concatenate(encoded)
    forward = graphs.forward(1, features, len(sample.ids))
    ids = np.array([sample.ids], np.int64)
    logits: npt.NDArray[np.float32] = forward(ids, np.array([ids.shape[1]], np.int64), keep=0)[0]
    return logits
