"""Say what a bundle or a checkpoint holds, and what it will need in memory."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from exaone_export import api
from exaone_export.output import human_bytes, print_json

if TYPE_CHECKING:
    from exaone_export.inspection import Inspection


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("source", metavar="BUNDLE|SOURCE", help="a bundle, or a checkpoint folder")
    parser.add_argument(
        "--context",
        metavar="N",
        type=_token_count,
        help="tokens to reckon memory for (default: 4096, 32768 and the most the model allows)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(arguments: Namespace) -> int:
    """Inspect, and print."""
    report = api.inspect(arguments.source, context=arguments.context)
    if arguments.json:
        print_json(report, arguments.stdout)
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
    for graph in report.graphs:
        nodes = f", {sum(graph.ops.values())} nodes" if graph.ops else ""
        yield f"graph    {graph.name}: {human_bytes(graph.bytes)}{nodes}"
        yield f"         {_names(graph.inputs)} -> {_names(graph.outputs)}"
    for scheme, parameters in report.quantized.items():
        yield f"weights  {scheme}: {parameters:,} parameters"
    for recipe, size in report.predicted_bytes.items():
        yield f"bundle   {human_bytes(size)} with --quantize {recipe}"
    yield f"cache    {human_bytes(report.kv_bytes_per_token)} per token"
    for context, size in report.memory_bytes.items():
        yield f"memory   {human_bytes(size)} with {context:,} tokens"


def _names(tensors: Sequence[str]) -> str:
    caches = [name for name in tensors if name.startswith(("past_key_values.", "present."))]
    plain = [name for name in tensors if name not in caches]
    return ", ".join([*plain, f"{len(caches)} cache tensors"] if caches else plain)
