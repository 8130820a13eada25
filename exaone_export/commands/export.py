"""Turn a checkpoint into a bundle of ONNX graphs, quantizing on the way if asked."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from exaone_export import api
from exaone_export.output import human_bytes, print_json
from exaone_export.progress import choose_progress
from model.tasks import TASKS

if TYPE_CHECKING:
    from exporter.export import ExportReport

SOURCE_HELP = "a folder with config.json and safetensors files, or the id of a model on the Hugging Face hub"
OUT_HELP = "the folder to make; it must not exist, unless --force is given"
RECIPE_HELP = "int8, int4, int4-edge, int4-quality, int8-dynamic or the path of a recipe (TOML)"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("out", metavar="OUT", help=OUT_HELP)
    add_options(parser)


def add_options(parser: ArgumentParser) -> None:
    """Add the flags that `optimum-cli export exaone` has too."""
    _add_recipe(parser)
    _add_graphs(parser)
    _add_manners(parser)


def _add_recipe(parser: ArgumentParser) -> None:
    """How weights are quantized."""
    parser.add_argument(
        "--quantize",
        default="none",
        metavar="none|int8|int4|auto|RECIPE.toml",
        help=f"quantize the weights: {RECIPE_HELP}; auto plans a recipe within a bound (default: none)",
    )
    parser.add_argument(
        "--bits-per-weight",
        type=float,
        metavar="B",
        help="with --quantize auto: mean bits of a weight, scales included",
    )
    parser.add_argument(
        "--max-bytes", metavar="SIZE", help="with --quantize auto: size of the bundle, 18GB for example"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE.jsonl",
        help="prompts for recipes that look at what goes into a weight, as JSON lines: messages, images "
        "(default: our own, where a recipe needs them)",
    )


def _add_graphs(parser: ArgumentParser) -> None:
    """What the graphs are."""
    parser.add_argument(
        "--dtype",
        default="",
        choices=("fp32", "fp16", "bf16"),
        help="type of what stays float (default: fp32 for cpu, fp16 for cuda)",
    )
    parser.add_argument(
        "--target", default="cpu", choices=("cpu", "cuda"), help="what the graphs will run on (default: cpu)"
    )
    parser.add_argument(
        "--task",
        default="auto",
        help=f"what the graphs are for: {', '.join(TASKS)} (default: what the checkpoint is made for)",
    )
    parser.add_argument(
        "--kv-cache",
        default="",
        choices=("window", "full", "int8"),
        help="what layers keep of keys and values: window layers their window only; everything (full, for runtimes "
        "that let every cache grow); or as window in 8 bits (int8, for the CPU) (default: window, or the layout's)",
    )
    parser.add_argument(
        "--layout",
        default="bundle",
        choices=("bundle", "transformersjs"),
        help="how the files are named: our own way, or as transformers.js looks for them, which takes full caches and "
        "no draft head (default: bundle)",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="with --target cuda: kernels that the CPU has too, for --gpu-layers and --gpu-memory to put layers there",
    )


def _add_manners(parser: ArgumentParser) -> None:
    """Where from, where to, and how."""
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--force", action="store_true", help="replace OUT; it stays valid until the new one is done")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted export stopped, or fail")
    parser.add_argument("--keep-partial", action="store_true", help="keep what is done if the export is interrupted")
    parser.add_argument(
        "--ignore-extra", action="store_true", help="accept tensors that are no part of the model, and list them"
    )
    parser.add_argument(
        "--low-disk", action="store_true", help="of a model on the hub, keep only the weight files in use"
    )
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="upload the bundle to this repository of the hub, owner/EXAONE-..."
    )
    parser.add_argument("--private", action="store_true", help="make that repository private")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that quantize (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(arguments: Namespace) -> int:
    """Export, and print what was written."""
    report = api.export(
        arguments.source,
        arguments.out,
        quantize=arguments.quantize,
        progress=choose_progress(wanted=not (arguments.quiet or arguments.json)),
        dtype=arguments.dtype,
        target=arguments.target,
        task=arguments.task,
        calibration=arguments.calibration,
        bits_per_weight=arguments.bits_per_weight,
        max_bytes=arguments.max_bytes,
        kv_cache=arguments.kv_cache,
        offload=arguments.offload,
        layout=arguments.layout,
        revision=arguments.revision,
        force=arguments.force,
        resume=arguments.resume,
        keep_partial=arguments.keep_partial,
        ignore_extra=arguments.ignore_extra,
        low_disk=arguments.low_disk,
        push_to_hub=arguments.push_to_hub,
        private=arguments.private,
        threads=arguments.threads,
    )
    print_made(report, arguments)
    return 0


def print_made(report: ExportReport, arguments: Namespace) -> None:
    """Print what `export` or `quantize` made, as --json says."""
    if arguments.json:
        print_json(report, arguments.stdout)
    else:
        print("\n".join(_lines(report)), file=arguments.stdout)


def _lines(report: ExportReport) -> Iterator[str]:
    precision = report.dtype if report.recipe == "none" else f"{report.dtype} with {report.recipe} weights"
    yield f"{report.folder}: {report.model_type}, {report.task}, {precision}, for {report.target}"
    graphs = ", ".join(f"{name} {human_bytes(size)}" for name, size in report.graphs.items())
    yield f"size    {human_bytes(report.bytes)} ({graphs}), {report.bits_per_weight:.2f} bits per weight"
    if report.plan is not None:
        size = f"{report.plan['bits_per_weight']:.3f} bits per weight and at most {human_bytes(report.plan['bytes'])}"
        yield f"plan    {report.plan['file']}: {size} predicted, KL divergence {report.plan['measured_kld']:.4g} nats"
    if report.recipe != "none":
        kept = [weight.parameters for weight in report.weights.values() if weight.bits == 0]
        if kept:
            yield f"float   {len(kept)} weights with {sum(kept):,} parameters stay float"
    peak = f", at most {human_bytes(report.peak_rss_bytes)} of memory" if report.peak_rss_bytes else ""
    if report.resumed_parts:
        yield f"resumed {report.resumed_parts} weights, {human_bytes(report.resumed_bytes)} were written before"
    yield f"took    {report.seconds:.1f} s{peak}"
    if report.pushed is not None:
        yield f"pushed  {report.pushed.url}"
