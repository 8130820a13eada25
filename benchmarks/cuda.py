"""CUDA: parity, speed and memory of bundles on one GPU, side by side with PyTorch.

    python -m benchmarks.cuda WORK --out RESULTS [--parts models parity shapes speed image torch memory]
    python -m benchmarks.cuda WORK --out RESULTS --device cpu --tiny      # the same code on small models, no figures

parity  greedy ids of the demonstration checkpoint (not LG's EXAONE) equal PyTorch's, in fp16 and bf16
shapes  logits of float bundles at the true shapes (33B with four layers) against PyTorch in fp32
speed   int4 bundles with random weights: prompts, decoding, CUDA graphs on and off; the roof is the weights' bytes over
        the measured speed of copying, bytes read and written counted
image   the vision encoder of 4.5 on one image, as a share of the measured rate of bf16 products
torch   transformers' generate in bf16 with SDPA, in turns with the int4 bundles
memory  the device's memory in use, as NVML says, against the plan of `inspect`

Every part writes RESULTS/PART.json as it ends and is skipped where that is there, so that a job may be cut into calls:
`--parts models` first (the int4 bundles: 23 GB of disk and a few minutes on 16 cores for the 33B shape), then the
others, one or two a call. Both shapes need 40 GB of disk, and `torch` 90 GB of the GPU's memory.

On a machine without package index: unpack the onnxruntime-gpu wheel into a folder and put that first on PYTHONPATH,
before any folder with onnxruntime in it; CUDA's and cuDNN's libraries are found in PyTorch's wheels if their `lib`
folders (nvidia/cu13/lib, nvidia/cudnn/lib) are on LD_LIBRARY_PATH. `exaone-export doctor --ep cuda` tells what lacks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cuda_bench import Bench, Result
from benchmarks.cuda_models import SHAPES, Models
from benchmarks.cuda_parts import PARTS


def main() -> int:
    """Runs the parts that are not done yet; 1 if a figure misses what it is held to."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    bench = _bench(arguments)
    for name in arguments.parts:
        file = arguments.out / f"{name}.json"
        if file.exists() and not arguments.again:
            continue
        start = time.perf_counter()
        try:
            result = PARTS[name](bench)
        except (SystemExit, OSError, KeyError, ValueError) as reason:
            # One part's failure must not cost the others their time on the machine.
            print(f"{name} failed: {type(reason).__name__}: {reason}", file=sys.stderr, flush=True)
            continue
        _write(file, name, result, time.perf_counter() - start, arguments)
        print("\n".join(report(json.loads(file.read_text()))), flush=True)
    return summary(arguments.out, arguments.parts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoints and bundles")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, short prompts")
    parser.add_argument("--recipe", default="int4", help="recipe of the quantized bundles (default: int4)")
    parser.add_argument("--exact", action="store_true", help="with the recipe's own methods, not rounding to nearest")
    parser.add_argument("--prompts", nargs="+", type=int, help="tokens (default: 512 4096)")
    parser.add_argument("--new", type=int, help="tokens to decode (default: 128)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="measure parts that are done once more")
    return parser.parse_args()


def _bench(arguments: argparse.Namespace) -> Bench:
    tiny = arguments.tiny
    models = Models(arguments.work.resolve(), arguments.device, tiny, arguments.recipe, arguments.exact)
    prompts = arguments.prompts or ([24, 80] if tiny else [512, 4096])
    return Bench(models, arguments.shapes, prompts, arguments.new or (8 if tiny else 128), arguments.rounds)


def _write(file: Path, name: str, result: Result, seconds: float, arguments: argparse.Namespace) -> None:
    content = {
        "part": name,
        "device": arguments.device,
        "tiny": arguments.tiny,
        "machine": f"{platform.machine()}, {os.cpu_count()} threads",
        "seconds": seconds,
        **dataclasses.asdict(result),
    }
    unfinished = file.with_suffix(".partial")
    unfinished.write_text(json.dumps(content, indent=1))
    unfinished.rename(file)


def report(part: dict[str, Any]) -> Iterator[str]:
    """A part's rows as tables, one for each set of columns, and its goals."""
    yield f"\n## {part['part']} ({part['device']}{', tiny: no figures' if part['tiny'] else ''})\n"
    columns: tuple[str, ...] = ()
    for row in part["rows"]:
        if tuple(row) != columns:
            columns = tuple(row)
            yield f"| {' | '.join(columns)} |"
            yield "|" + "---|" * len(columns)
        yield f"| {' | '.join(map(_cell, row.values()))} |"
    for goal in part["goals"]:
        met = {True: "met", False: "MISSED", None: "not measured on a GPU"}[goal["met"]]
        yield f"- {goal['what']}: {_cell(goal['value'])} (wants {goal['goal']}): {met}"


def summary(out: Path, parts: list[str]) -> int:
    """Says what is missing and what missed; the exit code."""
    done = [json.loads((out / f"{name}.json").read_text()) for name in parts if (out / f"{name}.json").exists()]
    missing = [name for name in parts if not (out / f"{name}.json").exists()]
    missed = [goal["what"] for part in done for goal in part["goals"] if goal["met"] is False]
    if missing:
        print(f"\nnot done: {', '.join(missing)}")
    if missed:
        print(f"\nmissed: {'; '.join(missed)}")
    return 1 if missing or missed else 0


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
