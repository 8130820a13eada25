"""ONNX Runtime sessions, one for each graph, with every failure as one of our errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from model.bundle import VISION_ENCODER, GraphInfo, bundle_path
from model.errors import BundleError, EnvironmentFault, ExaoneError, ResourceError, UsageError
from runtime.device import NVIDIA
from runtime.graph_check import check_graph, too_new
from runtime.huge_pages import huge_pages
from runtime.mapping import MappedWeights
from runtime.placement import Placement, check_nodes
from runtime.providers import CPU, CUDA, advice, faults, onnxruntime, short_name
from runtime.saturation import EXACT_PRODUCTS, needs_exact_products

Array = npt.NDArray[Any]

_RECORDING = "gpu_graph_id"
_NOT_RECORDED = "-1"
_WITHOUT_WINDOWS = "Upgrade onnxruntime to 1.29 or newer, or export with --kv-cache full"
# What older versions say of operators, or of their attributes and inputs, that came after them.
_TOO_NEW = ("opset", "ir version", "unrecognized attribute", "not in range [min")


class GraphSession:
    """One opened graph.

    Args:
        folder: the bundle.
        graph: its entry in the manifest.
        provider: from `choose_provider`.
        threads: from `choose_threads`.
        placement: what of it runs where, on a provider that is not the CPU's.

    Attributes:
        graph: as given.
        device: "cuda" where it computes in a GPU's memory, else "cpu".
        captures: whether runs with a number of their own are recorded, and replayed when they come again.

    Raises:
        UsageError: the provider refuses an option.
        BundleError: the file is missing, damaged, or not what the manifest says.
        EnvironmentFault: the provider is not the one asked for, or onnxruntime is too old for the graph.
        ResourceError: not enough memory.
    """

    def __init__(
        self, folder: Path, graph: GraphInfo, provider: str, threads: int, placement: Placement | None = None
    ) -> None:
        placement = placement or Placement()
        self.graph = graph
        self.provider = provider
        self.device = "cuda" if provider in NVIDIA else "cpu"
        self.captures = placement.captures
        ort = onnxruntime()
        path = bundle_path(folder, graph.file)
        check_graph(folder, graph)
        options = _session_options(ort, graph, threads, needs_exact_products(path))
        for name, value in placement.session_entries(provider).items():
            options.add_session_config_entry(name, value)
        # Only the CPU can use the weights where they lie.
        weights = MappedWeights(folder, graph if provider == CPU else None)
        weights.lend(options)
        try:
            chosen = _providers(ort, provider, placement)
            with weights.released_meanwhile(), huge_pages(weights.bytes):
                self._session = ort.InferenceSession(_named(path), options, providers=chosen, enable_fallback=0)
        except faults() as reason:
            raise _load_error(graph, reason, provider) from reason
        self._weights = weights  # which the session reads as long as it lives
        self._run_options = _run_options(ort, graph, provider, placement)
        self._numbered: dict[int, Any] = {}
        # Where nothing is recorded, bound runs need no options at all.
        self._bound_options = self._run_options if self.captures else None
        got = self._session.get_providers()[0]
        if got != provider:
            why = f"asked for {short_name(provider)}, onnxruntime took {short_name(got)}"
            raise EnvironmentFault("execution provider missing", graph.file, why, advice(provider))
        check_nodes(self._session, graph.file, provider, placement)
        try:
            self._check_interface()
        except UnicodeDecodeError:
            why = "the name of an input, an output or a size is not UTF-8"
            raise BundleError("damaged bundle", graph.file, why, "Export or copy the bundle again") from None

    def _check_interface(self) -> None:
        session = self._session
        for side, declared, found in (
            ("inputs", [t for t in self.graph.inputs if not t.optional], session.get_inputs()),
            ("outputs", self.graph.outputs, session.get_outputs()),
        ):
            expected = {tensor.name: len(tensor.shape) for tensor in declared}
            actual = {node.name: len(node.shape) for node in found}
            if expected != actual:
                differing = sorted(expected.items() ^ actual.items())[0][0]
                why = f"{side} are not those of the manifest ({differing[:80]!r} differs)"
                raise BundleError("damaged bundle", self.graph.file, why, "Export or copy the bundle again")

    def has_input(self, name: str) -> bool:
        """Whether the graph takes this input, optional ones included."""
        return any(tensor.name == name for tensor in self.graph.inputs)

    def reads_on_device(self, name: str) -> bool:
        """Whether an input is read where the session computes; one read on the host is copied there when it is bound,
        and what is written on the device afterwards is not seen.
        """
        if self.device == "cpu" or not hasattr(self._session, "get_input_memory_infos"):
            return True
        places = zip(self._session.get_inputs(), self._session.get_input_memory_infos(), strict=True)
        return all(not place.name.lower().startswith("cpu") for node, place in places if node.name == name)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Runs the graph on arrays. Raises as `run_bound`."""
        self._weights.check_unchanged()
        with _guard(self.graph):
            results: list[Array] = self._session.run(list(outputs), dict(feeds), self._run_options)
        return results

    def binding(self) -> Any:
        """A new onnxruntime IOBinding of this session."""
        return self._session.io_binding()

    def run_bound(self, binding: Any, lean: bool = False, record: int | None = None) -> None:
        """Runs the graph on what is bound.

        Args:
            binding: from `binding`.
            lean: let go of pages of the weights' files meanwhile, for long runs.
            record: number of a recording, for a session that captures. The first run with it in a thread is recorded,
                and done more than once on the way; later ones replay it, on the addresses that were bound then.

        Raises:
            ResourceError: not enough memory.
            BundleError: the graph fails on inputs that fit the manifest, or its weights are no longer those it opened.
        """
        self._weights.check_unchanged()
        options = self._bound_options if record is None else self._record_options(record)
        if not lean:
            # As `_guard`, which takes longer.
            try:
                self._session.run_with_iobinding(binding, options)
            except faults() as reason:
                raise _run_error(self.graph, reason) from reason
            return
        with _guard(self.graph), self._weights.released_meanwhile(running=True):
            self._session.run_with_iobinding(binding, options)

    def _record_options(self, record: int) -> Any:
        if record not in self._numbered:
            self._numbered[record] = onnxruntime().RunOptions()
            self._numbered[record].add_run_config_entry(_RECORDING, str(record))
        return self._numbered[record]

    def forget(self, record: int) -> None:
        """Frees a recording, where this onnxruntime can."""
        self._numbered.pop(record, None)
        if hasattr(self._session, "release_captured_graph"):
            with _guard(self.graph):
                self._session.release_captured_graph(record)

    def release_weights(self) -> None:
        """Lets go of pages of the weights' files: after many lookups in tables, little of which is wanted again."""
        self._weights.release()

    def tensor(self, array: Array, device: str = "cpu") -> Any:
        """An onnxruntime OrtValue; on the CPU it shares the array's memory, which the caller keeps alive."""
        with _guard(self.graph):
            return onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)


