"""How far a bundle's next-token distribution is from its source's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from exaone_export.samples import Sample
from exaone_export.verifying.scores import Quality, Scores, compare, summed_up
from model.bundle import DECODER, int8_cache
from model.exaone import Exaone
from model.progress import Progress
from runtime.graphs import Graphs

CACHED_PIECE = 16  # tokens of a pass over a cache of integers


def measure_quality(model: Exaone, graphs: Graphs, samples: Sequence[Sample], progress: Progress) -> Quality:
    """Scores both models on the same sequences, every position given the true ones before it.

    Positions whose next token is an image placeholder are left out: nothing predicts those.

    Raises:
        ResourceError, BundleError, NumericalError: from running the bundle.
    """
    progress.start("measuring quality", len(samples), "prompts")
    scores = []
    for sample in samples:
        scores.append(({"modality": sample.modality, "language": sample.language}, _score(model, graphs, sample)))
        progress.advance(1)
    progress.finish()
    return summed_up(scores)


def _score(model: Exaone, graphs: Graphs, sample: Sample) -> Scores:
    ids, positions = np.array(sample.ids, np.int64), scored_positions(model, sample)
    return compare(bundle_logits(graphs, sample), eager_logits(model, sample), ids, positions)


def scored_positions(model: Exaone, sample: Sample) -> npt.NDArray[np.int64]:
    """Positions of a sample whose next token is a token of text."""
    media = [token for token in (model.config.image_token_id, model.config.video_token_id) if token is not None]
    return np.flatnonzero(~np.isin(np.array(sample.ids, np.int64)[1:], media)).astype(np.int64)


def eager_logits(model: Exaone, sample: Sample) -> npt.NDArray[np.float32]:
    """The model's logits of every position [tokens, vocabulary]."""
    pixels = grid = None
    if sample.images:
        pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in sample.images]))
        grid = torch.from_numpy(np.concatenate([grid for _, grid in sample.images]))
    with torch.inference_mode():
        logits, _, _ = model(torch.tensor([sample.ids]), pixels, grid)
    values: npt.NDArray[np.float32] = logits[0].numpy()
    return values


def bundle_logits(graphs: Graphs, sample: Sample) -> npt.NDArray[np.float32]:
    """The bundle's logits of every position [tokens, vocabulary]. Raises as `measure_quality`."""
    config = graphs.config
    features = None
    if sample.images and config.vision is not None:
        merge = config.vision.spatial_merge_size**2
        encoded = [graphs.encode(pixels, grid, int(grid.prod()) // merge) for pixels, grid in sample.images]
        features = np.concatenate(encoded)
    forward = graphs.forward(1, features, len(sample.ids))
    ids = np.array([sample.ids], np.int64)
    # A pass sees its own keys and values as they are: only what earlier ones cached shows what caching costs.
    size = CACHED_PIECE if int8_cache(graphs.manifest.graph(DECODER)) else ids.shape[1]
    logits: list[npt.NDArray[np.float32]] = []
    for start in range(0, ids.shape[1], size):
        piece = ids[:, start : start + size]
        logits.append(forward(piece, np.array([start + piece.shape[1]], np.int64), keep=0)[0])
    return np.concatenate(logits)
