"""A bundle's graphs, opened when they are first needed, and what runs on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from model.bundle import (
    DECODER,
    EMBEDDING,
    MTP,
    VISION_ENCODER,
    GraphInfo,
    Manifest,
    check_contents,
    check_sizes,
    int8_cache,
    read_manifest,
)
from model.config import SLIDING, ExaoneConfig, load_config
from model.errors import BundleError, CheckpointError, NumericalError, UsageError
from model.memory import weight_bytes
from model.progress import NullProgress, Progress
from model.tasks import TASKS, graphs_of
from runtime.agreement import check_agreement
from runtime.bound import EmbeddedTokens
from runtime.cache import CacheLayout, KVCache
from runtime.device_features import Features
from runtime.execution import Execution
from runtime.forward import TextForward
from runtime.huge_pages import give_back
from runtime.image import Grid, PixelValues
from runtime.memory import check_image, check_weights
from runtime.placement import Placement, check_kernels
from runtime.providers import CPU, choose_provider, choose_threads, short_name
from runtime.residence import Bundle, residence_of
from runtime.rows import RowPasses
from runtime.session import Array, GraphSession
from runtime.speculation_drafts import DraftHead

_log = logging.getLogger("exaone_export.runtime")
_SPARE_HEADS = 2
_SMALL_HEAD = 16 << 20  # bytes of weights


class Graphs:
    """The graphs of one bundle.

    Args:
        folder: the bundle.
        ep: see `runtime.providers.choose_provider`; "auto" is the CPU for a bundle exported for the CPU.
        threads: see `runtime.providers.choose_threads`.
        progress: told of every graph that is opened.
        execution: more about a provider other than the CPU's.

    Attributes:
        manifest, config: of the bundle.
        residence: where tensors lie between graphs, if that is a device; None on the host.
        load_s: seconds spent opening graphs so far.

    Raises:
        BundleError: the bundle is damaged: a file is missing or of another size, or graphs and configuration disagree.
        EnvironmentFault: the execution provider cannot be had, or the bundle was made by a newer version.
        UsageError: `ep` or `threads` make no sense.
    """

    def __init__(
        self,
        folder: Path,
        ep: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
        execution: Execution | None = None,
    ) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        check_sizes(folder, self.manifest)
        check_contents(folder, self.manifest)
        self.config = bundle_config(folder, self.manifest.task)
        check_agreement(self.manifest, self.config)
        self.load_s = 0.0
        self._threads = choose_threads(threads)
        self._provider = _provider_for(self.manifest, ep)
        asked = execution or Execution()
        own = Bundle(folder, self.manifest, self.config)
        self.residence = residence_of(own, self._provider, asked, self._wanted())
        self._placement = Placement(asked.ep_options)
        self._progress = progress or NullProgress()
        self._sessions: dict[str, GraphSession] = {}
        self._embedded: EmbeddedTokens | None = None
        self._heads: list[DraftHead] = []  # that nobody uses

    @property
    def ep(self) -> str:
        """Short name of the execution provider."""
        return short_name(self._provider)

    @property
    def context(self) -> int:
        """Tokens of the longest sequence the model takes."""
        return self.config.text.max_position_embeddings

    def open(self, images: bool = True) -> None:
        """Opens what is not open yet; without `images`, the vision encoder is left alone.

        Raises:
            ResourceError: the weights are larger than the free memory.
            BundleError, EnvironmentFault: see `GraphSession`.
        """
        infos = [info for info in self._wanted(images) if info.name not in self._sessions]
        if self.residence is None:
            check_weights(self.manifest, infos)
        self._open(infos)

    def _open(self, infos: Iterable[GraphInfo]) -> None:
        for info in infos:
            start = time.perf_counter()
            size = weight_bytes(self.manifest, [info])
            self._progress.start(f"loading {info.name}", size, "bytes")
            # A lookup gains nothing from threads, nor does a small head, and idle ones spin against the decoder's.
            small = info.name == EMBEDDING or (info.name == MTP and size < _SMALL_HEAD)
            threads = 1 if small else self._threads
            self._sessions[info.name] = self._opened(info, threads)
            self._progress.advance(size)
            self._progress.finish()
            self.load_s += time.perf_counter() - start

    def _wanted(self, images: bool = True) -> list[GraphInfo]:
        """The graphs that the task runs, without the vision encoder unless there are `images`."""
        names = graphs_of(self.config.task, vision=self.config.vision is not None)
        infos = [info for name in names if (info := self.manifest.graph(name)) is not None]
        return [info for info in infos if images or info.name != VISION_ENCODER]

    def _opened(self, info: GraphInfo, threads: int) -> GraphSession:
        check_kernels(self.manifest, info, self._provider)
        if self.residence is None:
            return GraphSession(self.folder, info, self._provider, threads, self._placement)
        return self.residence.open(info, threads)

    def session(self, name: str) -> GraphSession:
        """One graph, opened if it is not open yet. Raises as `open`."""
        self.open(images=name == VISION_ENCODER)
        return self._sessions[name]

    def encode(self, pixel_values: PixelValues, grid: Grid, tokens: int) -> Array:
        """Features [tokens, hidden] of one image or several, one after the other, in the host's memory.

        Raises:
            NumericalError: the encoder gives NaN, Inf or another number of rows.
            ResourceError: the image is too large for the memory.
        """
        into = self.features_on_device(tokens)
        if into is not None and self.residence is not None:
            self.encode_onto(into, pixel_values, grid, tokens)
            return self.residence.device.read(into.tensor)
        session = self._encoder(len(pixel_values))
        dtype = next(tensor.dtype for tensor in session.graph.inputs if tensor.name == "pixel_values")
        feeds = {"pixel_values": pixel_values.astype(dtype, copy=False), "image_grid_thw": grid}
        features = session.run(feeds, ["image_features"])[0]
        if len(features) != tokens:
            raise _vision_fault(f"{len(features)} rows, {tokens} expected")
        if not np.isfinite(features).all():
            raise _vision_fault("NaN or Inf")
        return features

    def features_on_device(self, tokens: int) -> Features | None:
        """Room for features that stay on the device; None where they are in the host's memory."""
        return None if self.residence is None else self.residence.features(tokens)

    def encode_onto(self, into: Features, pixel_values: PixelValues, grid: Grid, tokens: int) -> None:
        """As `encode`, with the features put behind those that are there already. Raises as that."""
        if self.residence is None:
            raise ValueError("nothing is on a device")
        feeds: dict[str, Array] = {"pixel_values": pixel_values, "image_grid_thw": grid}
        self.residence.encode(self._encoder(len(pixel_values)), feeds, into, tokens)

    def _encoder(self, patches: int) -> GraphSession:
        """The vision encoder, after a look at the memory."""
        if self.config.vision is None:
            raise UsageError("cannot use image", "images", "this model reads text only", "Leave the images out")
        session = self.session(VISION_ENCODER)
        check_image(self.config.vision, patches, self.residence.device.free_bytes() if self.residence else None)
        return session

    @property
    def media_ids(self) -> frozenset[int]:
        """Ids of the placeholders for images and videos."""
        ids = (self.config.image_token_id, self.config.video_token_id)
        return frozenset(token for token in ids if token is not None)

    @property
    def pad_id(self) -> int:
        """An id for what has no meaning: the model's own, if that is no placeholder."""
        own = self.config.pad_token_id
        if own is not None and own not in self.media_ids:
            return own
        return min(set(range(len(self.media_ids) + 1)) - self.media_ids)

    def forward(self, rows: int, features: Array | Features | None = None, expected: int = 0) -> RowPasses:
        """The text model with an empty cache of `rows` rows; the rest as in `TextForward`."""
        self.open(images=False)
        decoder, embedding = self._sessions[DECODER], self._sessions.get(EMBEDDING)
        if self.residence is not None:
            return self.residence.forward(decoder, embedding, rows, features, expected)
        layout = CacheLayout.of(decoder.graph, self.config.text.sliding_window)
        cache = KVCache(layout, rows, self.context)
        given = features if isinstance(features, np.ndarray) else None
        return TextForward(decoder, embedding, cache, given, self.media_ids, expected, self._known(embedding))

    def _known(self, embedding: GraphSession | None) -> EmbeddedTokens | None:
        if self._embedded is None and embedding is not None:
            self._embedded = EmbeddedTokens(embedding)
        return self._embedded

    def placed(self, features: Array) -> Array | Features:
        """Features where `RowPasses.give` takes them: on the device, if there is one."""
        return features if self.residence is None else self.residence.placed(features)

    def draft_head(self) -> DraftHead | None:
        """The checkpoint's draft head with an empty cache, opened if it is not open yet; None where there is none, or
        where the decoder is not on the host. Raises as `open`.
        """
        info, embedded = self.manifest.graph(MTP), self._known(self._sessions.get(EMBEDDING))
        if info is None or embedded is None or self.residence is not None:
            return None
        if self._heads:
            return self._heads.pop()
        if MTP not in self._sessions:
            check_weights(self.manifest, [info])
            self._open([info])
        window, head = self.config.text.sliding_window, self.config.mtp
        sees = window * head.num_layers if window and head and head.layer_type == SLIDING else None
        return DraftHead(self._sessions[MTP], embedded, window, self.context, sees)

    def keep_head(self, head: DraftHead) -> None:
        """Takes a draft head that is not used any more, for another answer: its memory is warm."""
        head.reset()
        if head.session is self._sessions.get(MTP) and len(self._heads) < _SPARE_HEADS:
            self._heads.append(head)

    def close(self) -> None:
        """Frees the graphs; they are opened again when needed."""
        self._sessions.clear()
        self._heads.clear()
        self._embedded = None
        if self.residence is not None:
            self.residence.close()
        give_back()


