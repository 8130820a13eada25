"""Say what a bundle or a checkpoint holds, and what it will need in memory."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from exaone_export import api
from exaone_export.output import human_bytes, print_json
from exaone_export.progress import choose_progress
from model.errors import printable

if TYPE_CHECKING:
    from exaone_export.inspection import Inspection, Outlook


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "source",
        metavar="BUNDLE|SOURCE",
        help="a bundle, a checkpoint folder, or the id of a model on the hub (no weight is downloaded)",
    )
    parser.add_argument(
        "--context",
        metavar="N",
        type=_token_count,
        help="tokens to reckon memory for (default: 4096, 32768 and the most the model allows)",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(arguments: Namespace) -> int:
    """Inspect, and print."""
    progress = choose_progress(wanted=not (arguments.quiet or arguments.json))
    report = api.inspect(arguments.source, context=arguments.context, revision=arguments.revision, progress=progress)
    if arguments.json:
        plain = {item.name: getattr(report, item.name) for item in fields(report)}
        print_json({**plain, "memory": report.memory}, arguments.stdout)
    else:
        print("\n".join(_lines(report)), file=arguments.stdout)
    return 0


def _token_count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a number of tokens")
    return int(text)


def _lines(report: Inspection) -> Iterator[str]:
    yield f"{report.model_type}, {report.task}"
    yield f"size     {human_bytes(report.bytes)}, {report.bits_per_weight:.2f} bits per weight"
    for scheme, parameters in report.quantized.items():
        yield f"weights  {scheme}: {parameters:,} parameters"
    for kind, names in report.left_out.items():
        some = ", ".join(printable(name, 60) for name in names[:3]) + (", ..." if len(names) > 3 else "")
        yield f"unused   {len(names)} tensors ({kind.replace('_', ' ')}): {some}"
    for graph in report.graphs:
        nodes = f", {sum(graph.ops.values())} nodes" if graph.ops else ""
        yield f"graph    {graph.name}: {human_bytes(graph.bytes)}{nodes}"
        yield f"         {_names(graph.inputs)} -> {_names(graph.outputs)}"
    if report.kv_bytes_per_token or report.kv_window_bytes:
        windows = f", and up to {human_bytes(report.kv_window_bytes)} for windows" if report.kv_window_bytes else ""
        yield f"cache    {human_bytes(report.kv_bytes_per_token)} per token{windows}"
    yield ""
    yield from _table(_rows(report))
    if report.predicted_bytes:
        yield "Bundles that exporting it would give; sizes on cuda are estimates."


def _rows(report: Inspection) -> Iterator[Sequence[str]]:
    """For each bundle its size, and the memory it takes; then the part of it that is the cache."""
    shown = [
        (target, recipe, outlook) for target, recipes in report.outlooks.items() for recipe, outlook in recipes.items()
    ]
    contexts = list(report.memory_bytes)
    # Features of images have no context.
    heads = [f"{tokens:,} tokens" for tokens in contexts] if len(contexts) > 1 or contexts[0] > 1 else ["memory"]
    yield ("memory", "", "weights", "bits", *heads)
    for target, recipe, outlook in shown:
        sizes = [human_bytes(need.total) for need in outlook.memory.values()]
        yield (target, recipe, human_bytes(outlook.bytes), f"{outlook.bits_per_weight:.2f}", *sizes)
    caches: dict[str, Outlook] = {f"{target} {outlook.dtype}": outlook for target, _, outlook in shown}
    for place, outlook in caches.items():
        sizes = [human_bytes(need.kv) for need in outlook.memory.values()]
        if any(need.kv for need in outlook.memory.values()):
            yield (place.partition(" ")[0], f"cache {outlook.dtype}", "", "", *sizes)


def _table(rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they need to be: words on the left, numbers on the right."""
    cells = list(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        yield "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()


def _names(tensors: Sequence[str]) -> str:
    caches = [name for name in tensors if name.startswith(("past_key_values.", "present."))]
    plain = [name for name in tensors if name not in caches]
    return ", ".join([*plain, f"{len(caches)} cache tensors"] if caches else plain)
