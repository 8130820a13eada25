"""Features of images and videos, kept by what they show: a picture that comes again is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from model.progress import Progress
from runtime.graphs import Graphs
from runtime.image_runs import image_runs
from runtime.media import MediaReader, Medium, Piece
from runtime.session import Array

LARGEST: Final = 256 << 20  # bytes


class FeatureCache:
    """Encodes images and videos, and keeps what was used last.

    Args:
        graphs: with the vision encoder.
        media: the bundle's reader.
        progress: told of encoding.
        budget: bytes to keep; what is larger alone is not kept.

    Attributes:
        encoded: images and videos that went through the encoder so far.
        bytes: that are kept now.
    """

    def __init__(self, graphs: Graphs, media: MediaReader, progress: Progress, budget: int = LARGEST) -> None:
        self.encoded = 0
        self.bytes = 0
        self._graphs, self._media, self._progress, self._budget = graphs, media, progress, budget
        self._kept: OrderedDict[str, Array] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def of(self, media: Sequence[tuple[str, Medium]], between: Callable[[], None] = lambda: None) -> list[Array]:
        """Features [tokens, hidden] of each.

        Args:
            media: scaled, each with its `runtime.media_key.media_key`.
            between: called before every run of the encoder.

        Raises:
            NumericalError, ResourceError: see `Graphs.encode`.
        """
        found: dict[str, Array] = {}
        missing: dict[str, Medium] = {}
        for key, medium in media:
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
            else:
                missing[key] = medium
        if missing:
            for key, features in zip(missing, self._encode(list(missing.values()), between), strict=True):
                found[key] = features
                self._keep(key, features)
        return [found[key] for key, _ in media]

    def _keep(self, key: str, features: Array) -> None:
        if features.nbytes > self._budget:
            return
        self._kept[key] = features
        self.bytes += features.nbytes
        while self.bytes > self._budget:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes

    def _encode(self, media: Sequence[Medium], between: Callable[[], None]) -> list[Array]:
        vision = self._graphs.config.vision
        if vision is None:
            raise ValueError("a text model has no features of images")
        pieces = [piece for medium in media for piece in self._media.pieces(medium)]
        parts = []
        self._progress.start("reading images", len(pieces), "images")
        try:
            for run in image_runs(pieces, vision.patch_size):
                between()
                values, grids = patches_of(self._media, run)
                parts.append(self._graphs.encode(values, grids, len(values) // vision.spatial_merge_size**2))
                self._progress.advance(len(run))
        finally:
            self._progress.finish()
        self.encoded += len(media)
        together = np.concatenate(parts)
        ends = np.cumsum([self._media.tokens(medium) for medium in media])
        # Copies, so that one that is kept does not hold the others.
        return [part.copy() for part in np.split(together, ends[:-1])]


def patches_of(media: MediaReader, run: Sequence[Piece]) -> tuple[Array, Array]:
    """Patches and grids of pieces that go through the encoder together."""
    values, grids = zip(*map(media.patches, run), strict=True)
    return np.concatenate(values), np.concatenate(grids)
