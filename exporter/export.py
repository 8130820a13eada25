"""The room's main path: a checkpoint folder, or a float bundle, becomes a bundle."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import onnx_ir as ir

from exporter.assets import find_assets
from exporter.bind import bind
from exporter.job import Job, fingerprint
from exporter.layout import LAYOUTS, adapt, check_layout
from exporter.needs import Need, Plan, check_need
from exporter.origin import Feed, source_id
from exporter.package import Origin, Transform
from exporter.parallel import thread_count
from exporter.reload import declared_weights, load_graphs, open_float_bundle
from exporter.remarks import describe_tensors
from exporter.report import ExportReport, finished
from exporter.source import describe_source
from exporter.staging import Policy, reclaimable_bytes, reserve
from model.bundle import BUNDLE_LAYOUT, DECODER, FLOAT_BYTES, MTP, TRANSFORMERS_JS
from model.config import ExaoneConfig, load_config
from model.errors import UsageError
from model.jsonfile import read_json_object
from model.numerics import numerics_for
from model.progress import NullProgress, Progress
from model.tasks import AUTO, GENERATION, choose_task, graphs_of
from model.weights import Checkpoint

__all__ = ["ExportOptions", "ExportReport", "Feed", "Policy", "export_checkpoint", "rewrite_bundle"]

DTYPES = ("fp32", "fp16", "bf16")
TARGETS = ("cpu", "cuda")
DEFAULT_DTYPES = {"cpu": "fp32", "cuda": "fp16"}
T = TypeVar("T")
KV_CACHES = ("window", "full", "int8")
log = logging.getLogger("exaone_export.exporter")


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how.

    Attributes:
        dtype: of activations and of weights that stay float: "fp32", "fp16" or "bf16"; "" is fp32 for the CPU and fp16
            for CUDA.
        target: what the graphs will run on: "cpu" or "cuda".
        task: "auto", or one of `model.tasks.possible_tasks`.
        kv_cache: what layers keep of keys and values: "window", in window layers their window only; "full",
            everything, for runtimes that let every cache grow; "int8", as "window" in integers of 8 bits, for the CPU;
            "" is "window", or what the layout's runtime takes.
        layout: how the files are named: "bundle", or "transformersjs", which has no draft head.
        offload: for CUDA, whether decoder layers take kernels that the CPU has too, so that some can run there.
        force: whether to replace a bundle that is already there.
        resume: whether to go on only where an interrupted export of the same kind stopped.
        keep_partial: whether to leave what is done when the export fails or is interrupted.
        ignore_extra: whether to accept tensors that are no part of the model; they are listed in the manifest.
        threads: that quantize side by side; None is all cores. The bytes do not depend on it.
        source_id: what to record as the source; None takes it from the folder.
        revision: of the source; None takes it from the folder.
    """

    dtype: str = ""
    target: str = "cpu"
    task: str = AUTO
    kv_cache: str = ""
    offload: bool = False
    layout: str = BUNDLE_LAYOUT
    force: bool = False
    resume: bool = False
    keep_partial: bool = False
    ignore_extra: bool = False
    threads: int | None = None
    source_id: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.dtype:
            object.__setattr__(self, "dtype", DEFAULT_DTYPES.get(self.target, "fp32"))
        if not self.kv_cache:
            object.__setattr__(self, "kv_cache", "full" if self.layout == TRANSFORMERS_JS else "window")


