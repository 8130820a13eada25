"""The on-disk contract of an exported bundle: names, manifest, and safe reading of both (no torch).

A bundle is one folder. Its manifest ``exaone_export.json`` is written last and lists every other file
with size and sha256, except ``verify.json``, which may change without the bundle changing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.bundle_files import bundle_path as bundle_path
from model.bundle_files import file_sha256 as file_sha256
from model.bundle_files import ordinary_size
from model.errors import BundleError, EnvironmentFault, printable
from model.jsonfile import read_json_object
from model.limits import fault

MANIFEST = "exaone_export.json"
VERIFY = "verify.json"
CARD = "README.md"
SCHEMA_VERSION = 1
CHECKED_ON_LOAD = 16 * 1024 * 1024

# Bytes of a float of the types that a graph's activations can have.
FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

VISION_ENCODER = "vision_encoder"
EMBEDDING = "embedding"
DECODER = "decoder"
MTP = "mtp"
GRAPHS = (VISION_ENCODER, EMBEDDING, DECODER, MTP)

# How the files are named and laid out: our own way, or as transformers.js looks for them.
BUNDLE_LAYOUT, TRANSFORMERS_JS = "bundle", "transformersjs"

# Copied from the source unchanged, where it has them.
SOURCE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
)


# The name of a cache's third dimension where it holds a window only: the size of a buffer, whatever it holds.
WINDOW_CACHE = "window_cache_length"
# Rows of such a buffer beyond the window. Evicting moves the window, once in so many tokens and one; CUDA's kernel
# moves it for every token, and takes no more rows.
WINDOW_SLACK = {"cpu": 64, "cuda": 0}


def past_key(layer: int) -> str:
    """Input name of a layer's cached keys (optimum's and onnxruntime-genai's spelling)."""
    return f"past_key_values.{layer}.key"


def past_value(layer: int) -> str:
    """Input name of a layer's cached values."""
    return f"past_key_values.{layer}.value"


def present_key(layer: int) -> str:
    """Output name of a layer's extended keys."""
    return f"present.{layer}.key"


def present_value(layer: int) -> str:
    """Output name of a layer's extended values."""
    return f"present.{layer}.value"


def scale_of(cache: str) -> str:
    """Name of the scales that stand beside a cache of integers: ``past_key_values.0.key_scale``."""
    return f"{cache}_scale"


