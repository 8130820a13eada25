"""Export the demonstration checkpoint, quantize it, and ask it about images.

The checkpoint comes with the package: a small model of the EXAONE 4.5 architecture, trained to read a few lines of text
from an image. It is not LG's EXAONE; it shows that the whole way works on this machine, offline, in a minute or two.
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
    from exaone_export.demo.run import DemoBundle, Reading

NEXT = """
What to type next for a real EXAONE (the README says what disk and memory it takes):
  exaone-export export LGAI-EXAONE/EXAONE-4.5-33B exaone45-int4 --quantize int4
  exaone-export generate exaone45-int4 "Describe the picture." --image cat.jpg"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="keep the bundles here (default: do not keep them)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(arguments: Namespace) -> int:
    """Run the demonstration; return 0, or 7 if an answer is wrong."""
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
        print(f"\n{report.correct} of {report.total} answers are right.\n{NEXT}", file=stdout)
    return 0 if report.correct == report.total else NumericalError.exit_code


def _lines(bundle: DemoBundle) -> Iterator[str]:
    name = "float" if bundle.quantize == "none" else bundle.quantize
    size = f"{human_bytes(bundle.bytes)}, {bundle.bits_per_weight:.2f} bits per weight"
    kept = f", in {bundle.folder}" if bundle.folder else ""
    yield f"\n{name}: {size}, made in {bundle.seconds:.1f} s{kept}"
    for reading in bundle.readings:
        yield f"  {_asked(reading)} -> {_answered(reading)}, {reading.seconds:.2f} s"


def _asked(reading: Reading) -> str:
    *before, question = reading.prompt.splitlines()
    shown = [*reading.images, *([f"{len(before)} lines of text"] if before else []), question]
    return ": ".join([" and ".join(shown[:-1]), question])


def _answered(reading: Reading) -> str:
    thought = f"(thinks {reading.reasoning!r}) " if reading.reasoning else ""
    if reading.correct:
        return f"{thought}{reading.text!r}, right"
    wanted = f"(thinks {reading.expected_reasoning!r}) " if reading.expected_reasoning else ""
    return f"{thought}{reading.text!r}, WRONG, expected {wanted}{reading.expected!r}"