def export_checkpoint(
    source: Path,
    out: Path,
    options: ExportOptions = ExportOptions(),
    transform: Transform | None = None,
    progress: Progress | None = None,
    feed: Feed | None = None,
) -> ExportReport:
    """Exports a checkpoint. Nothing is left behind unless all went well; what was killed is gone on with.

    Args:
        source: folder with config.json and safetensors files.
        out: the folder to make.
        options: see `ExportOptions`.
        transform: changes the graphs before they are written (quantization); their weights are lazy.
        progress: is told how far it has come.
        feed: of files that are fetched when they are needed.

    Raises:
        UsageError: options, output folder or kind of model; `options.resume`, and there is nothing to resume.
        LockedError: another process exports to the folder.
        CheckpointError: the checkpoint is damaged, incomplete, or changed meanwhile.
        BundleError: a name or link in it leads outside its folder.
        NumericalError: a weight is NaN or infinite, or too large for the dtype.
        ResourceError: not enough disk or memory, which is said before any work where it can be told.
    """
    started = time.monotonic()
    progress = progress if progress is not None else NullProgress()
    _check_options(options)
    transform = _for_target(transform, options.target)
    _note_missing_kernels(options)
    with reserve(out, source, Policy(options.force, options.resume, options.keep_partial)) as place:
        config = _for_task(load_config(source), options.task)
        _check_attention(config, options)
        _check_cache(config, options)
        checkpoint = Checkpoint.open(source, feed.gate if feed is not None else None, ignore_extra=options.ignore_extra)
        refs = checkpoint.bind(config)
        remarks = describe_tensors(checkpoint, config, refs)
        draft = checkpoint.has_draft_head and options.layout == BUNDLE_LAYOUT
        refs = {name: ref for name, ref in refs.items() if draft or not name.startswith(f"{MTP}.")}
        assets = find_assets(source)
        named = {path.name: path for path in (*checkpoint.files, *assets.values())}
        shared = options.layout == BUNDLE_LAYOUT
        plan = Plan(config, refs, transform, FLOAT_BYTES[options.dtype], thread_count(options.threads), shared=shared)
        need = plan.need(assets.values())
        check_need(need, out, reclaimable_bytes(out))
        job = Job(place, _choices(config.task, options, transform), transform, progress, feed)
        files = job.begin(named)
        with files.hashing():
            job.check_source(files)
            models = _trace(config, draft, options, progress)
            adapt(options.layout, models)
            bind(models, refs, config)
            identity = _identity(source, options, files.digests(progress)) | remarks | _remarks_of(transform)
            kind = (config.task, options.dtype, options.target, identity, options.offload, options.layout)
            origin = Origin(config, assets, *kind)
            report = job.run(models, origin, files, refs)
    return finished(_beside(report, need), out, started)


