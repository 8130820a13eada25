"""Peak memory and speed of an export, at the published shapes, without a checkpoint on the disk (see `synthetic.py`).

    python -m benchmarks.export_memory [FOLDER] [--model 4.5-33b] [--layers 4 16 64] [--quantize int4]
    python -m benchmarks.export_memory FOLDER --model 4.0-1.2b --real --keep     # real files, kept

The bundle is real: 64 layers in int4 take 21 GB. Each is removed before the next one, the last one too unless --keep is
given. FOLDER gets checkpoint and bundle (default: a temporary folder).

The limits are 4 GiB, and 2.5 times the largest tensor in float32 plus 700 MiB, libraries included; and no more for all
layers than for the fewest, but for what the graph itself takes (3 MiB a layer). The exit code tells if all held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.synthetic import MODELS, config_of, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
PER_LAYER = 3 * MIB
HEADINGS = (
    "model", "layers", "weights, 10⁹", "source, GB", "bundle, GB", "bits/weight", "minutes", "CPU s",
    "source MB/s", "bundle MB/s", "10⁶ weights/s", "peak RSS, MiB", "predicted", "limit",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One export; memory in bytes. `report` is the command's own, `reading` what the synthetic reader took."""

    model: str
    layers: int
    weights: int
    limit: int
    seconds: float
    cpu_seconds: float
    peak: int
    peak_anonymous: int
    peak_address_space: int
    report: dict[str, Any]
    reading: dict[str, float]

    @property
    def row(self) -> tuple[str, ...]:
        """The values of `HEADINGS`."""
        source, bundle = 2 * self.weights, self.report["bytes"]
        return (
            self.model, str(self.layers), f"{self.weights / 1e9:.2f}", f"{source / 1e9:.1f}", f"{bundle / 1e9:.2f}",
            f"{self.report['bits_per_weight']:.2f}", f"{self.seconds / 60:.1f}", f"{self.cpu_seconds:.0f}",
            f"{source / 1e6 / self.seconds:.0f}", f"{bundle / 1e6 / self.seconds:.0f}",
            f"{self.weights / 1e6 / self.seconds:.0f}", f"{self.peak / MIB:.0f}",
            f"{self.report.get('predicted_peak_bytes', 0) / MIB:.0f}", f"{self.limit / MIB:.0f}",
        )  # fmt: skip


def measure(source: Path, out: Path, arguments: argparse.Namespace, layers: int) -> Measured:
    """Makes the checkpoint, exports it in a process of its own, and watches that."""
    tensors = write_checkpoint(source, config_of(arguments.model, layers), real=arguments.real)
    weights = sum(map(math.prod, tensors.values()))
    largest = 4 * max(map(math.prod, tensors.values()))
    reading = source.with_name("reading.json")
    command = ["export", str(source), str(out), "--quantize", arguments.quantize, "--json"]
    if arguments.threads:
        command += ["--threads", str(arguments.threads)]
    module = ["exaone_export"] if arguments.real else ["benchmarks.synthetic", str(reading)]
    before = _child_seconds()
    started = time.monotonic()
    peaks, output = _watch([sys.executable, "-m", *module, *command])
    seconds = time.monotonic() - started
    return Measured(
        arguments.model, layers, weights, min(4 << 30, int(2.5 * largest) + 700 * MIB), seconds,
        _child_seconds() - before, peaks["VmHWM"], peaks["RssAnon"], peaks["VmPeak"], json.loads(output),
        {} if arguments.real else json.loads(reading.read_text()),
    )  # fmt: skip


def _watch(command: list[str]) -> tuple[dict[str, int], str]:
    """Runs a command; the largest values of its memory figures in bytes, sampled ten times a second, and its output."""
    peaks = dict.fromkeys(("VmHWM", "RssAnon", "VmPeak"), 0)
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        while child.poll() is None:
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{child.pid}/status").read_text()
                for key in peaks:
                    found = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
                    peaks[key] = max(peaks[key], int(found[1]) * 1024 if found else 0)
            time.sleep(0.1)
        if child.returncode:
            raise SystemExit(f"the export ended with exit code {child.returncode}")
        output.seek(0)
        return peaks, output.read()


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def describe(measured: Measured) -> str:
    """What the table has no room for."""
    lines = [f"{measured.model}, {measured.layers} layers: RssAnon at most {measured.peak_anonymous / MIB:.0f} MiB"]
    lines.append(f"address space at most {measured.peak_address_space / MIB:.0f} MiB")
    if measured.reading:
        given, took = measured.reading["read_bytes"], measured.reading["read_seconds"]
        lines.append(f"the synthetic reader gave {given / 1e9:.1f} GB in {took:.1f} CPU s")
    predicted = measured.report.get("predicted_bytes")
    if predicted:
        lines.append(f"bundle {measured.report['bytes']} bytes, predicted {predicted}")
    return ", ".join(lines)


def failures(results: list[Measured]) -> Iterator[str]:
    """The limits that did not hold."""
    for result in results:
        if result.peak > result.limit:
            yield f"{result.layers} layers: {result.peak / MIB:.0f} MiB, the limit is {result.limit / MIB:.0f} MiB"
    least = min(results, key=lambda result: result.layers)
    for result in results:
        allowed = least.peak + (result.layers - least.layers) * PER_LAYER
        if result.peak > 1.05 * allowed:
            yield f"{result.layers} layers: {result.peak / MIB:.0f} MiB, more than {allowed / MIB:.0f} MiB + 5 %"


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder that was named, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
    else:
        with tempfile.TemporaryDirectory(prefix="export-memory-") as folder:
            yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--model", default="4.0-1.2b", choices=tuple(MODELS))
    parser.add_argument("--layers", type=int, nargs="+", help="default: the model's own number")
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--real", action="store_true", help="write the weights instead of generating them on reading")
    parser.add_argument("--keep", action="store_true", help="keep the last checkpoint and bundle")
    arguments = parser.parse_args()
    config = MODELS[arguments.model]
    counts = arguments.layers or [config.get("text_config", config)["num_hidden_layers"]]
    results: list[Measured] = []
    with work_folder(arguments.folder) as folder:
        source, out = folder / "checkpoint", folder / "bundle"
        for i, layers in enumerate(counts):
            results.append(measure(source, out, arguments, layers))
            print(describe(results[-1]), flush=True)
            if not (arguments.keep and i == len(counts) - 1):
                shutil.rmtree(source)
                shutil.rmtree(out)
    for row in (HEADINGS, ("---",) * len(HEADINGS), *(result.row for result in results)):
        print(f"| {' | '.join(row)} |")
    broken = list(failures(results))
    print("\n".join(broken) if broken else "all limits held")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
