"""What an export will take of the disk and of memory, told from names and shapes before any work begins.

Sizes on the disk follow from the format, but for the graphs' structure, which is a thousandth of the published models'.
Memory does not depend on the number of weights: what is held is the libraries, the traced graphs, a few rows for each
thread, and of one weight what cannot be written piece by piece. Its constants were measured with torch 2.13 for CPUs
(benchmarks/RESULTS.md).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.datafile import aligned
from exporter.parts import INLINE_BYTES
from model.bundle import DECODER, EMBEDDING, MTP, VISION_ENCODER
from model.config import ExaoneConfig
from model.errors import ResourceError
from model.memory import address_space_left, own_bytes, physical_bytes, shown
from model.rotary import stores_tables
from model.shards import DTYPES
from model.source import WeightSource

_WHAT = "cannot export"
_KIB, _MIB = 1 << 10, 1 << 20

# Structure of the graphs, and what the manifest says of a weight.
_GRAPH, _LAYER, _BLOCK, _ENTRY = 12 * _KIB, 14 * _KIB, 17 * _KIB, 320
_REST = 16 * _KIB  # model card, genai_config.json, the rest of the manifest

# Memory: libraries and the smallest graph, then what tracing a layer leaves behind.
_LIBRARIES = 440 * _MIB
_WITHOUT_TORCH = 115 * _MIB  # where a bundle is rewritten, nothing is traced
_TRACED_LAYER, _TRACED_BLOCK = 1.8 * _MIB, 3 * _MIB
_THREAD = 18 * _MIB  # rows being read, quantized and packed
_WRITER = 32 * _MIB
_PAIR = ("gate_proj.weight", "up_proj.weight")
_CONVERTED, _PANEL = 64 * _MIB, 64  # of a float weight: pieces being read, columns being transposed
_UNFORESEEN = 1.05
# Address space that is never touched: the libraries' code, and for each thread a stack and a heap.
_MAPPED, _MAPPED_THREAD = 520 * _MIB, 80 * _MIB


@dataclass(frozen=True)
class Need:
    """What an export will take, in bytes.

    Attributes:
        bundle: of the finished bundle.
        largest_file: of its largest file.
        memory: most that the process will hold, libraries included.
        address_space: most that it will map, libraries included.
    """

    bundle: int
    largest_file: int
    memory: int
    address_space: int


@dataclass(frozen=True)
class Plan:
    """What is to be exported.

    Attributes:
        config: of the model.
        refs: canonical name → weight, as `Checkpoint.bind` gives them.
        transform: of the graphs; asked for its `part_bytes`, see `quantize.sizes`, and its `working_memory` for what it
            does before the first weight is written. None keeps weights float.
        item_bytes: of a float in the graphs.
        threads: that quantize.
        rewrites: whether the graphs come from a bundle, whose weights are in the graphs' orientation already.
        shared: whether what two graphs have in common is stored once.
    """

    config: ExaoneConfig
    refs: Mapping[str, WeightSource]
    transform: object = None
    item_bytes: int = 4
    threads: int = 1
    rewrites: bool = False
    shared: bool = True

    def need(self, assets: Iterable[Path] = ()) -> Need:
        """What the export will take; `assets` are the files to be taken over."""
        data = self.data_bytes()
        rest = _REST + sum(path.stat().st_size for path in assets) + _ENTRY * len(self.refs)
        bundle = sum(data.values()) + sum(self._structure(graph) for graph in data) + rest
        memory = self._memory()
        mapped = memory + _MAPPED + _MAPPED_THREAD * (self.threads + 1)
        return Need(bundle, max(data.values(), default=0), memory, max(mapped, self._opened()))

    def data_bytes(self) -> dict[str, int]:
        """Graph → bytes of its data file; what two graphs share counts for the first."""
        data = dict.fromkeys(self._graphs(), 0)
        known: set[object] = set()
        for name, source in self.refs.items():
            for part, size in self._parts(name, source).items():
                graph = name.partition(".")[0]
                place = (graph,) if part == "rotation" else (source.file, source.offset)
                key = (*place, part, size, part == "float" and _transposed(name), "" if self.shared else graph)
                if key not in known:
                    data[graph] += aligned(size)
                known.add(key)
        text = self.config.text
        if DECODER in data and stores_tables(text):
            data[DECODER] += 2 * aligned(text.max_position_embeddings * text.head_dim // 2 * self.item_bytes)
        return data

    def _opened(self) -> int:
        """Address space while the largest file's header is checked, for which safetensors maps the file."""
        if self.rewrites:
            return 0
        files = dict.fromkeys(source.file for source in self.refs.values())
        return max((path.stat().st_size for path in files), default=0) + _WITHOUT_TORCH

    def _graphs(self) -> list[str]:
        return list(dict.fromkeys(name.partition(".")[0] for name in self.refs))

    def _layers(self, graph: str) -> int:
        config = self.config
        return {
            DECODER: config.text.num_layers,
            MTP: config.mtp.num_layers if config.mtp is not None else 0,
            VISION_ENCODER: config.vision.depth if config.vision is not None else 0,
            EMBEDDING: 0,
        }[graph]

    def _structure(self, graph: str) -> int:
        """Bytes of an .onnx file."""
        return _GRAPH + self._layers(graph) * (_BLOCK if graph == VISION_ENCODER else _LAYER)

    def _parts(self, name: str, source: WeightSource) -> dict[str, int]:
        """Bytes of each tensor that a parameter becomes; small ones are part of the structure."""
        sizes = {"float": math.prod(source.shape) * self.item_bytes}
        sized: Any = getattr(self.transform, "part_bytes", None)
        if sized is not None and name.endswith(".weight"):
            sizes = sized(name.removesuffix(".weight"), source, self.item_bytes)
        return {part: size for part, size in sizes.items() if size > INLINE_BYTES}

    def _memory(self) -> int:
        held = max((self._held(name, source) for name, source in self.refs.items()), default=0)
        text = self.config.text
        # Cosines and sines, computed in float32.
        tables = 4 * text.max_position_embeddings * text.head_dim if stores_tables(text) else 0
        traced = sum(
            self._layers(graph) * (_TRACED_BLOCK if graph == VISION_ENCODER else _TRACED_LAYER)
            for graph in self._graphs()
        )
        working = held + self.threads * _THREAD + _WRITER
        if self.rewrites:
            return int(_UNFORESEEN * (_WITHOUT_TORCH + working))
        wanted: Any = getattr(self.transform, "working_memory", None)
        before = wanted(self.config, self.refs) if wanted is not None else 0  # nothing is written yet then
        return int(_UNFORESEEN * (_LIBRARIES + traced + max(working, tables, before)))

    def _held(self, name: str, source: WeightSource) -> int:
        """Bytes of a weight that lie in memory until it is written."""
        parts = self._parts(name, source)
        packed = sum(part.nbytes for part in source.parts) if source.label else 0
        if "float" not in parts:
            whole = math.prod(source.shape) * self.item_bytes if self.rewrites and _transposed(name) else 0
            kept = sum(size for part, size in parts.items() if part != "codes")
            # Codes that are turned round are in memory with those of the other half of what becomes one product.
            pair = "turned_codes" in parts and name.endswith(_PAIR) and ".layers." in name
            return whole + packed + (2 * kept if pair else kept)
        values = math.prod(source.shape)
        converted = packed + min(_CONVERTED, 4 * values * self.item_bytes)
        if len(source.shape) < 2 or not _transposed(name) or self.rewrites:
            return converted
        whole = values * min(DTYPES[source.dtype].itemsize, self.item_bytes)
        return converted + whole + source.shape[0] * _PANEL * self.item_bytes