def rewrite_bundle(
    bundle: Path,
    out: Path,
    transform: Transform,
    policy: Policy | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Makes a new bundle from a float one by changing its graphs (quantization).

    Args:
        bundle: a bundle that is not quantized.
        out: the folder to make.
        transform: changes the graphs; their weights are lazy.
        policy: what to do with an existing bundle or an interrupted export.
        progress: is told how far it has come.

    Raises:
        UsageError: the bundle is quantized already, or the output folder cannot be used.
        BundleError: it is damaged.
        LockedError, NumericalError, ResourceError: as `export_checkpoint`.
    """
    started = time.monotonic()
    progress = progress if progress is not None else NullProgress()
    with reserve(out, bundle, policy or Policy()) as place:
        manifest, named = open_float_bundle(bundle)
        transform = _for_target(transform, manifest.target)
        config = replace(load_config(bundle), task=manifest.task)
        assets = {name: path for name, path in find_assets(bundle).items() if name in manifest.files}
        weights, threads = declared_weights(bundle, manifest, config), getattr(transform, "threads", 1)
        shared = manifest.layout == BUNDLE_LAYOUT
        plan = Plan(config, weights, transform, FLOAT_BYTES[manifest.dtype], threads, rewrites=True, shared=shared)
        need = plan.need(assets.values())
        check_need(need, out, reclaimable_bytes(out))
        job = Job(place, {"--quantize": fingerprint(transform)}, transform, progress)
        files = job.begin(named)
        with files.hashing():
            job.check_source(files)
            models = load_graphs(bundle, manifest, files.digests(progress))
            kept = (manifest.task, manifest.dtype, manifest.target, manifest.source, manifest.offload, manifest.layout)
            origin = Origin(config, assets, *kept)
            report = job.run(models, origin, files)
    return finished(_beside(report, need), out, started)


def _beside(report: ExportReport, need: Need) -> ExportReport:
    """The report with what the export was reckoned to need."""
    return replace(report, predicted_bytes=need.bundle, predicted_peak_bytes=need.memory)


def _choices(task: str, options: ExportOptions, transform: Transform | None) -> dict[str, str]:
    """The options that the bytes depend on."""
    return {
        "--dtype": options.dtype,
        "--target": options.target,
        "--task": task,
        "--kv-cache": options.kv_cache,
        "--offload": "on" if options.offload else "off",
        "--layout": options.layout,
        "--quantize": fingerprint(transform),
        "--ignore-extra": "on" if options.ignore_extra else "off",
    }


def _identity(source: Path, options: ExportOptions, digests: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest says of the source."""
    name, revision = describe_source(source)
    name = options.source_id or name or source_id(read_json_object(source / "config.json"), digests)
    return {"id": name, "revision": options.revision or revision, "files": digests}


def _remarks_of(transform: Transform | None) -> dict[str, Any]:
    """What a transform has to say about what the bundle is made from."""
    return dict(getattr(transform, "remarks", {}))


def _trace(config: ExaoneConfig, draft: bool, options: ExportOptions, progress: Progress) -> dict[str, ir.Model]:
    import torch  # a bundle can be rewritten without it

    from exporter.graphs import graph_specs
    from exporter.trace import trace_graph

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    numerics = numerics_for(options.target, options.dtype, options.offload)
    specs = graph_specs(config, draft, window_cache=options.kv_cache == "window", numerics=numerics)
    progress.start("tracing", len(specs), "graphs")
    models = {}
    for spec in specs:
        models[spec.name] = trace_graph(
            spec, types[options.dtype], for_cpu=options.target == "cpu", int8_cache=options.kv_cache == "int8"
        )
        progress.advance(1)
    progress.finish()
    return models


def _note_missing_kernels(options: ExportOptions) -> None:
    if (options.dtype, options.target) == ("bf16", "cpu"):
        log.warning("ONNX Runtime has no bf16 kernels for the CPU: the bundle will not run there. Use fp32 or fp16")


def _for_target(transform: T, target: str) -> T:
    """A transform as it is for a target; it may refuse one for which its nodes have no kernels."""
    adapt: Any = getattr(transform, "for_target", None)
    return transform if adapt is None else cast(T, adapt(target))


def _check_attention(config: ExaoneConfig, options: ExportOptions) -> None:
    if (options.dtype, options.target) == ("fp32", "cuda") and DECODER in graphs_of(
        config.task, vision=config.vision is not None
    ):
        raise UsageError(
            "cannot export", "--dtype fp32", "CUDA's kernel for GroupQueryAttention takes fp16 and bf16 only",
            "Use fp16, or bf16 on GPUs from the Ampere generation on",
        )  # fmt: skip


def _check_options(options: ExportOptions) -> None:
    """Refuses what no model can be exported with."""
    _one_of("--target", options.target, TARGETS)
    _one_of("--dtype", options.dtype, DTYPES)
    _one_of("--kv-cache", options.kv_cache, KV_CACHES)
    _one_of("--layout", options.layout, LAYOUTS)
    check_layout(options.layout, options.dtype, options.target, options.kv_cache)
    if options.offload and (options.target, options.dtype) != ("cuda", "fp16"):
        why = f"the CPU shares layers with CUDA in fp16 only, not with {options.target} in {options.dtype}"
        raise UsageError("cannot export", "--offload", why, "Use --target cuda and --dtype fp16, or leave it out")


def _check_cache(config: ExaoneConfig, options: ExportOptions) -> None:
    """Refuses a cache of integers where there is none, or no kernel for it."""
    if options.kv_cache != "int8":
        return
    if options.target != "cpu" or options.dtype != "fp32":
        why = (
            f"its products of integers are for --target cpu and --dtype fp32, not {options.target} and {options.dtype}"
        )
        raise UsageError("cannot export", "--kv-cache int8", why, "Leave it out")
    if config.task not in GENERATION:
        why = f"{config.task} keeps no keys and values"
        raise UsageError("cannot export", "--kv-cache int8", why, "Leave it out")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError("cannot export", option, f"{value[:40]!r} is none of {', '.join(allowed)}")


def _for_task(config: ExaoneConfig, asked: str) -> ExaoneConfig:
    return replace(config, task=choose_task(asked, config.architecture, vision=config.vision is not None))
