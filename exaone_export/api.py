"""The public functions: each puts rooms together that may not see one another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from model.errors import UsageError
from model.tasks import GENERATION

if TYPE_CHECKING:
    from exaone_export.inspection import Inspection
    from exaone_export.verification import Verification
    from exporter.export import ExportReport
    from exporter.push import PushReport
    from model.progress import Progress
    from quantize.apply import Quantizer
    from quantize.recipe import Recipe
    from runtime.encoder import Encoder
    from runtime.engine import Engine


class ExportKeywords(TypedDict, total=False):
    """What `export` takes beyond source, folder and recipe; the defaults are `exporter.export.ExportOptions`'s."""

    dtype: str
    """fp32, fp16 or bf16: the type of what stays float; without it fp32 for cpu, fp16 for cuda."""
    target: str
    """cpu or cuda: what the graphs will run on."""
    task: str
    """What the graphs are for, one of `model.tasks.TASKS`; "auto" takes it from the checkpoint."""
    kv_cache: str
    """window, full or int8: what layers keep of keys and values; without it window, or what the layout asks for.

    With window, window layers keep their window only; full is for runtimes that let every cache grow; int8 is window in
    integers of 8 bits, about a quarter of the memory, for the CPU.
    """
    offload: bool
    """With target="cuda": kernels that the CPU has too, so that gpu_layers and gpu_memory can put layers there."""
    layout: str
    """bundle or transformersjs: how the files are named. With the latter every cache grows; there is no draft head."""
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
    calibration: str | Path | None
    """JSON lines of prompts for methods that look at what goes into a weight; None takes our own where they must.

    What comes of them depends in its last bits on the processor, and on the threads that torch and BLAS use."""
    threads: int | None
    """Threads that quantize side by side; None is all cores. The bytes do not depend on it."""
    bits_per_weight: float | None
    """With quantize="auto": what the plan stays within, as the manifest counts bits."""
    max_bytes: int | str | None
    """With quantize="auto": the same in bytes of the whole bundle, "18GB" for example."""
    low_disk: bool
    """Of a model on the hub: fetch a shard when it is needed and remove it after its use."""
    push_to_hub: str | None
    """Upload the bundle to this repository of the hub; its name must begin with EXAONE, as the licence wants."""
    private: bool
    """Make that repository private."""


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
        quantize: "int8", "int4", "int4-edge", "int4-quality", "int8-dynamic", a recipe's path or a `Recipe`; None or
            "none" keeps all weights float; "auto" plans one within `bits_per_weight` or `max_bytes`, beside `out`.
        progress: told how far it is.
        options: dtype, target, task, revision, force and others; see `ExportKeywords`.

    Raises:
        UsageError: an option or the recipe is wrong, or `out` exists.
        CheckpointError: the source is damaged, incomplete or of another architecture.
        EnvironmentFault: a library is missing, or the hub cannot be reached.
        ResourceError: disk or memory is exhausted.
        NumericalError: a weight is NaN or infinite.
    """
    # Before anything is downloaded, or takes its time to be imported.
    _check_places(Path(source), Path(out), options)
    from exaone_export.calibration.choose import calibrated, take_calibration
    from exaone_export.planning.bound import take_bound
    from exaone_export.usable import check_usable
    from exporter.export import ExportOptions, export_checkpoint
    from exporter.push import check_name, push_bundle
    from exporter.source import open_source

    others: dict[str, Any] = dict(options)
    bound = take_bound(others, quantize, Path(out))
    transform = _transform(_recipe(quantize) if bound is None else None, options.get("threads"))
    file = take_calibration(others, transform.recipe, planned=bound is not None)
    where = {name: others.pop(name) for name in ("revision", "low_disk") if name in others}
    repository, private = _push_target(others, Path(source))
    checked = ExportOptions(**others)
    with open_source(os.fspath(source), Path(out), **where, keep=checked.keep_partial, progress=progress) as opened:
        if repository is not None:
            check_name(repository, opened.folder, opened.id)
        check_usable(opened.folder)
        checked = replace(checked, source_id=opened.id, revision=opened.revision)
        plan = None
        if bound is not None:
            from exaone_export.planning.plan import plan_quantization

            kind = {"dtype": checked.dtype, "task": checked.task}
            plan = plan_quantization(opened.folder, bound, **kind, calibration=file, progress=progress)
            transform = replace(transform, recipe=plan.recipe)
        transform = calibrated(transform, opened.folder, file)
        report = export_checkpoint(opened.folder, Path(out), checked, transform, progress, opened.feed)
        report = replace(report, plan=plan.summary if plan is not None else None)
    pushed = None if repository is None else push_bundle(Path(out), repository, private=private, progress=progress)
    return replace(report, pushed=pushed)


def _check_places(source: Path, out: Path, options: ExportKeywords) -> None:
    """Refuses an output folder that cannot be, and a repository that no name on the hub can mean."""
    from exporter.staging import check_place

    check_place(out, source, force=options.get("force", False))
    repository = options.get("push_to_hub")
    if repository is not None:
        from exporter.push import check_form

        check_form(repository)


def _push_target(options: dict[str, Any], source: Path) -> tuple[str | None, bool]:
    """Takes the repository to upload to, None for none, and whether it is to be private, out of the options."""
    from exporter.push import check_access, check_name

    repository, private = options.pop("push_to_hub", None), options.pop("private", False)
    if private and repository is None:
        raise UsageError("wrong arguments", "--private", "there is nothing to hide", "Add --push-to-hub")
    if repository is None:
        return None, False
    if source.is_dir():
        check_name(repository, source, None)  # a look that costs nothing, before the hub is asked
    return check_access(repository, private=private), private


def push(bundle: str | Path, repository: str, *, private: bool = False, progress: Progress | None = None) -> PushReport:
    """Upload a bundle to the Hugging Face hub, in one commit, after checking every file.

    Args:
        bundle: folder of a bundle.
        repository: ``owner/EXAONE-...``, or the name alone for one of your own; it is made if there is none.
        private: make the repository private.
        progress: told how far it is.

    Raises:
        BundleError: the bundle is damaged.
        UsageError: the licence does not allow the name, or the token may not write there.
        EnvironmentFault: the hub cannot be reached.
    """
    from exaone_export.figures import settle_card
    from exporter.push import check_form, push_bundle
    from model.bundle import read_manifest

    check_form(repository)
    settle_card(Path(bundle), read_manifest(Path(bundle)))
    return push_bundle(Path(bundle), repository, private=private, progress=progress)


def quantize(
    bundle: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = "int4",
    force: bool = False,
    resume: bool = False,
    keep_partial: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Quantize a float bundle into a new one, the same as exporting with the recipe gives.

    Args:
        bundle: folder of a bundle whose weights are float.
        out: the folder to make.
        recipe: "int8", "int4", "int4-edge", "int8-dynamic", a recipe's path or a `Recipe` without calibration.
        force, resume, keep_partial, threads: see `ExportKeywords`.
        progress: told how far it is.

    Raises:
        UsageError: the recipe is wrong, `out` exists, or the bundle is quantized already.
        BundleError: the bundle is damaged.
        LockedError: another process writes to `out`.
        ResourceError: disk or memory is exhausted.
        NumericalError: a weight is NaN or infinite.
    """
    from exporter.staging import check_place

    check_place(Path(out), Path(bundle), force=force)
    from exaone_export.calibration.choose import refuse_uncalibrated
    from exaone_export.integrity import check_graphs
    from exporter.export import Policy, rewrite_bundle

    rules = _recipe(recipe)
    if rules is None:
        raise UsageError("cannot quantize", "--quantize", '"none" changes nothing', "Name int8, int4 or a recipe")
    refuse_uncalibrated(rules)
    check_graphs(Path(bundle))
    policy = Policy(force, resume, keep_partial)
    return rewrite_bundle(Path(bundle), Path(out), _transform(rules, threads), policy, progress)