@dataclass(frozen=True)
class TensorInfo:
    """One input or output: `shape` has numbers and, where free, names. `optional` inputs have a default."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    optional: bool = False


@dataclass(frozen=True)
class GraphInfo:
    """One graph: its ``.onnx`` file, the external data files it reads, and what goes in and out."""

    name: str
    file: str
    data: tuple[str, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def window_layers(graph: GraphInfo | None) -> tuple[int, ...]:
    """Layers of a decoder or draft head whose cache holds a window only."""
    keys = [tensor for tensor in graph.inputs if tensor.name.endswith(".key")] if graph is not None else []
    return tuple(layer for layer, tensor in enumerate(keys) if WINDOW_CACHE in tensor.shape)


def int8_cache(graph: GraphInfo | None) -> bool:
    """Whether a decoder or draft head keeps keys and values as integers of 8 bits, with scales beside them."""
    return graph is not None and any(tensor.name == scale_of(past_key(0)) for tensor in graph.inputs)


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and sha256 (hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class WeightInfo:
    """How one weight is stored. `bits` is 0 for a weight left in float, then `reason` may say why.

    Where `activations` are "int8", products are computed in integers; a block is then as long as a row of the weight,
    and so many inputs as `rotate` says, 0 for none, are rotated together before (see `quantize.rotate`).
    """

    bits: int
    block_size: int
    symmetric: bool
    method: str
    parameters: int
    reason: str = ""
    activations: str = "float"
    rotate: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        tool: version of this package.
        libraries: versions of the libraries that took part.
        source: {"id": ..., "revision": ... or None, "files": {name: sha256}, "dtypes": {type: tensors},
            "left_out": {kind: {"count", "names"}} where tensors of the checkpoint are not in the bundle}.
        model_type: as in config.json.
        task: "image-text-to-text" or "text-generation".
        dtype: of activations and float weights, "fp32", "fp16" or "bf16".
        target: "cpu" or "cuda".
        recipe: name of the quantization recipe, or "none".
        graphs: in the order they run.
        weights: module path ("decoder.layers.0.mlp.up_proj") → how it is stored.
        files: file name → size and hash, all files but the manifest and verify.json.
        parameters: number of weights of all graphs, shared ones counted once.
        bits_per_weight: stored bits of all weights over their number.
        notes: what the bundle cannot do, or how it differs from its source, one sentence each.
        limits: what the recipe holds the figures of `verify` to, see `model.limits`.
        offload: of a bundle for CUDA, whether the CPU has kernels for the decoder's layers too.
        layout: how the files are named, `BUNDLE_LAYOUT` or `TRANSFORMERS_JS`.
    """

    tool: str
    libraries: Mapping[str, str]
    source: Mapping[str, Any]
    model_type: str
    task: str
    dtype: str
    target: str
    recipe: str
    graphs: tuple[GraphInfo, ...]
    weights: Mapping[str, WeightInfo]
    files: Mapping[str, FileInfo]
    schema_version: int = SCHEMA_VERSION
    notes: tuple[str, ...] = field(default=())
    parameters: int = 0
    bits_per_weight: float = 0.0
    limits: Mapping[str, float] = field(default_factory=dict)
    offload: bool = False
    layout: str = BUNDLE_LAYOUT

    def graph(self, name: str) -> GraphInfo | None:
        """The graph of that name, or None."""
        return next((graph for graph in self.graphs if graph.name == name), None)

    def to_bytes(self) -> bytes:
        """The manifest's file, with sorted keys so that equal content has equal bytes."""
        content = asdict(self)
        if not self.offload:
            del content["offload"]
        if self.layout == BUNDLE_LAYOUT:
            del content["layout"]
        for weight in content["weights"].values():
            if not weight["rotate"]:
                del weight["rotate"]
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    def write(self, folder: Path) -> None:
        """Writes the manifest into `folder`."""
        (folder / MANIFEST).write_bytes(self.to_bytes())


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks ``folder/exaone_export.json``; hashes nothing.

    Raises:
        BundleError: missing, damaged, or naming a file outside the folder.
        EnvironmentFault: made by a newer version of the toolkit.
    """
    if not folder.is_dir():
        raise BundleError("cannot open bundle", str(folder), "not a folder", "Name the folder that export wrote")
    there = ordinary_size(folder / MANIFEST)
    if isinstance(there, str) and os.path.lexists(folder / MANIFEST):
        raise BundleError("cannot open bundle", MANIFEST, there, "Export or copy the bundle again")
    raw = read_json_object(folder / MANIFEST, BundleError, "cannot open bundle")
    version = raw.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise EnvironmentFault(
            "cannot open bundle",
            MANIFEST,
            f"made by a newer version (format {str(version)[:20]}, this one reads up to {SCHEMA_VERSION})",
            "Upgrade exaone-export",
        )
    try:
        manifest = _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as reason:
        raise BundleError(
            "cannot open bundle", MANIFEST, f"an entry is missing or of the wrong kind ({printable(str(reason))})"
        ) from None
    names = [*manifest.files, *(name for graph in manifest.graphs for name in (graph.file, *graph.data))]
    for name in names:
        bundle_path(folder, name)
    unlisted = [name for name in names if name not in manifest.files]
    if unlisted:
        raise BundleError("cannot open bundle", MANIFEST, f"{unlisted[0][:80]!r} is used but not listed under files")
    return manifest


def _parse(raw: Mapping[str, Any]) -> Manifest:
    if type(raw["schema_version"]) is not int or raw["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version {str(raw['schema_version'])[:40]!r}")
    graphs = tuple(_graph(graph) for graph in _typed(raw, "graphs", list))
    _once([graph.name for graph in graphs], "graphs")
    bits = float(_typed(raw, "bits_per_weight", int | float, 0.0))
    if not 0 <= bits < math.inf or _typed(raw, "parameters", int, 0) < 0:
        raise ValueError("bits_per_weight or parameters")
    return Manifest(
        tool=_typed(raw, "tool", str),
        libraries=_typed(raw, "libraries", dict),
        source=_typed(raw, "source", dict),
        model_type=_typed(raw, "model_type", str),
        task=_typed(raw, "task", str),
        dtype=_typed(raw, "dtype", str),
        target=_typed(raw, "target", str),
        recipe=_typed(raw, "recipe", str),
        graphs=graphs,
        weights={name: _weight(entry) for name, entry in raw["weights"].items()},
        files={name: _file(name, entry) for name, entry in raw["files"].items()},
        notes=_texts(raw, "notes", []),
        parameters=_typed(raw, "parameters", int, 0),
        bits_per_weight=bits,
        limits=_limits(raw.get("limits", {})),
        offload=_typed(raw, "offload", bool, False),
        layout=_typed(raw, "layout", str, BUNDLE_LAYOUT),
    )


def _graph(raw: Mapping[str, Any]) -> GraphInfo:
    inputs, outputs = (
        tuple(
            TensorInfo(_typed(t, "name", str), _typed(t, "dtype", str), _shape(t["shape"]), _typed(t, "optional", bool))
            for t in _typed(raw, side, list)
        )
        for side in ("inputs", "outputs")
    )
    for tensors in (inputs, outputs):
        _once([tensor.name for tensor in tensors], "tensors")
    return GraphInfo(_typed(raw, "name", str), _typed(raw, "file", str), _texts(raw, "data"), inputs, outputs)


def _typed(raw: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
    """The value of a key; true is no number. A key without default must be there."""
    value = raw[key] if default is None else raw.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key} {str(value)[:40]!r}")
    return value


def _texts(raw: Mapping[str, Any], key: str, default: Any = None) -> tuple[str, ...]:
    values = _typed(raw, key, list, default)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key} {str(values)[:40]}")
    return tuple(values)


def _once(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"two {what} of one name")


def _limits(raw: Mapping[str, Any]) -> dict[str, float]:
    if why := next((why for name, limit in raw.items() if (why := fault(name, limit))), ""):
        raise ValueError(why)
    return {name: float(limit) for name, limit in raw.items()}


def _shape(raw: Any) -> tuple[int | str, ...]:
    if not isinstance(raw, list) or not all(type(size) in (int, str) for size in raw):
        raise ValueError(f"shape {str(raw)[:40]}")
    if any(type(size) is int and size < 0 for size in raw):
        raise ValueError(f"shape {str(raw)[:40]}")
    return tuple(raw)


def _file(name: str, raw: Mapping[str, Any]) -> FileInfo:
    size, digest = raw["size"], raw["sha256"]
    if type(size) is not int or size < 0:
        raise ValueError(f"size of {name[:80]!r}")
    if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ValueError(f"sha256 of {name[:80]!r}")
    return FileInfo(size, digest)


def _weight(raw: Mapping[str, Any]) -> WeightInfo:
    weight = WeightInfo(**raw)
    numbers = (weight.bits, weight.block_size, weight.parameters, weight.rotate)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"weight {str(dict(raw))[:80]}")
    if not all(isinstance(text, str) for text in (weight.method, weight.reason, weight.activations)):
        raise ValueError(f"weight {str(dict(raw))[:80]}")
    if type(weight.symmetric) is not bool:
        raise ValueError(f"weight {str(dict(raw))[:80]}")
    return weight


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compares every listed file's size with the folder's, which costs nothing.

    The model card is left out, here and in `check_contents`: nothing that runs reads it, and `verify` rewrites it.

    Raises:
        BundleError: a file is missing, not an ordinary file, or of another size.
    """
    for name, why in file_problems(folder, manifest).items():
        if name != CARD:
            raise BundleError("damaged bundle", name, why, "Export or copy the bundle again")