def check_need(need: Need, out: Path, present: int = 0) -> None:
    """Refuses an export that cannot go well here.

    Args:
        need: see `Plan.need`.
        out: the folder to make.
        present: bytes of it that are on the disk already, and will be used or removed.

    Raises:
        ResourceError: naming what is needed and what there is.
    """
    _check_disk(need, out, present)
    _check_memory(need)


def _check_disk(need: Need, out: Path, present: int) -> None:
    place = next(folder for folder in (out.parent, *out.parent.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if need.bundle > free + present:
        why = f"{shown(need.bundle - present)} are needed, {shown(free)} are free"
        raise ResourceError("not enough disk space", out.name[:80], why, "Free some space or choose another disk")
    limit = _file_limit()
    if limit is not None and need.largest_file > limit:
        why = f"its largest file takes {shown(need.largest_file)}, a file may hold {shown(limit)}"
        raise ResourceError(_WHAT, out.name[:80], why, "Raise the limit (ulimit -f)")


def _file_limit() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _check_memory(need: Need) -> None:
    mapped, resident = own_bytes()
    there = physical_bytes()
    if there is not None and need.memory - resident > there:
        why = f"the export takes about {shown(need.memory)}, {shown(there + resident)} can be had"
        raise ResourceError("not enough memory", "this process", why, "Free some memory, or use fewer --threads")
    left = address_space_left()
    if left is not None and need.address_space - mapped > left:
        why = (
            f"the export takes about {shown(need.address_space)} of address space, the limit is {shown(left + mapped)}"
        )
        raise ResourceError("not enough memory", "this process", why, "Raise the limit (ulimit -v)")


def _transposed(name: str) -> bool:
    """Whether the graph has a weight the other way round: for a product, not for a table."""
    return not name.endswith(".embed_tokens.weight")