def _provider_for(manifest: Manifest, ep: str) -> str:
    """As `choose_provider`, but "auto" takes CUDA only for a bundle that was made for it."""
    provider = choose_provider(short_name(CPU) if ep.lower() == "auto" and manifest.target == "cpu" else ep)
    if provider != CPU and int8_cache(manifest.graph(DECODER)):
        why = "its keys and values are integers, for which the CPU alone has kernels"
        raise UsageError("cannot run bundle", f"--ep {short_name(provider)}", why, "Use --ep cpu")
    if provider != CPU and manifest.target == "cpu":
        _log.warning("the bundle was exported for the CPU; %s may lack kernels for it", short_name(provider))
    return provider


def bundle_config(folder: Path, task: str) -> ExaoneConfig:
    """A bundle's config.json.

    Raises:
        BundleError: it is damaged, or there is no such task.
    """
    if task not in TASKS:
        why = f"it says that the bundle is for {task[:60]!r}, which is no known task"
        raise BundleError("damaged bundle", "exaone_export.json", why, "Export the model again")
    try:
        return replace(load_config(folder), task=task)
    except (CheckpointError, UsageError) as error:
        # The same file that is the user's fault in a checkpoint is damage in a bundle.
        raise BundleError("damaged bundle", error.where, error.why, "Export the model again") from error


def _vision_fault(why: str) -> NumericalError:
    return NumericalError("vision encoder failed", "image_features", why, "Check the bundle with verify")
