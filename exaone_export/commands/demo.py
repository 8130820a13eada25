"""Export the demonstration checkpoint, quantize it, and read images with it.

The checkpoint comes with the package: a small model of the EXAONE 4.5 architecture, trained to read a line of text from
an image. It is not LG's EXAONE; it shows that the whole way works on this machine, offline, within a minute or two.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from exaone_export.output import human_bytes, print_json
from exaone_export.progress import choose_progress
from model.errors import NumericalError

if TYPE_CHECKING:
    from exaone_export.demo.run import DemoBundle

NEXT = """
What to type next for a real EXAONE (the README says what disk and memory it takes):
  exaone-export export LGAI-EXAONE/EXAONE-4.5-33B exaone45-int4 --quantize int4
  exaone-export generate exaone45-int4 "Describe the picture." --image cat.jpg"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="keep the bundles here (default: do not keep them)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(arguments: Namespace) -> int:
    """Run the demonstration; return 0, or 7 if the float model misreads an image."""
    from exaone_export.demo.run import run_demo

    stdout: TextIO = arguments.stdout

    def tell(bundle: DemoBundle) -> None:
        if not arguments.json:
            print("\n".join(_lines(bundle)), file=stdout, flush=True)

    if not arguments.json:
        print("Demonstration checkpoint, trained here; not LG's EXAONE.", file=stdout, flush=True)
    progress = choose_progress(wanted=not (arguments.quiet or arguments.json))
    report = run_demo(arguments.out, progress=progress, tell=tell)
    if arguments.json:
        print_json(report, stdout)
    else:
        print(f"\n{report.correct} of {report.total} images read correctly.\n{NEXT}", file=stdout)
    float_bundle = report.bundles[0]
    return 0 if all(reading.correct for reading in float_bundle.readings) else NumericalError.exit_code


def _lines(bundle: DemoBundle) -> Iterator[str]:
    name = "float" if bundle.quantize == "none" else bundle.quantize
    size = f"{human_bytes(bundle.bytes)}, {bundle.bits_per_weight:.2f} bits per weight"
    kept = f", in {bundle.folder}" if bundle.folder else ""
    yield f"\n{name}: {size}, made in {bundle.seconds:.1f} s{kept}"
    for reading in bundle.readings:
        verdict = "same" if reading.correct else "DIFFERENT"
        yield (
            f"  {reading.image:<12} expected {reading.expected!r:<20} read {reading.text!r:<20}"
            f" {verdict}, {reading.seconds:.2f} s"
        )
