"""Bundles: the manifest, files that are not what it says, and graphs that are, but are hostile."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx

from model.bundle import (
    CARD,
    MANIFEST,
    MTP,
    VISION_ENCODER,
    Manifest,
    check_contents,
    check_sizes,
    read_manifest,
)
from runtime.graphs import Graphs
from runtime.image import ImageProcessor
from tests.fuzz.checkpoints import named
from tests.fuzz.corpus import bundles
from tests.fuzz.mutators import hostile, same, spoiled, spoiled_json, strict_json
from tests.fuzz.planted import bad_scale, planted
from tests.fuzz.target import Target
from tests.fuzz.wire import names_in, parsed, spoiled_model

_TEXTS = ("tool", "model_type", "task", "dtype", "target", "recipe")
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_MORE_THAN_COMPUTING = (
    "Custom", "ATen", "Sampling", "BeamSearch", "GreedySearch", "EPContext", "PythonOp", "RandomNormal",
    "RandomUniform", "Bernoulli", "Multinomial", "ImageDecoder", "StringNormalizer", "SequenceEmpty", "Optional",
    "TfIdfVectorizer",
)  # fmt: skip


def own_copy(bundle: Path, scratch: Path) -> Path:
    """A bundle that may be written to."""
    folder = scratch / bundle.name
    if not folder.exists():
        shutil.copytree(bundle, folder)
    return folder


class ManifestFile(Target):
    """exaone_export.json of a bundle whose other files are sound."""

    name, codes = "manifest", frozenset({4, 5})
    long = 80_000

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._folder = own_copy(bundles(corpus)[0], scratch)
        self._raw = (bundles(corpus)[0] / MANIFEST).read_bytes()
        self._value = json.loads(self._raw)
        self._files = {
            name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for name in self._value["files"]
            if (path := bundles(corpus)[0] / name).is_file()
        }

    def mutant(self, random: Random) -> bytes:
        value = self._value
        if random.random() < 0.3:
            value = value | {random.choice((*_TEXTS, "schema_version", "parameters", "offload")): hostile(random)}
        elif random.random() < 0.2:
            key = random.choice(("../x", "/etc/passwd", "a/../../b", "decoder.onnx", "CON:", "a\\b", ""))
            value = value | {"files": value["files"] | {key: {"size": 1, "sha256": "0" * 64}}}
        return spoiled_json(self._raw, value, random)

    def run(self, data: bytes) -> Manifest:
        (self._folder / MANIFEST).write_bytes(data)
        manifest = read_manifest(self._folder)
        check_sizes(self._folder, manifest)
        check_contents(self._folder, manifest)
        return manifest

    def judge(self, data: bytes, accepted: Manifest) -> str:
        try:
            raw = strict_json(data)
        except ValueError as reason:
            return f"it is no sound JSON: {reason}"
        stated = {name: (info.size, info.sha256) for name, info in accepted.files.items() if name != CARD}
        if stated.items() - self._files.items():
            return "a file that is not there, or is another"
        if type(raw["schema_version"]) is not int:
            return f"schema_version {raw['schema_version']!r}"
        for key in _TEXTS:
            if not isinstance(raw[key], str) or raw[key] != getattr(accepted, key):
                return f"{key} {raw[key]!r} is read as {getattr(accepted, key)!r}"
        for key, kinds in (("parameters", (int,)), ("bits_per_weight", (int, float)), ("offload", (bool,))):
            read = getattr(accepted, key)
            if key in raw and (type(raw[key]) not in kinds or not same(type(read)(raw[key]), read)):
                return f"{key} {raw[key]!r}"
        if not 0 <= accepted.bits_per_weight < math.inf:
            return f"bits_per_weight {accepted.bits_per_weight}"
        return _wrong_graphs(raw, accepted) or _wrong_weights(raw)


def _wrong_graphs(raw: dict[str, Any], accepted: Manifest) -> str:
    names = [graph.name for graph in accepted.graphs]
    if len(set(names)) < len(names):
        return f"graphs {names}"
    for graph, found in zip(raw["graphs"], accepted.graphs, strict=True):
        if (graph["name"], graph["file"], tuple(graph["data"])) != (found.name, found.file, found.data):
            return f"graph {graph['name']!r} has other files"
        for side, tensors in (("inputs", found.inputs), ("outputs", found.outputs)):
            if len({tensor.name for tensor in tensors}) < len(tensors):
                return f"{side} of {found.name} of one name"
            for one, tensor in zip(graph[side], tensors, strict=True):
                if (one["name"], one["dtype"], one["optional"]) != (tensor.name, tensor.dtype, tensor.optional):
                    return f"{side} {one}"[:200]
                if type(one["optional"]) is not bool or any(isinstance(n, int) and n < 0 for n in tensor.shape):
                    return f"{side} {one}"[:200]
    return ""


def _wrong_weights(raw: dict[str, Any]) -> str:
    for name, one in raw["weights"].items():
        texts = [one["method"], one.get("reason", ""), one.get("activations", "float")]
        if not all(isinstance(text, str) for text in texts) or type(one["symmetric"]) is not bool:
            return f"weight {name[:40]}: {one}"[:200]
        if any(type(one.get(key, 0)) is not int or one.get(key, 0) < 0 for key in ("bits", "block_size", "rotate")):
            return f"weight {name[:40]}: {one}"[:200]
    return ""


class Damaged(Target):
    """Any file of a bundle with other bytes than the manifest says."""

    name, codes = "damaged", frozenset({4})
    long = 25_000

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._folder = own_copy(bundles(corpus)[0], scratch / "damaged")
        names = json.loads((self._folder / MANIFEST).read_bytes())["files"]
        self._raw = {name: (bundles(corpus)[0] / name).read_bytes() for name in sorted(names) if name != CARD}

    def mutant(self, random: Random) -> bytes:
        name = random.choice(list(self._raw))
        return name.encode() + b"\n" + spoiled(self._raw[name], random)

    def run(self, data: bytes) -> bytes:
        name, raw = named(data)
        path = self._folder / name
        path.write_bytes(raw)
        try:
            manifest = read_manifest(self._folder)
            check_sizes(self._folder, manifest)
            check_contents(self._folder, manifest)
        finally:
            path.write_bytes(self._raw[name])
        return self._raw[name]

    def judge(self, data: bytes, accepted: bytes) -> str:
        return "" if named(data)[1] == accepted else "other bytes than the manifest's"


class Onnx(Target):
    """A graph's file, with a manifest that fits it: opened, and run where it opens."""

    name, codes = "onnx", frozenset({4, 5, 6, 7})
    short, long = 60, 20_000

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._folders: dict[str, Path] = {}
        self._raw = dict[str, bytes]()
        for bundle in bundles(corpus):
            folder = own_copy(bundle, scratch / "onnx")
            for path in sorted(bundle.glob("*.onnx")):
                self._folders[f"{bundle.name}/{path.name}"] = folder
                self._raw[f"{bundle.name}/{path.name}"] = path.read_bytes()
        self._parts = {name: parsed(raw) for name, raw in self._raw.items()}
        self._names = {name: names_in(parts) for name, parts in self._parts.items()}
        self._manifests = {folder: json.loads((folder / MANIFEST).read_bytes()) for folder in self._folders.values()}
        for name, raw in self._raw.items():  # what is loaded once is loaded now, and the undamaged graph runs
            self.run(name.encode() + b"\n" + raw)

    def mutant(self, random: Random) -> bytes:
        name, chance = random.choice(list(self._raw)), random.random()
        if chance < 0.2:
            return name.encode() + b"\n" + planted(self._raw[name], random)
        if chance < 0.4:
            return name.encode() + b"\n" + spoiled(self._raw[name], random)
        return name.encode() + b"\n" + spoiled_model(self._parts[name], self._names[name], random)

    def run(self, data: bytes) -> tuple[Path, str]:
        name, raw = named(data)
        folder, file = self._folders[name], Path(name).name
        (folder / file).write_bytes(raw)
        manifest = self._manifests[folder]
        entry = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        told = json.dumps(manifest | {"files": manifest["files"] | {file: entry}})
        (folder / MANIFEST).write_text(told, encoding="utf-8")
        try:
            self._use(Graphs(folder, threads=1), file.removesuffix(".onnx"))
        finally:
            (folder / file).write_bytes(self._raw[name])
        return folder, file

    def _use(self, graphs: Graphs, name: str) -> None:
        """Opens the graph and computes with it, as far as that can be done without the others."""
        info = graphs.manifest.graph(name)
        assert info is not None
        session = graphs._opened(info, 1)
        graphs._sessions[name] = session
        if name == VISION_ENCODER:
            assert graphs.config.vision is not None
            processor = ImageProcessor.from_config({"min_pixels": 784}, graphs.config.vision)
            pixels, grid = processor.patches(processor.scaled(_image()))
            graphs.encode(pixels, grid, int(np.prod(grid)) // 4)
        elif name != MTP:
            ids = np.array([[1, 51, 120, 200, 130]])
            row = graphs.forward(1)
            row.reserve(8)
            row(ids, np.array([5]), 1)
            row(ids[:, :1], np.array([6]), 1)

    def judge(self, data: bytes, accepted: tuple[Path, str]) -> str:
        """What opened must be of operators that compute, and lie in the files that the manifest gives the graph."""
        model = onnx.load_model_from_string(named(data)[1])
        if model.functions:
            return "it brings functions"
        if name := bad_scale(model):
            return f"the scale {name} is no number"
        folder, file = accepted
        listed = next(graph["data"] for graph in self._manifests[folder]["graphs"] if graph["file"] == file)
        return next((why for graph in _graphs(model.graph) if (why := _strange(graph, folder, listed))), "")


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those in its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _strange(graph: onnx.GraphProto, folder: Path, listed: list[str]) -> str:
    for node in graph.node:
        if node.domain not in _DOMAINS or node.op_type in _MORE_THAN_COMPUTING:
            return f"operator {node.domain}.{node.op_type}"
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        end = int(place.get("offset", 0)) + int(place.get("length", 0))
        if place["location"] not in listed or end > (folder / place["location"]).stat().st_size:
            return f"data of {tensor.name} at {place}"
    return ""


def _image() -> Any:
    from PIL import Image

    return Image.new("RGB", (56, 28), "red")
