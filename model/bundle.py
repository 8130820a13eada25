"""The on-disk contract of an exported bundle: names, manifest, and safe reading of both (no torch).

A bundle is one folder. Its manifest ``exaone_export.json`` is written last and lists every other file
with size and sha256, except ``verify.json``, which may change without the bundle changing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from model.errors import BundleError, EnvironmentFault
from model.jsonfile import read_json_object
from model.limits import fault

MANIFEST = "exaone_export.json"
VERIFY = "verify.json"
CARD = "README.md"
SCHEMA_VERSION = 1
CHECKED_ON_LOAD = 16 * 1024 * 1024
_PIECE = 1 << 20

# Bytes of a float of the types that a graph's activations can have.
FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

VISION_ENCODER = "vision_encoder"
EMBEDDING = "embedding"
DECODER = "decoder"
MTP = "mtp"
GRAPHS = (VISION_ENCODER, EMBEDDING, DECODER, MTP)

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

    Where `activations` are "int8", products are computed in integers; a block is then as long as a row of the weight.
    """

    bits: int
    block_size: int
    symmetric: bool
    method: str
    parameters: int
    reason: str = ""
    activations: str = "float"


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

    def graph(self, name: str) -> GraphInfo | None:
        """The graph of that name, or None."""
        return next((graph for graph in self.graphs if graph.name == name), None)

    def to_bytes(self) -> bytes:
        """The manifest's file, with sorted keys so that equal content has equal bytes."""
        content = asdict(self)
        if not self.offload:
            del content["offload"]
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
    raw = read_json_object(folder / MANIFEST, BundleError, "cannot open bundle")
    version = raw.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise EnvironmentFault(
            "cannot open bundle",
            MANIFEST,
            f"made by a newer version (format {version}, this one reads up to {SCHEMA_VERSION})",
            "Upgrade exaone-export",
        )
    try:
        manifest = _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as reason:
        raise BundleError(
            "cannot open bundle", MANIFEST, f"an entry is missing or of the wrong kind ({reason})"
        ) from None
    names = [*manifest.files, *(name for graph in manifest.graphs for name in (graph.file, *graph.data))]
    for name in names:
        bundle_path(folder, name)
    unlisted = [name for name in names if name not in manifest.files]
    if unlisted:
        raise BundleError("cannot open bundle", MANIFEST, f"{unlisted[0]!r} is used but not listed under files")
    return manifest


def _parse(raw: Mapping[str, Any]) -> Manifest:
    if raw["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version {raw['schema_version']!r}")
    graphs = []
    for graph in raw["graphs"]:
        inputs, outputs = (
            tuple(
                TensorInfo(str(t["name"]), str(t["dtype"]), _shape(t["shape"]), bool(t["optional"]))
                for t in graph[side]
            )
            for side in ("inputs", "outputs")
        )
        graphs.append(
            GraphInfo(str(graph["name"]), str(graph["file"]), tuple(map(str, graph["data"])), inputs, outputs)
        )
    return Manifest(
        tool=str(raw["tool"]),
        libraries=dict(raw["libraries"]),
        source=dict(raw["source"]),
        model_type=str(raw["model_type"]),
        task=str(raw["task"]),
        dtype=str(raw["dtype"]),
        target=str(raw["target"]),
        recipe=str(raw["recipe"]),
        graphs=tuple(graphs),
        weights={name: _weight(entry) for name, entry in raw["weights"].items()},
        files={name: _file(name, entry) for name, entry in raw["files"].items()},
        notes=tuple(map(str, raw.get("notes", ()))),
        parameters=int(raw.get("parameters", 0)),
        bits_per_weight=float(raw.get("bits_per_weight", 0.0)),
        limits=_limits(raw.get("limits", {})),
        offload=raw.get("offload") is True,
    )


def _limits(raw: Mapping[str, Any]) -> dict[str, float]:
    if why := next((why for name, limit in raw.items() if (why := fault(name, limit))), ""):
        raise ValueError(why)
    return {name: float(limit) for name, limit in raw.items()}


def _shape(raw: Any) -> tuple[int | str, ...]:
    if not isinstance(raw, list) or not all(type(size) in (int, str) for size in raw):
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
    if any(type(number) is not int or number < 0 for number in (weight.bits, weight.block_size, weight.parameters)):
        raise ValueError(f"weight {str(dict(raw))[:80]}")
    return weight


def bundle_path(folder: Path, name: str) -> Path:
    """The path of a file the manifest or a graph names.

    Raises:
        BundleError: the name is not a plain relative path, or leads outside the folder.
    """

    def fail(why: str) -> BundleError:
        return BundleError("refusing bundle", repr(name[:80]), why, "Do not use this bundle")

    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or "\0" in name or ":" in name or ".." in parts:
        raise fail("a file name that leads outside the folder")
    path = folder / name
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise fail("a link that may lead outside the folder")
    return path


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compares every listed file's size with the folder's, which costs nothing.

    The model card is left out, here and in `check_contents`: nothing that runs reads it, and `verify` rewrites it.

    Raises:
        BundleError: a file is missing, not an ordinary file, or of another size.
    """
    for name, info in manifest.files.items():
        path = bundle_path(folder, name)
        if name == CARD:
            continue
        if not path.is_file():
            raise BundleError("damaged bundle", name, "the file is missing", "Export or copy the bundle again")
        size = path.stat().st_size
        if size != info.size:
            raise BundleError(
                "damaged bundle",
                name,
                f"{size} bytes, {info.size} expected",
                "Export or copy the bundle again",
            )


def check_contents(folder: Path, manifest: Manifest, largest: int = CHECKED_ON_LOAD) -> None:
    """Hashes the files of at most `largest` bytes: graphs and configuration, in some tens of milliseconds.

    Weights of a real model would take seconds a gigabyte; ``verify`` hashes those too.

    Raises:
        BundleError: a file's sha256 is not the manifest's.
    """
    for name, info in manifest.files.items():
        if name != CARD and info.size <= largest and file_sha256(bundle_path(folder, name)) != info.sha256:
            raise BundleError("damaged bundle", name, "its sha256 differs", "Export or copy the bundle again")


def file_sha256(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """Hexadecimal sha256 of a file, read in pieces; `advance` is told the bytes of each."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
            advance(size)
    return digest.hexdigest()
