"""Makes one bundle folder out of graphs: weights, files taken over, genai_config.json, model card, manifest last."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from exporter import card, cuda_kernels, genai, layout
from exporter.assets import copy_assets, missing_assets
from exporter.disk import remove_strays, sync_folder, write_file
from exporter.licence import read_licence
from exporter.remarks import source_notes
from exporter.report import ExportReport, report_of
from exporter.write import Guard, Written, write_models
from model.bundle import (
    BUNDLE_LAYOUT,
    CARD,
    DECODER,
    MANIFEST,
    MTP,
    FileInfo,
    Manifest,
    WeightInfo,
    int8_cache,
    window_layers,
)
from model.config import ExaoneConfig
from model.jsonfile import read_json_object
from model.progress import Progress
from model.tasks import GENERATION
from model.weights import expected_tensors

log = logging.getLogger("exaone_export.exporter")
LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxscript", "optimum", "safetensors", "torch")


_INT8_CACHE = (
    "Keys and values are cached as integers with a scale for each token and head, which onnxruntime-genai does not "
    "know: there is no genai_config.json."
)


class QuantizationSummary(Protocol):
    """What a transform of the graphs says of itself."""

    @property
    def recipe(self) -> str:
        """Name of the recipe."""

    def manifest_weights(self) -> Mapping[str, WeightInfo]:
        """Module path → how it is stored now."""


Transform = Callable[[dict[str, ir.Model]], QuantizationSummary]
"""Changes graphs in place. With an attribute `fingerprint`, a text that is another one whenever its result may be, an
interrupted export with it can be resumed. With a method `for_target`, it is asked for its like for "cpu" or "cuda"
before any work, and may raise UsageError. With an attribute `remarks`, its entries go under the manifest's ``source``.
With the methods `prepare` and `working_bytes`, it may read the checkpoint as a whole before the first weight is
written, and keep that many bytes in a folder until the bundle is complete: see `quantize.apply.Quantizer`."""


@dataclass(frozen=True)
class Origin:
    """What a bundle is made from.

    Attributes:
        config: of the model.
        assets: name → file to take over.
        task, dtype, target: as in the manifest.
        source, offload, layout: as in the manifest.
    """

    config: ExaoneConfig
    assets: Mapping[str, Path]
    task: str
    dtype: str
    target: str
    source: Mapping[str, Any]
    offload: bool = False
    layout: str = BUNDLE_LAYOUT


@dataclass(frozen=True)
class Stored:
    """How graphs keep their weights.

    Attributes:
        recipe: name of the recipe, or "none".
        weights: module path → how it is stored.
        limits: what the recipe holds the bundle to when it is verified.
    """

    recipe: str
    weights: Mapping[str, WeightInfo]
    limits: Mapping[str, float] = field(default_factory=dict)


def transform_graphs(models: dict[str, ir.Model], transform: Transform | None) -> Stored:
    """Applies a transform, if there is one, to graphs with float weights."""
    weights = dict(_float_weights(models))
    if transform is None:
        return Stored("none", weights)
    summary = transform(models)
    limits: Mapping[str, float] = getattr(summary, "limits", {})
    return Stored(summary.recipe, weights | dict(summary.manifest_weights()), limits)


def write_bundle(
    folder: Path, models: dict[str, ir.Model], origin: Origin, stored: Stored, guard: Guard, progress: Progress
) -> ExportReport:
    """Fills a folder with a bundle and removes what else is in it; the report names that folder and no time.

    Raises:
        NumericalError, CheckpointError: from reading a weight.
        ResourceError: the disk gives back something else than was written.
    """
    naming = layout.naming(origin.layout, models, origin.dtype, stored.weights)
    written = write_models(models, folder, progress, guard, naming)
    files = written.files | copy_assets(origin.assets, folder)
    if origin.layout != BUNDLE_LAYOUT:
        text = layout.config_with(read_json_object(origin.assets[layout.CONFIG]), written.graphs, naming).decode()
        files[layout.CONFIG] = _add(folder / layout.CONFIG, text)
    parameters, bits = _bits_per_weight(origin.config, models, written)
    manifest = Manifest(
        tool=_version("exaone-export"),
        libraries={name: _version(name) for name in LIBRARIES},
        source=origin.source,
        model_type=origin.config.model_type,
        task=origin.task,
        dtype=origin.dtype,
        target=origin.target,
        recipe=stored.recipe,
        graphs=tuple(written.graphs),
        weights=stored.weights,
        limits=stored.limits,
        offload=origin.offload,
        layout=origin.layout,
        files={},
        notes=(
            *missing_assets(origin.assets, origin.task, vision=origin.config.vision is not None),
            *source_notes(origin.source),
            *(cuda_kernels.notes(models) if origin.target == "cuda" else ()),
            *((_INT8_CACHE,) if any(int8_cache(graph) for graph in written.graphs) else ()),
            *((layout.NOTE,) if origin.layout != BUNDLE_LAYOUT else ()),
        ),
    )
    own = origin.layout == BUNDLE_LAYOUT
    if own and origin.task in GENERATION and not int8_cache(manifest.graph(DECODER)):
        windows = window_layers(manifest.graph(DECODER))
        config = genai.genai_config(origin.config, _generation(origin.assets), origin.target, windows)
        files[genai.FILE] = _add(folder / genai.FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    manifest = replace(manifest, files=files, parameters=parameters, bits_per_weight=bits)
    text = card.model_card(card.CardFacts(manifest, origin.config, read_licence(folder, files)))
    manifest = replace(manifest, files=files | {CARD: _add(folder / CARD, text)})
    remove_strays(folder, {*manifest.files, MANIFEST})
    sync_folder(folder)
    write_file(folder / MANIFEST, manifest.to_bytes())
    return report_of(folder, manifest, parameters, bits, written)


def versions() -> dict[str, str]:
    """This package and the libraries that take part → their versions."""
    return {name: _version(name) for name in ("exaone-export", *LIBRARIES)}


def _float_weights(models: Mapping[str, ir.Model]) -> dict[str, WeightInfo]:
    weights = {}
    for graph, model in models.items():
        for value in model.graph.initializers.values():
            name = str(value.name)
            if name.endswith(".weight") and value.const_value is not None and len(value.const_value.shape) > 1:
                count = value.const_value.size
                weights[f"{graph}.{name.removesuffix('.weight')}"] = WeightInfo(0, 0, False, "", count)
    return weights


def _bits_per_weight(config: ExaoneConfig, models: Mapping[str, ir.Model], written: Written) -> tuple[int, float]:
    shapes = expected_tensors(config, draft=MTP in models).values()
    parameters = 0
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        parameters += count
    # Names are graph, slash, tensor. Rotary tables have no module in their name, and constants have a node.
    names = ((name.partition("/")[2], size) for name, size in written.stored.items())
    stored = sum(size for name, size in names if "." in name and "/" not in name)
    return parameters, 8 * stored / parameters


def _generation(assets: Mapping[str, Path]) -> dict[str, Any]:
    path = assets.get("generation_config.json")
    return read_json_object(path) if path is not None else {}


def _add(path: Path, text: str) -> FileInfo:
    content = text.encode()
    write_file(path, content)
    return FileInfo(len(content), hashlib.sha256(content).hexdigest())


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
