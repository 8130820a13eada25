"""Makes one bundle folder out of graphs: weights, files taken over, genai_config.json, model card, manifest last."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from exporter import card, genai
from exporter.assets import copy_assets, missing_assets
from exporter.staging import check_space
from exporter.write import Written, predicted_bytes, sync, write_file, write_models
from model.bundle import MANIFEST, MTP, FileInfo, Manifest, WeightInfo
from model.config import ExaoneConfig
from model.jsonfile import read_json_object
from model.progress import Progress
from model.weights import expected_tensors

log = logging.getLogger("exaone_export.exporter")
LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxscript", "optimum", "safetensors", "torch")


class QuantizationSummary(Protocol):
    """What a transform of the graphs says of itself."""

    @property
    def recipe(self) -> str:
        """Name of the recipe."""

    def manifest_weights(self) -> Mapping[str, WeightInfo]:
        """Module path → how it is stored now."""


Transform = Callable[[dict[str, ir.Model]], QuantizationSummary]


@dataclass(frozen=True)
class Origin:
    """What a bundle is made from.

    Attributes:
        config: of the model.
        assets: name → file to take over.
        task, dtype, target: as in the manifest.
        source: as in the manifest; a function, because hashing the files is best done when they were just read.
    """

    config: ExaoneConfig
    assets: Mapping[str, Path]
    task: str
    dtype: str
    target: str
    source: Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        folder: the bundle.
        model_type, task, dtype, target, recipe, notes: as in its manifest.
        graphs: graph name → bytes of its own files.
        bytes: of the whole folder.
        parameters: number of weights.
        bits_per_weight: stored bits of all weights over their number.
        weights: module path → how it is stored.
        seconds: how long it took.
        peak_rss_bytes: the most memory this process had so far; 0 where the system does not say.
    """

    folder: Path
    model_type: str
    task: str
    dtype: str
    target: str
    recipe: str
    notes: tuple[str, ...]
    graphs: Mapping[str, int]
    bytes: int
    parameters: int
    bits_per_weight: float
    weights: Mapping[str, WeightInfo]
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self) | {"folder": str(self.folder)}


def write_bundle(
    folder: Path, models: dict[str, ir.Model], origin: Origin, transform: Transform | None, progress: Progress
) -> ExportReport:
    """Fills an empty folder with a bundle; the report names that folder and no time.

    Raises:
        ResourceError: the disk has not enough room.
        NumericalError, CheckpointError: from reading a weight.
    """
    weights = dict(_float_weights(models))
    recipe = "none"
    if transform is not None:
        summary = transform(models)
        recipe, weights = summary.recipe, weights | dict(summary.manifest_weights())
    assets = sum(path.stat().st_size for path in origin.assets.values())
    check_space(folder, predicted_bytes(models) + assets)
    written = write_models(models, folder, progress)
    files = written.files | copy_assets(origin.assets, folder)
    parameters, bits = _bits_per_weight(origin.config, models, written)
    manifest = Manifest(
        tool=_version("exaone-export"),
        libraries={name: _version(name) for name in LIBRARIES},
        source=origin.source(),
        model_type=origin.config.model_type,
        task=origin.task,
        dtype=origin.dtype,
        target=origin.target,
        recipe=recipe,
        graphs=tuple(written.graphs),
        weights=weights,
        files={},
        notes=missing_assets(origin.assets, vision=origin.config.vision is not None),
    )
    config = genai.genai_config(origin.config, _generation(origin.assets), origin.target)
    files[genai.FILE] = _add(folder / genai.FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    text = card.model_card(manifest, files, bits_per_weight=bits, parameters=parameters)
    files[card.FILE] = _add(folder / card.FILE, text)
    manifest = replace(manifest, files=files)
    sync(folder)
    manifest.write(folder)
    sync(folder / MANIFEST)
    return _report(folder, manifest, parameters, bits)


def hash_files(files: Mapping[str, Path], progress: Progress) -> dict[str, str]:
    """Name → sha256 of each file, in order of the names."""
    progress.start("hashing", sum(path.stat().st_size for path in files.values()), "bytes")
    digests = {}
    for name, path in sorted(files.items()):
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                progress.advance(len(block))
        digests[name] = digest.hexdigest()
    progress.finish()
    return digests


def peak_rss_bytes() -> int:
    """The most memory this process ever had; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        if sys.platform == "win32":
            return 0
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def finished(report: ExportReport, folder: Path, started: float) -> ExportReport:
    """The report with its final folder, and the time since `started` (`time.monotonic`)."""
    return replace(report, folder=folder, seconds=time.monotonic() - started)


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
    # Rotary tables and lifted constants have no module in their name.
    stored = sum(size for name, size in written.stored.items() if "." in name)
    return parameters, 8 * stored / parameters


def _generation(assets: Mapping[str, Path]) -> dict[str, Any]:
    path = assets.get("generation_config.json")
    return read_json_object(path) if path is not None else {}


def _add(path: Path, text: str) -> FileInfo:
    content = text.encode()
    write_file(path, content)
    return FileInfo(len(content), hashlib.sha256(content).hexdigest())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _report(folder: Path, manifest: Manifest, parameters: int, bits: float) -> ExportReport:
    sizes = {name: info.size for name, info in manifest.files.items()}
    return ExportReport(
        folder=folder,
        model_type=manifest.model_type,
        task=manifest.task,
        dtype=manifest.dtype,
        target=manifest.target,
        recipe=manifest.recipe,
        notes=manifest.notes,
        graphs={g.name: sizes[g.file] + sizes.get(f"{g.file}.data", 0) for g in manifest.graphs},
        bytes=sum(sizes.values()) + (folder / MANIFEST).stat().st_size,
        parameters=parameters,
        bits_per_weight=bits,
        weights=manifest.weights,
        seconds=0.0,
        peak_rss_bytes=peak_rss_bytes(),
    )