def load(
    bundle: str | Path,
    *,
    ep: str = "auto",
    threads: int | None = None,
    ep_options: Mapping[str, Any] | None = None,
    gpu_layers: int | None = None,
    gpu_memory: int | str | None = None,
    cuda_graph: str = "auto",
) -> Engine | Encoder:
    """Open a bundle: an `Engine` where it generates, for any other task an `Encoder`.

    Close it, or use it as a context manager, to free its memory. What the bundle was not exported for raises
    UsageError.

    Args:
        bundle: folder of a bundle.
        ep: execution provider: "auto" takes the best that loads, a name ("cpu", "cuda", ...) takes that or fails.
        threads: number of threads for one operator; None leaves it to ONNX Runtime.
        ep_options: options of the execution provider, passed on as they are: ``{"device_id": 1}``.
        gpu_layers: decoder layers on the GPU, the model's last ones; the others run on the CPU, which takes a bundle
            exported with `offload`. None is all of them, or as many as `gpu_memory` has room for.
        gpu_memory: bytes of the GPU that weights, cache and kernels may use together, or text such as "20GB"; None is
            what is free.
        cuda_graph: whether the launches of a decoding step are recorded once and replayed: "on", "off", or "auto",
            which is on where ONNX Runtime can record the graph. Never while layers run on the CPU.

    Raises:
        UsageError: an option makes no sense, or the provider has none of that name.
        BundleError: the bundle is damaged.
        EnvironmentFault: the execution provider cannot be had here, or would leave work to the CPU.
        ResourceError: the model does not fit into memory.
    """
    from runtime.execution import Execution
    from runtime.graphs import Graphs

    execution = Execution(ep_options or {}, gpu_layers, gpu_memory, cuda_graph)
    graphs = Graphs(Path(bundle), ep, threads, execution=execution)
    if graphs.config.task in GENERATION:
        from runtime.engine import Engine

        return Engine(graphs)
    from runtime.encoder import Encoder

    return Encoder(graphs)


