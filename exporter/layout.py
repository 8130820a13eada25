"""Where a bundle's graphs lie and what their files are called: as our own runtime has them, or as transformers.js does.

transformers.js looks for ``onnx/<name><suffix>.onnx`` with weights in ``<the same>_data``; the suffix tells the type of
the weights, and config.json says under "transformers.js_config" which there are. A page of the web is given every file
by name, so there each graph has a data file of its own and reads no other's. The looking up of tokens takes no images:
transformers.js puts their features in by itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from model.bundle import BUNDLE_LAYOUT, DECODER, EMBEDDING, TRANSFORMERS_JS, VISION_ENCODER, GraphInfo, WeightInfo
from model.errors import UsageError

LAYOUTS = (BUNDLE_LAYOUT, TRANSFORMERS_JS)
CONFIG, CONFIG_KEY = "config.json", "transformers.js_config"
NOTE = (
    "The files are named for transformers.js: there is no genai_config.json, and a draft head of the checkpoint is "
    "left out."
)
_FOLDER = "onnx"
# transformers.js's name of a type → what it puts behind a file's name.
_SUFFIXES = {
    "fp32": "", "fp16": "_fp16", "int8": "_int8", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16", "q2": "_q2",
    "q2f16": "_q2f16",
}  # fmt: skip


@dataclass(frozen=True)
class Naming:
    """The files of a bundle's graphs.

    Attributes:
        stems: graph → its file's path in the bundle without ".onnx"; of others it is the graph's name.
        data: what follows the path of a graph's file in that of its data file.
        shared: whether tensors that two graphs have in common are stored once.
        types: graph → transformers.js's name of the type of its weights.
    """

    stems: Mapping[str, str] = field(default_factory=dict)
    data: str = ".data"
    shared: bool = True
    types: Mapping[str, str] = field(default_factory=dict)

    def file(self, graph: str) -> str:
        """Path of a graph's file in the bundle, with slashes."""
        return f"{self.stems.get(graph, graph)}.onnx"

    def data_file(self, graph: str) -> str:
        """Path of its data file, in the same folder."""
        return self.file(graph) + self.data

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders inside the bundle that graphs lie in."""
        return tuple(sorted({stem.rpartition("/")[0] for stem in self.stems.values()} - {""}))


OWN: Final = Naming()


def naming(layout: str, graphs: Iterable[str], dtype: str, weights: Mapping[str, WeightInfo]) -> Naming:
    """What the files of a layout are called.

    Args:
        layout: one of `LAYOUTS`.
        graphs: names of the graphs there are.
        dtype: of activations and float weights.
        weights: module path, the graph's name first → how it is stored.
    """
    if layout != TRANSFORMERS_JS:
        return OWN
    present = tuple(graphs)
    alone = EMBEDDING not in present
    names = {
        VISION_ENCODER: "vision_encoder",
        EMBEDDING: "embed_tokens",
        DECODER: "model" if alone else "decoder_model_merged",
    }
    types = {graph: _type(graph, dtype, weights) for graph in present}
    stems = {graph: f"{_FOLDER}/{names.get(graph, graph)}{_SUFFIXES[types[graph]]}" for graph in present}
    return Naming(stems, "_data", shared=False, types=types)


def check_layout(layout: str, dtype: str, target: str, kv_cache: str) -> None:
    """Refuses what transformers.js has no name or no kernel for.

    Raises:
        UsageError: it is that.
    """
    if layout != TRANSFORMERS_JS:
        return
    for option, value, taken in (
        ("--target", target, ("cpu",)), ("--dtype", dtype, ("fp32", "fp16")), ("--kv-cache", kv_cache, ("full",)),
    ):  # fmt: skip
        if value not in taken:
            why = f"transformers.js takes {' or '.join(taken)}, not {value}"
            raise UsageError("cannot export", f"--layout {TRANSFORMERS_JS}", why, f"Leave {option} out")


def adapt(layout: str, models: Mapping[str, ir.Model]) -> None:
    """Changes traced graphs to what a layout's runtime gives them: an embedding without features has none to merge."""
    if layout != TRANSFORMERS_JS or EMBEDDING not in models:
        return
    graph = models[EMBEDDING].graph
    for value in graph.inputs:
        width = value.shape[1] if value.name == "image_features" and value.shape is not None else None
        if isinstance(width, int) and value.dtype is not None:
            none = np.zeros((0, width), value.dtype.numpy())
            value.const_value = ir.Tensor(none, dtype=value.dtype, name=value.name)
            graph.initializers[str(value.name)] = value


def config_with(raw: Mapping[str, Any], graphs: Iterable[GraphInfo], files: Naming) -> bytes:
    """A model's config.json that tells transformers.js which files there are.

    Args:
        raw: the source's config.json.
        graphs: as written.
        files: their naming.
    """
    types: dict[str, str] = {}
    external: dict[str, int] = {}
    for graph in graphs:
        stem = graph.file.rpartition("/")[2].removesuffix(".onnx")
        types[stem.removesuffix(_SUFFIXES[files.types[graph.name]])] = files.types[graph.name]
        external |= {f"{stem}.onnx": 1} if graph.data else {}
    told = {"dtype": types, "use_external_data_format": external}
    return (json.dumps({**raw, CONFIG_KEY: told}, indent=2, ensure_ascii=False) + "\n").encode()


def _type(graph: str, dtype: str, weights: Mapping[str, WeightInfo]) -> str:
    """The type that most of a graph's weights have."""
    counts: Counter[str] = Counter()
    half = "f16" if dtype == "fp16" else ""
    for path, weight in weights.items():
        if path.startswith(f"{graph}."):
            wide = "q8" if weight.activations == "int8" else "int8"
            kind = {0: dtype, 8: wide}.get(weight.bits, f"q{weight.bits}{half}")
            counts[kind] += weight.parameters
    return max(counts, key=lambda kind: (counts[kind], kind), default=dtype)
