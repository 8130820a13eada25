"""Check that a bundle is whole, and with --source that it answers as the original model does.

Without --source: sizes and sha256 of every file, the manifest, and that the graphs are what they claim. With --source:
also each graph against the torch model (parity), and the distribution of the next token (quality); the figures are
kept in the bundle's verify.json and README.md.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from exaone_export import api
from exaone_export.output import print_json
from exaone_export.progress import choose_progress
from model.errors import BundleError, ExaoneError, NumericalError

if TYPE_CHECKING:
    from exaone_export.verification import Verification


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle to check")
    parser.add_argument("--source", metavar="SOURCE", help="the checkpoint that the bundle was made from")
    parser.add_argument("--prompts", metavar="FILE.jsonl", help="texts to measure quality on (default: built-in ones)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(arguments: Namespace) -> int:
    """Verify, print the figures, and fail with exit code 4 (damaged) or 7 (differs from its source)."""
    report = api.verify(
        arguments.bundle,
        source=arguments.source,
        prompts=arguments.prompts,
        progress=choose_progress(wanted=not (arguments.quiet or arguments.json)),
    )
    if arguments.json:
        print_json(report, arguments.stdout)
    else:
        print("\n".join(_lines(report)), file=arguments.stdout, flush=True)
    if not report.ok:
        raise _failure(report, arguments.bundle)
    return 0


def _failure(report: Verification, bundle: str) -> ExaoneError:
    first, *others = report.problems or ("it differs from its source",)
    why = first if not others else f"{first} (and {len(others)} more)"
    if all(report.files.values()):
        return NumericalError("verification failed", bundle, why, "Export again, with a recipe of more bits if need be")
    return BundleError("damaged bundle", bundle, why, "Export or copy the bundle again")


def _lines(report: Verification) -> Iterator[str]:
    damaged = [name for name, sound in report.files.items() if not sound]
    yield f"files    {len(report.files)} checked, {len(damaged)} damaged"
    yield from (f"         {problem}" for problem in report.problems)
    for graph, errors in (report.parity or {}).items():
        yield f"parity   {graph}: {_figures(errors)}"
    if report.quality is not None:
        yield f"quality  {_figures(vars(report.quality))}"
    yield "ok" if report.ok else "not ok"


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in values.items())
