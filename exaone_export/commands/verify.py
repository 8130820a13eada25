"""Check that a bundle is whole, and with --source that it answers as the original model does.

Without --source: sizes and sha256 of every file, the manifest, and that the graphs are what they claim. With --source:
also each graph against the torch model (parity), the distribution of the next token (quality: what llama.cpp's
perplexity tool prints, by modality and language), and the weights with the most noise; the figures are kept in the
bundle's verify.json and README.md. Exit code 7 if a figure is beyond its limit: the recipe's own, or one given here.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import TYPE_CHECKING

from exaone_export import api
from exaone_export.failures import parts
from exaone_export.output import print_json
from exaone_export.progress import choose_progress
from exaone_export.verifying.table import print_report
from model.errors import BundleError, ExaoneError, NumericalError

if TYPE_CHECKING:
    from exaone_export.verification import Verification

# Flag → figure it limits, and what it says of itself.
_LIMITS = {
    "--max-kld": ("mean_kld", "mean KL divergence from the source, nats"),
    "--max-p99-kld": ("p99_kld", "its 99th percentile"),
    "--max-p999-kld": ("p999_kld", "its 99.9th percentile"),
    "--max-ppl-ratio": ("ppl_ratio", "perplexity over the source's"),
    "--max-rms-dp": ("rms_dp", "root mean square of the difference in the true token's probability"),
    "--min-same-top": ("same_top", "share of positions with the same most likely token"),
    "--min-exact": ("exact", "share of exact answers of a bundle of the demonstration checkpoint"),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle to check")
    parser.add_argument("--source", metavar="SOURCE", help="the checkpoint that the bundle was made from")
    parser.add_argument("--prompts", metavar="FILE.jsonl", help="texts to measure quality on (default: built-in ones)")
    for flag, (name, what) in _LIMITS.items():
        parser.add_argument(flag, dest=name, type=float, metavar="X", help=f"fail beyond this: {what}")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(arguments: Namespace) -> int:
    """Verify, print the figures, and fail with exit code 4 (damaged) or 7 (differs from its source)."""
    report = _verified(arguments)
    if arguments.json:
        print_json(report, arguments.stdout)
    else:
        print_report(report, arguments.stdout)
    if not report.ok:
        raise _failure(report, arguments.bundle)
    return 0


def _verified(arguments: Namespace) -> Verification:
    limits = {name: getattr(arguments, name) for name, _ in _LIMITS.values() if getattr(arguments, name) is not None}
    try:
        return api.verify(
            arguments.bundle,
            source=arguments.source,
            prompts=arguments.prompts,
            limits=limits,
            progress=choose_progress(wanted=not (arguments.quiet or arguments.json)),
        )
    except ExaoneError as error:
        if arguments.json:
            from exaone_export.verification import Verification

            # The keys of every other answer too, for whoever reads them without looking at the exit code.
            report = Verification(ok=False, files={}, problems=(str(error),))
            found = {item.name: getattr(report, item.name) for item in fields(report)}
            print_json({**found, "error": {**parts(error), "exit_code": error.exit_code}}, arguments.stdout)
        raise


def _failure(report: Verification, bundle: str) -> ExaoneError:
    first, *others = report.problems or ("it differs from its source",)
    why = first if not others else f"{first} (and {len(others)} more)"
    if all(report.files.values()):
        return NumericalError("verification failed", bundle, why, "Export again, with a recipe of more bits if need be")
    return BundleError("damaged bundle", bundle, why, "Export or copy the bundle again")