def verify(
    bundle: str | Path,
    *,
    source: str | Path | None = None,
    prompts: str | Path | None = None,
    limits: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a bundle's integrity, and with `source` how close it is to the model it was made from.

    Args:
        bundle: folder of a bundle.
        source: the checkpoint's folder or hub id; needs the export extra.
        prompts: JSON lines to measure quality on; None takes built-in ones.
        limits: figure (mean_kld, same_top, ...; see `model.limits`) → most or least with which the bundle is ok; they
            take the place of its recipe's own.
        progress: told how far it is.

    Raises:
        BundleError: the bundle cannot be read at all; a damaged file is reported, not raised.
        CheckpointError: the source is damaged.
        UsageError: the prompts or the limits are wrong.
    """
    from exaone_export.verification import verify_bundle

    return verify_bundle(Path(bundle), source=source, prompts=prompts, progress=progress, limits=limits)


def inspect(
    source: str | Path,
    *,
    context: int | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Describe a bundle or a checkpoint, and what it will need: graphs, bits per weight, sizes, memory.

    No weight is read or, of a hub model, downloaded.

    Args:
        source: a bundle's or a checkpoint's folder, or a model id on the Hugging Face hub.
        context: tokens to reckon memory for; None takes a few usual lengths.
        revision: branch, tag or commit of a model on the hub.
        progress: told how far it is.

    Raises:
        UsageError: there is no such folder or model.
        BundleError: the bundle is damaged.
        CheckpointError: the checkpoint is damaged.
        EnvironmentFault: the hub cannot be reached.
    """
    from exaone_export.inspection import inspect as inspect_source

    return inspect_source(source, context, revision, progress)


def _recipe(recipe: str | Path | Recipe | None) -> Recipe | None:
    """The rules that a caller means; None for none."""
    if recipe is None or recipe == "none":
        return None
    from quantize.recipe import Recipe, load_recipe

    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _transform(recipe: Recipe | None, threads: int | None) -> Quantizer:
    """What the exporter applies to the traced graphs before writing them; it does not know of quantization itself."""
    from exporter.parallel import thread_count
    from quantize.apply import Quantizer

    return Quantizer(recipe, thread_count(threads))