def file_problems(folder: Path, manifest: Manifest) -> dict[str, str]:
    """File name → what is wrong with what is there, contents left alone; empty where all is well.

    Files that the manifest does not list are no part of the bundle, but some are read if they are there.
    """
    problems: dict[str, str] = {}
    for name, info in manifest.files.items():
        size = ordinary_size(bundle_path(folder, name))
        if isinstance(size, str):
            problems[name] = size
        elif size != info.size:
            problems[name] = f"{size} bytes, {info.size} expected"
    for name in {*SOURCE_FILES, VERIFY} - manifest.files.keys():
        if os.path.lexists(folder / name) and isinstance(size := ordinary_size(folder / name), str):
            problems[name] = size
    return problems


def check_contents(folder: Path, manifest: Manifest, largest: int = CHECKED_ON_LOAD) -> None:
    """Hashes the files of at most `largest` bytes: graphs and configuration, in some tens of milliseconds.

    Weights of a real model would take seconds a gigabyte; ``verify`` hashes those too.

    Raises:
        BundleError: a file's sha256 is not the manifest's.
    """
    for name, info in manifest.files.items():
        if name != CARD and info.size <= largest and file_sha256(bundle_path(folder, name)) != info.sha256:
            raise BundleError("damaged bundle", name, "its sha256 differs", "Export or copy the bundle again")
