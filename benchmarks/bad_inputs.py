"""Tries every bad checkpoint of tests/faults as a command of its own, under limits of memory and time.

    python -m benchmarks.bad_inputs [--rows s03 s20] [--jobs 2]

Prints a line for each kind of fault, and one for all: how many inputs were refused as they should be, the longest time
and the most memory beyond what the idle process has. With weights that are no numbers (S26, S27) the time is that of
tracing the graphs too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.faults import harness

FOLDER = Path(harness.__file__).parent


@dataclass(frozen=True)
class Measured:
    """What became of one case; `fault` is empty where it was refused as it should be."""

    case: harness.Case
    fault: str
    seconds: float
    megabytes: float


def main() -> int:
    """Runs the cases and prints the table; the exit code says whether all were refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", nargs="*", default=[], metavar="s01", help="kinds of fault; all without it")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="commands side by side")
    arguments = parser.parse_args()
    for module in sorted(FOLDER.glob("test_s_*.py")):
        importlib.import_module(f"tests.faults.{module.stem}")
    cases = [case for case in harness.ALL if not arguments.rows or case.row in arguments.rows]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(measure, cases))
    report(results)
    return 1 if any(result.fault for result in results) else 0


def measure(case: harness.Case) -> Measured:
    """Runs one case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        command = case.prepare(root)
        before = harness.snapshot(root)
        space = 8 if case.traces else 3  # gigabytes of address space; torch alone takes some
        outcome = harness.run_apart(command, root / "figures", gigabytes=space, cpu_seconds=60)
        fault = ""
        try:
            harness.check_refusal(outcome, case.code, case.words, root)
            if harness.snapshot(root) != before:
                fault = "files changed"
        except AssertionError as reason:
            fault = str(reason).partition("\n")[0] or "not as it should be"
    figures = outcome.figures
    return Measured(case, fault, figures.get("seconds", float("inf")), figures.get("megabytes", float("inf")))


def report(results: list[Measured]) -> None:
    """Prints the table, the faults, and the sum."""
    rows: dict[str, list[Measured]] = defaultdict(list)
    for result in results:
        rows[result.case.row].append(result)
    print(f"{'kind':6}{'inputs':>8}{'refused':>9}{'seconds':>9}{'MB':>7}   slowest")
    for row, found in sorted(rows.items()):
        print(line(row.upper(), found))
    for result in results:
        if result.fault:
            print(f"NOT REFUSED: {result.case.name}: {result.fault}")
    refused = sum(not result.fault for result in results)
    seconds, megabytes = max(r.seconds for r in results), max(r.megabytes for r in results)
    print(
        f"{len(rows)} kinds / {len(results)} inputs: {refused} correct refusals, "
        f"worst time {seconds:.2f} s, worst memory {megabytes:.0f} MB beyond idle"
    )
    early = [result for result in results if not result.case.traces]
    if len(early) not in (0, len(results)):
        worst = max(r.seconds for r in early), max(r.megabytes for r in early)
        print(f"before any work: {len(early)} inputs, worst time {worst[0]:.2f} s, worst memory {worst[1]:.0f} MB")


def line(row: str, found: list[Measured]) -> str:
    """A row of the table."""
    slowest = max(found, key=lambda result: result.seconds)
    refused = sum(not result.fault for result in found)
    most = max(result.megabytes for result in found)
    return f"{row:6}{len(found):8}{refused:9}{slowest.seconds:9.2f}{most:7.0f}   {slowest.case.name}"


if __name__ == "__main__":
    sys.exit(main())