@contextmanager
def _guard(graph: GraphInfo) -> Iterator[None]:
    """Turns onnxruntime's exceptions during a run into ours."""
    try:
        yield
    except faults() as reason:
        raise _run_error(graph, reason) from reason


def _run_error(graph: GraphInfo, reason: BaseException) -> ExaoneError:
    if _is_out_of_memory(reason):
        return _out_of_memory("cannot run graph", graph)
    why = f"onnxruntime fails: {_short(reason)}"
    return BundleError("cannot run graph", graph.file, why, "Check the bundle with verify")


class _RawPath(os.PathLike[bytes]):
    """A path as the bytes that it is."""

    def __init__(self, path: Path) -> None:
        self._name = os.fsencode(path)

    def __fspath__(self) -> bytes:
        return self._name


def _named(path: Path) -> str | os.PathLike[bytes]:
    """A path as onnxruntime takes it, which refuses text that is not UTF-8 and takes bytes only as a path's."""
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return _RawPath(path)
    return text


def _session_options(ort: ModuleType, graph: GraphInfo, threads: int, exact: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is told in our errors, once
    # A number other than 0 also keeps onnxruntime from pinning threads to cores this process may not use.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Patterns are kept per set of input shapes, and here every step has its own.
    options.enable_mem_pattern = False
    # A result that takes the place of an earlier one of its shape keeps that place to the end: a third more memory
    # for the encoder, whose results are large.
    options.enable_mem_reuse = graph.name != VISION_ENCODER
    if exact:
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
    return options


def _providers(ort: ModuleType, provider: str, placement: Placement) -> list[Any]:
    """In the order in which they may take nodes; the CPU is always the last."""
    if provider == CPU:
        return [provider]
    chosen: list[Any] = [(provider, dict(placement.provider_options))]
    if provider in NVIDIA and provider != CUDA and CUDA in ort.get_available_providers():
        chosen.append(CUDA)  # for what TensorRT has no layers for
    return [*chosen, CPU]


def _run_options(ort: ModuleType, graph: GraphInfo, provider: str, placement: Placement) -> Any:
    """Without the arena every result would be of new pages, a fifth of the encoder's time; with it, the largest
    image's memory would be kept for ever. So the encoder's is given back after each run.
    """
    options = ort.RunOptions()
    if graph.name == VISION_ENCODER:
        place = f"gpu:{placement.device_id}" if provider in NVIDIA else "cpu:0"
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", place)
    if placement.captures:
        options.add_run_config_entry(_RECORDING, _NOT_RECORDED)
    return options


def _load_error(graph: GraphInfo, reason: BaseException, provider: str) -> ExaoneError:
    text = str(reason)
    if "provider option" in text.lower():
        why = f"{short_name(provider)} refuses it: {_short(reason)}"
        return UsageError("bad option", "ep_options", why, "See the provider's own list of options")
    if _is_out_of_memory(reason):
        return _out_of_memory("cannot load graph", graph)
    version = onnxruntime().__version__
    if newer := too_new(graph, text, version):
        return newer
    if any(sign in text.lower() for sign in _TOO_NEW):
        why = f"onnxruntime {version} is too old for it: {_short(reason)}"
        remedy = _WITHOUT_WINDOWS if "sliding_window_cache" in text else "Upgrade onnxruntime"
        return EnvironmentFault("cannot load graph", graph.file, why, remedy)
    if type(reason).__name__ == "NotImplemented":
        return EnvironmentFault(
            "cannot load graph", graph.file, f"this onnxruntime lacks a kernel: {_short(reason)}", "Use another --ep"
        )
    return BundleError("damaged bundle", graph.file, f"onnxruntime refuses it: {_short(reason)}", "Export it again")


def _is_out_of_memory(reason: BaseException) -> bool:
    text = str(reason).lower()
    return isinstance(reason, MemoryError) or any(
        sign in text for sign in ("failed to allocate memory", "bad_alloc", "out of memory", "bad allocation")
    )


def _out_of_memory(what: str, graph: GraphInfo) -> ResourceError:
    return ResourceError(what, graph.file, "not enough memory", "Free memory, or use a smaller prompt, image or batch")


def _short(reason: BaseException) -> str:
    """The kind of failure and its last clause, without paths."""
    if isinstance(reason, UnicodeDecodeError):
        return "unreadable"
    line = " ".join(str(reason).split())
    line = line.rpartition(" : ")[2].rpartition(" , Error ")[2]
    words = [word for word in line.split() if "/" not in word and "\\" not in word]
    return f"{type(reason).__name__} ({' '.join(words)[:160]})"
