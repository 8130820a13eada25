"""The public functions: each puts rooms together that may not see one another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from model.errors import UsageError

if TYPE_CHECKING:
    from exaone_export.inspection import Inspection
    from exaone_export.verification import Verification
    from exporter.export import ExportReport
    from exporter.package import Transform
    from model.progress import Progress
    from quantize.recipe import Recipe
    from runtime.engine import Engine


class ExportKeywords(TypedDict, total=False):
    """What `export` takes beyond source, folder and recipe; the defaults are `exporter.export.ExportOptions`'s."""

    dtype: str
    """fp32, fp16 or bf16: the type of what stays float."""
    target: str
    """cpu or cuda: what the graphs will run on."""
    task: str
    """What the graphs are for; "auto" takes it from the checkpoint."""
    revision: str | None
    """Branch, tag or commit of a model on the hub."""
    force: bool
    """Replace an existing folder, which stays valid until the new one is complete."""
    resume: bool
    """Go on where an interrupted export of the same kind stopped, or fail; without it that is done where possible."""
    keep_partial: bool
    """Leave what is done when the export fails or is interrupted."""
    ignore_extra: bool
    """Accept tensors that are no part of the model; they are listed in the manifest."""
    threads: int | None
    """Threads that quantize side by side; None is all cores. The bytes do not depend on it."""
    low_disk: bool
    """Of a model on the hub: fetch a shard when it is needed and remove it after its use."""


def export(
    source: str | Path,
    out: str | Path,
    *,
    quantize: str | Path | Recipe | None = None,
    progress: Progress | None = None,
    **options: Unpack[ExportKeywords],
) -> ExportReport:
    """Turn a checkpoint into a bundle; the weights stream through, so memory stays near the largest tensor's size.

    Args:
        source: a local folder with config.json and safetensors files, or a model id on the Hugging Face hub.
        out: the folder to make.
        quantize: "int8", "int4", a recipe's path or a `Recipe`; None or "none" keeps all weights float.
        progress: told how far it is.
        options: dtype, target, task, revision, force and others; see `ExportKeywords`.

    Raises:
        UsageError: an option or the recipe is wrong, or `out` exists.
        CheckpointError: the source is damaged, incomplete or of another architecture.
        EnvironmentFault: a library is missing, or the hub cannot be reached.
        ResourceError: disk or memory is exhausted.
        NumericalError: a weight is NaN or infinite.
    """
    from exporter.export import ExportOptions, export_checkpoint
    from exporter.source import resolve_source
    from exporter.staging import check_output

    transform = _transform(quantize)
    revision = options.pop("revision", None)
    options.pop("low_disk", None)  # TODO(hub): belongs to resolve_source
    checked = ExportOptions(**options)
    check_output(Path(out), Path(source), force=checked.force)  # before anything is downloaded
    folder = resolve_source(os.fspath(source), revision)
    return export_checkpoint(folder, Path(out), checked, transform, progress)


def quantize(
    bundle: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = "int4",
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Quantize a float bundle into a new one, the same as exporting with the recipe gives.

    Args:
        bundle: folder of a bundle whose weights are float.
        out: the folder to make.
        recipe: "int8", "int4", a recipe's path or a `Recipe`.
        force: replace an existing folder, which stays valid until the new one is complete.
        progress: told how far it is.

    Raises:
        UsageError: the recipe is wrong, `out` exists, or the bundle is quantized already.
        BundleError: the bundle is damaged.
        ResourceError: disk or memory is exhausted.
        NumericalError: a weight is NaN or infinite.
    """
    from exporter.export import rewrite_bundle

    transform = _transform(recipe)
    if transform is None:
        raise UsageError("cannot quantize", "--quantize", '"none" changes nothing', "Name int8, int4 or a recipe")
    return rewrite_bundle(Path(bundle), Path(out), transform, force=force, progress=progress)


def load(bundle: str | Path, *, ep: str = "auto", threads: int | None = None) -> Engine:
    """Open a bundle for generation; close the engine, or use it as a context manager, to free its memory.

    Args:
        bundle: folder of a bundle.
        ep: execution provider: "auto" takes the best that loads, a name ("cpu", "cuda", ...) takes that or fails.
        threads: number of threads for one operator; None leaves it to ONNX Runtime.

    Raises:
        BundleError: the bundle is damaged.
        EnvironmentFault: the execution provider cannot be had here.
        ResourceError: the model does not fit into memory.
    """
    from runtime.engine import Engine

    return Engine.load(Path(bundle), ep=ep, threads=threads)


def verify(
    bundle: str | Path,
    *,
    source: str | Path | None = None,
    prompts: str | Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a bundle's integrity, and with `source` how close it is to the model it was made from.

    Args:
        bundle: folder of a bundle.
        source: the checkpoint's folder or hub id; needs the export extra.
        prompts: JSON lines to measure quality on; None takes built-in ones.
        progress: told how far it is.

    Raises:
        BundleError: the bundle cannot be read at all; a damaged file is reported, not raised.
        CheckpointError: the source is damaged.
        UsageError: the prompts are wrong.
    """
    from exaone_export.verification import verify_bundle

    return verify_bundle(Path(bundle), source=source, prompts=prompts, progress=progress)


def inspect(source: str | Path, *, context: int | None = None) -> Inspection:
    """Describe a bundle or a checkpoint: graphs, tensors, bits per weight, sizes, memory.

    Args:
        source: a bundle's or a checkpoint's folder.
        context: tokens to reckon memory for; None takes a few usual lengths.

    Raises:
        UsageError: there is no such folder.
        BundleError: the bundle is damaged.
        CheckpointError: the checkpoint is damaged.
    """
    from exaone_export.inspection import inspect as inspect_folder

    return inspect_folder(Path(source), context=context)


def _transform(recipe: str | Path | Recipe | None) -> Transform | None:
    """What the exporter applies to the traced graphs before writing them; it does not know of quantization itself."""
    if recipe is None or recipe == "none":
        return None
    from quantize.apply import quantize_models
    from quantize.recipe import Recipe, load_recipe

    rules = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return lambda models: quantize_models(models, rules)
