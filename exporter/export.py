"""The room's main path: a checkpoint folder, or a float bundle, becomes a bundle."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter.assets import find_assets
from exporter.bind import bind
from exporter.package import ExportReport, Origin, Transform, finished, hash_files, write_bundle
from exporter.reload import load_float_bundle
from exporter.source import describe_source
from exporter.staging import check_output, staging_folder
from model.config import ExaoneConfig, load_config
from model.errors import CheckpointError, UsageError
from model.progress import NullProgress, Progress
from model.weights import Checkpoint

__all__ = ["ExportOptions", "ExportReport", "export_checkpoint", "rewrite_bundle"]

DTYPES = ("fp32", "fp16", "bf16")
TARGETS = ("cpu", "cuda")
AUTO = "auto"
log = logging.getLogger("exaone_export.exporter")


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how.

    Attributes:
        dtype: of activations and of weights that stay float: "fp32", "fp16" or "bf16".
        target: what the graphs will run on: "cpu" or "cuda".
        task: "auto", or the task the checkpoint is for.
        force: whether to replace a bundle that is already there.
        resume: whether to go on only where an interrupted export of the same kind stopped.
        keep_partial: whether to leave what is done when the export fails or is interrupted.
        ignore_extra: whether to accept tensors that are no part of the model; they are listed in the manifest.
        threads: that quantize side by side; None is all cores. The bytes do not depend on it.
        source_id: what to record as the source; None takes it from the folder.
        revision: of the source; None takes it from the folder.
    """

    dtype: str = "fp32"
    target: str = "cpu"
    task: str = AUTO
    force: bool = False
    resume: bool = False
    keep_partial: bool = False
    ignore_extra: bool = False
    threads: int | None = None
    source_id: str | None = None
    revision: str | None = None


def export_checkpoint(
    source: Path,
    out: Path,
    options: ExportOptions = ExportOptions(),
    transform: Transform | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Exports a checkpoint. Nothing is left behind unless all went well.

    Args:
        source: folder with config.json and safetensors files.
        out: the folder to make.
        options: see `ExportOptions`.
        transform: changes the graphs before they are written (quantization); their weights are lazy.
        progress: is told how far it has come.

    Raises:
        UsageError: options, output folder or kind of model.
        CheckpointError: the checkpoint is damaged, incomplete, or changed meanwhile.
        BundleError: a name or link in it leads outside its folder.
        NumericalError: a weight is NaN or infinite, or too large for the dtype.
        ResourceError: not enough disk.
    """
    started = time.monotonic()
    progress = progress if progress is not None else NullProgress()
    _one_of("--dtype", options.dtype, DTYPES)
    _one_of("--target", options.target, TARGETS)
    check_output(out, source, force=options.force)
    _note_missing_kernels(options)
    config = load_config(source)
    task = _task(config, options.task)
    checkpoint = Checkpoint.open(source)
    refs = checkpoint.bind(config)
    assets = find_assets(source)
    files = {path.name: path for path in (*checkpoint.files, *assets.values())}
    before = _stamps(files)

    def origin_source() -> Mapping[str, Any]:
        digests = hash_files(files, progress)
        _check_unchanged(files, before)
        name, revision = describe_source(source)
        return {"id": options.source_id or name, "revision": options.revision or revision, "files": digests}

    origin = Origin(config, assets, task, options.dtype, options.target, origin_source)
    with staging_folder(out, force=options.force) as folder:
        models = _trace(config, checkpoint.has_draft_head, options.dtype, progress)
        bind(models, refs, config)
        report = write_bundle(folder, models, origin, transform, progress)
    return finished(report, out, started)


def rewrite_bundle(
    bundle: Path, out: Path, transform: Transform, *, force: bool = False, progress: Progress | None = None
) -> ExportReport:
    """Makes a new bundle from a float one by changing its graphs (quantization).

    Args:
        bundle: a bundle that is not quantized.
        out: the folder to make.
        transform: changes the graphs; their weights are lazy.
        force: whether to replace a bundle that is already there.
        progress: is told how far it has come.

    Raises:
        UsageError: the bundle is quantized already, or the output folder cannot be used.
        BundleError: it is damaged.
        NumericalError, ResourceError: as `export_checkpoint`.
    """
    started = time.monotonic()
    progress = progress if progress is not None else NullProgress()
    check_output(out, bundle, force=force)
    manifest, models = load_float_bundle(bundle, progress)
    config = load_config(bundle)
    assets = {name: path for name, path in find_assets(bundle).items() if name in manifest.files}
    origin = Origin(config, assets, manifest.task, manifest.dtype, manifest.target, lambda: manifest.source)
    with staging_folder(out, force=force) as folder:
        report = write_bundle(folder, models, origin, transform, progress)
    return finished(report, out, started)


def _trace(config: ExaoneConfig, draft: bool, dtype: str, progress: Progress) -> dict[str, ir.Model]:
    import torch  # a bundle can be rewritten without it

    from exporter.graphs import graph_specs
    from exporter.trace import trace_graph

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    specs = graph_specs(config, draft)
    progress.start("tracing", len(specs), "graphs")
    models = {}
    for spec in specs:
        models[spec.name] = trace_graph(spec, types[dtype])
        progress.advance(1)
    progress.finish()
    return models


def _note_missing_kernels(options: ExportOptions) -> None:
    if (options.dtype, options.target) == ("bf16", "cpu"):
        log.warning("ONNX Runtime has no bf16 kernels for the CPU: the bundle will not run there. Use fp32 or fp16")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError("cannot export", option, f"{value[:40]!r} is none of {', '.join(allowed)}")


def _task(config: ExaoneConfig, asked: str) -> str:
    task = "text-generation" if config.vision is None else "image-text-to-text"
    if asked not in (AUTO, task, f"{task}-with-past"):
        raise UsageError("cannot export", "--task", f"{asked[:60]!r} is not what this model does", f"Use {task}")
    return task


def _stamps(files: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    return {name: ((status := path.stat()).st_size, status.st_mtime_ns) for name, path in files.items()}


def _check_unchanged(files: Mapping[str, Path], before: Mapping[str, tuple[int, int]]) -> None:
    for name, stamp in _stamps(files).items():
        if stamp != before[name]:
            raise CheckpointError("cannot export", name, "the file changed during the export", "Export again")
