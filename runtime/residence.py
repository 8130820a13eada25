"""A bundle on a device: which sessions it opens there, the cache's share of the memory, and passes that stay there."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from model.bundle import DECODER, VISION_ENCODER, WINDOW_SLACK, GraphInfo, Manifest, window_layers
from model.config import ExaoneConfig
from model.errors import BundleError, EnvironmentFault, NumericalError, UsageError
from model.memory import shown
from runtime.budget import Plan, Room, make_plan
from runtime.cache import CacheLayout
from runtime.device import NVIDIA, Device, host_value
from runtime.device_cache import DeviceCache
from runtime.device_features import Features, encode_into
from runtime.device_forward import DeviceForward
from runtime.device_step import Step
from runtime.execution import Execution
from runtime.placement import Placement
from runtime.providers import CPU, CUDA, short_name
from runtime.session import Array, GraphSession

_RECORDED: Final = "enable_cuda_graph"
_log = logging.getLogger("exaone_export.runtime")


@dataclass(frozen=True)
class Bundle:
    """What of a bundle has to be known: its folder, its manifest, and its configuration."""

    folder: Path
    manifest: Manifest
    config: ExaoneConfig


class Residence:
    """A bundle's graphs on one device.

    Args:
        bundle: what is loaded.
        provider: the execution provider.
        execution: what was asked for beside its name.
        graphs: all that may be loaded, which are planned for together.

    Attributes:
        device: where tensors lie.
    """

    def __init__(self, bundle: Bundle, provider: str, execution: Execution, graphs: Collection[GraphInfo]) -> None:
        self.device = Device(provider, execution.ep_options)
        self._bundle = bundle
        self._provider = provider
        self._execution = execution
        self._graphs = tuple(graphs)
        self._plan: Plan | None = None
        self._spare: Step | None = None
        self._opened = 0  # how often sessions were made anew

    @property
    def plan(self) -> Plan:
        """What goes where, reckoned once, before anything is loaded. Raises ResourceError or UsageError."""
        if self._plan is None:
            asked, free = self._execution.memory, self.device.free_bytes() if self.device.name == "cuda" else None
            budget = min((size for size in (asked, free) if size is not None), default=None)
            decoder = self._bundle.manifest.graph(DECODER)
            window = self._bundle.config.text.sliding_window or 0
            windows = window + WINDOW_SLACK[self.device.name] if decoder and window_layers(decoder) else 0
            room = Room(budget, self._bundle.config.text.max_position_embeddings, windows)
            execution = self._execution
            self._plan = make_plan(
                self._bundle.manifest, self._graphs, room, execution.gpu_layers, offload=asked is not None
            )
            if self._plan.host_layers:
                _log.warning("layers 0 to %d run on the CPU; cuda graphs are off", self._plan.host_layers[-1])
            if budget is not None:
                taken, cache = shown(self._plan.weights), shown(self._plan.cache or 0)
                _log.info("%s of device memory: weights %s, cache up to %s", shown(budget), taken, cache)
        return self._plan

    def open(self, graph: GraphInfo, threads: int) -> GraphSession:
        """A session of one graph, as planned.

        Raises:
            EnvironmentFault: decoding is to be recorded and cannot be, or a kernel is missing.
            BundleError, ResourceError, UsageError: see `GraphSession`.
        """
        host_layers = self.plan.host_layers if graph.name == DECODER else ()
        options = self._options()
        if self._records(graph):
            try:
                placement = Placement(options | {_RECORDED: "1"}, captures=True)
                return GraphSession(self._bundle.folder, graph, self._provider, threads, placement)
            except (BundleError, EnvironmentFault) as error:
                if self._execution.cuda_graph == "on":
                    remedy = "Leave out cuda_graph, or export with --target cuda"
                    raise EnvironmentFault("cannot record decoding", graph.file, error.why, remedy) from error
                _log.info("%s is not recorded as a cuda graph: %s", graph.file, error.why)
        placement = Placement(options, host_layers)
        session = GraphSession(self._bundle.folder, graph, self._provider, threads, placement)
        if host_layers:
            self._try(session)
        return session

    def _try(self, decoder: GraphSession) -> None:
        """Runs a decoder on one token: whether the CPU has the kernels of its layers is seen only then."""
        cache, binding, device = self._cache(decoder, 1), decoder.binding(), self.device
        cache.reserve(1)
        cache.bind(binding)
        for tensor in decoder.graph.inputs:
            if tensor.name in ("input_ids", "attention_mask"):
                binding.bind_cpu_input(tensor.name, np.ones((1, 1), np.int64))
            elif tensor.name == "inputs_embeds":
                embeds = host_value(np.zeros((1, 1, int(tensor.shape[2])), np.float32), tensor.dtype)
                binding.bind_ortvalue_input(tensor.name, embeds)
        binding.bind_output("logits", device.name, device.id)
        try:
            decoder.run_bound(binding)
        except BundleError as error:
            why = f"its layers cannot run on the CPU: {error.why}"
            remedy = "Leave out gpu_layers and gpu_memory, or use a bundle that fits"
            raise EnvironmentFault("cannot place layers", decoder.graph.file, why, remedy) from error

    def _records(self, graph: GraphInfo) -> bool:
        """Whether to try to record the steps of a graph."""
        wanted = self._provider == CUDA and self._execution.cuda_graph != "off"
        if wanted and graph.name == DECODER and self.plan.host_layers and self._execution.cuda_graph == "on":
            why = f"{len(self.plan.host_layers)} layers run on the CPU, and a graph is recorded only as a whole"
            raise UsageError("bad option", "cuda_graph", why, "Leave it out, or allow more gpu_memory")
        return wanted and graph.name == DECODER and not self.plan.host_layers

    def _options(self) -> dict[str, str]:
        """Of the provider; the user's own come last."""
        options: dict[str, str] = {}
        if self._provider == CUDA:
            options["arena_extend_strategy"] = "kSameAsRequested"  # not twice what is needed
            if self._execution.memory is not None and self.plan.budget is not None:
                # Weights do not lie in the arena that this bounds.
                options["gpu_mem_limit"] = str(max(self.plan.workspace, self.plan.budget - self.plan.weights))
        return options | dict(self._execution.ep_options)

    def forward(
        self,
        decoder: GraphSession,
        embedding: GraphSession | None,
        rows: int,
        features: Array | Features | None = None,
        expected: int = 0,
    ) -> DeviceForward:
        """The text model with an empty cache of `rows` rows.

        The buffers of the last request serve again where it had as many rows: what was recorded on them stays good.
        """
        step, self._spare = self._spare, None
        if step is None or step.cache.rows != rows:
            if step is not None and step.recording is not None:
                decoder.forget(step.recording)
            step = Step(self._cache(decoder, rows), records=decoder.captures)
        media = (self._bundle.config.image_token_id, self._bundle.config.video_token_id)
        media_ids = [token for token in media if token is not None]
        given = self.placed(features) if isinstance(features, np.ndarray) else features
        forward = DeviceForward(decoder, embedding, self.device, step, given, media_ids, expected)
        weakref.finalize(forward, self._give_back, step, self._opened).atexit = False
        return forward

    def _give_back(self, step: Step, opened: int) -> None:
        if opened == self._opened:
            self._spare = step

    def _cache(self, decoder: GraphSession, rows: int) -> DeviceCache:
        text = self._bundle.config.text
        layout = CacheLayout.of(decoder.graph, text.sliding_window)
        host_layers = self.plan.host_layers
        return DeviceCache(
            decoder.graph, layout, rows, text.max_position_embeddings, self.device, host_layers, self._cache_budget
        )

    def _cache_budget(self, held: int) -> int | None:
        """Bytes for the cache, those that it holds among them: the plan's, and no more than are free."""
        free = self.device.free_bytes()
        limits = [self.plan.cache, None if free is None else max(0, free + held - self.plan.workspace // 2)]
        return min((limit for limit in limits if limit is not None), default=None)

    def features(self, tokens: int) -> Features:
        """Room for the features of images. Raises ResourceError."""
        encoder = self._bundle.manifest.graph(VISION_ENCODER)
        if encoder is None:
            raise UsageError("cannot use image", "images", "this model reads text only", "Leave the images out")
        info = next(tensor for tensor in encoder.outputs if tensor.name == "image_features")
        return Features(self.device.empty((tokens, int(info.shape[1])), info.dtype))

    def encode(self, session: GraphSession, feeds: dict[str, Array], features: Features, tokens: int) -> None:
        """Encodes images, and puts their features behind those that are there.

        Raises:
            NumericalError: the encoder gives NaN, Inf or another number of rows.
        """
        target = features.tensor.part(features.filled, tokens)
        encode_into(session, self.device, feeds, target)
        if not self.device.is_finite(target):
            why = "NaN or Inf"
            raise NumericalError("vision encoder failed", "image_features", why, "Check the bundle with verify")
        features.filled += tokens

    def placed(self, features: Array) -> Features:
        """Features from the host's memory, on the device."""
        placed = self.features(len(features))
        placed.tensor.value.update_inplace(host_value(features, placed.tensor.dtype))
        placed.filled = len(features)
        return placed

    def facts(self) -> dict[str, Any]:
        """What a report may tell: bytes as planned, of weights and of the cache now, and the layers on the CPU."""
        held = self._spare.cache.held_bytes if self._spare is not None else 0
        plan = self.plan
        return {
            "budget": plan.budget,
            "weights": plan.weights,
            "cache": held,
            "workspace": plan.workspace,
            "host_layers": list(plan.host_layers),
            "recorded": self._spare is not None and self._spare.recording is not None,
        }

    def close(self) -> None:
        """Frees what was kept for the next request."""
        self._spare = None
        self._opened += 1


def residence_of(
    bundle: Bundle, provider: str, execution: Execution, graphs: Collection[GraphInfo]
) -> Residence | None:
    """Where a bundle lives, if that is a device; None where tensors pass through the host.

    Raises:
        UsageError: something is asked for that the provider has not.
    """
    if _RECORDED in execution.ep_options:
        raise UsageError("bad option", "ep_options", f"{_RECORDED} is set by cuda_graph", "Use cuda_graph")
    if provider in NVIDIA:
        return Residence(bundle, provider, execution, graphs)
    own = execution.fixed_buffers
    for name in ("gpu_layers", "gpu_memory"):
        if getattr(execution, name) is not None and not own:
            why = f"the bundle runs on {short_name(provider)}, which has no memory of its own to share out"
            raise UsageError("bad option", name, why, "Use --ep cuda")
    if execution.cuda_graph == "on":
        why = f"the bundle runs on {short_name(provider)}"
        raise UsageError("bad option", "cuda_graph", why, "Use --ep cuda")
    if provider == CPU and execution.ep_options:
        why = f"the cpu takes no options ({', '.join(execution.ep_options)[:60]})"
        raise UsageError("bad option", "ep_options", why, "Leave them out, or name another --ep")
    return Residence(bundle, provider, execution, graphs) if own else None
