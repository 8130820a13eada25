"""Thousands of mixed requests through one engine: does an answer change, does anything grow, does it get slower?

    exaone-export export exaone_export/demo/checkpoint OUT --quantize int8
    python -m benchmarks.soak OUT --requests 5000 --seed 1 --out soak.json

Texts, look-ups, images in every form and of odd sizes, several images, videos, conversations that are sent turn by
turn, sent again and edited, drawn answers with a seed, answers under a schema or an expression, drafts, stop strings,
requests broken off in mid-answer, bad images, bad options, prompts that are too long, and requests whose numbers become
NaN. Half go to the engine one after another, half to a scheduler from several threads (`benchmarks.soak_cases`).

Each answer is compared, id by id, with that of a fresh engine that was asked nothing else; these answers are made
first, in a process of their own, and kept beside FILE for another run. Errors are compared by kind and words. An answer
that parts from the right one where its token leads by less than an eighth of a logit is counted apart.

Every tenth of the run has the same requests in another order, but for some that come once only. Growth is judged after
the first tenth: memory after each block of 50 requests, its slope and 95 % interval through the means of the tenths.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.soak_answers import right_answers
from benchmarks.soak_cases import ENGINE, SCHEDULER, Block, Plan, distinct
from benchmarks.soak_figures import by_batches
from benchmarks.soak_pictures import Pictures
from benchmarks.soak_run import FEATURES, Measured, Soak
from runtime.engine import Engine

TENTHS = 10
MOST_TOKENS = 60


def main() -> int:
    """Makes what is missing of the right answers, runs the soak and prints the table; 1 where an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--answers-only", action="store_true", help="make the right answers and nothing else")
    options = parser.parse_args()
    plan = plan_of(options.bundle, options.requests, options.seed)
    blocks = list(plan.all_blocks())
    folder = options.out.with_suffix(".pictures")  # one for all runs into FILE: errors name files
    folder.mkdir(exist_ok=True)
    if not options.answers_only:
        subprocess.run([sys.executable, "-m", "benchmarks.soak", *sys.argv[1:], "--answers-only"], check=True)
    load = partial(Engine.load, options.bundle, "cpu", options.threads)
    right = right_answers(load, distinct(blocks), Pictures(folder), _answers_file(options, plan))
    if options.answers_only:
        return 0
    began = time.perf_counter()
    with load() as engine:
        measured = Soak(engine, right, Pictures(folder)).run(blocks, distinct(blocks))
    shutil.rmtree(folder)
    report = figures(measured, blocks) | {"seconds": time.perf_counter() - began}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 1 if measured.wrong else 0


def plan_of(bundle: Path, requests: int, seed: int) -> Plan:
    """A plan with so many requests, or a few more."""
    context = json.loads((bundle / "config.json").read_text())["text_config"]["max_position_embeddings"]
    one = Plan(seed, TENTHS, 1, context, MOST_TOKENS)
    each = TENTHS * (sum(ENGINE.values()) + sum(SCHEDULER.values()))
    return Plan(seed, TENTHS, max(1, -(-(requests - one.requests + each) // each)), context, MOST_TOKENS)


def _answers_file(options: argparse.Namespace, plan: Plan) -> Path:
    """Where right answers are kept, those of this bundle, plan and number of threads alone."""
    manifest = (options.bundle / "exaone_export.json").read_bytes()
    key = hashlib.sha256(manifest + repr((plan.seed, plan.most, options.threads)).encode()).hexdigest()[:12]
    found: Path = options.out.with_suffix(f".{key}.right")
    return found


def figures(measured: Measured, blocks: Sequence[Block]) -> dict[str, Any]:
    """What is reported."""
    tenths = blocks[-1].tenth + 1
    warm = len(blocks) // tenths  # blocks
    at, memory = measured.answered[warm:], [float(value) for value in measured.memory[warm:]]
    slope = by_batches(at, memory, tenths - 1)
    cpu = [sum(measured.block_cpu[start : start + warm]) for start in range(0, len(blocks), warm)]
    each = len(measured.tenth) // tenths
    p99 = [float(np.quantile(measured.wall[measured.tenth == tenth], 0.99)) for tenth in range(tenths)]
    alone = ~np.isnan(measured.cpu)
    p99_cpu = [float(np.quantile(measured.cpu[alone & (measured.tenth == i)], 0.99)) for i in range(tenths)]
    cases = [case for block in blocks for case in (*block.engine, *block.scheduler)]
    return {
        "requests": len(cases),
        "distinct": len(distinct(blocks)),
        "kinds": dict(sorted(Counter(case.kind for case in cases).items())),
        "wrong": measured.wrong,
        "parted": measured.parted,
        "warm_up_requests": measured.answered[warm - 1],
        "memory_mib": [value / 2**20 for value in measured.memory],
        "slope_bytes": vars(slope),
        "level": slope.level,
        "files": [min(measured.files[warm:]), max(measured.files[warm:])],
        "threads": [min(measured.threads[warm:]), max(measured.threads[warm:])],
        "p99_ms": [1e3 * value for value in p99],
        "p99_ratio": p99[-1] / p99[0],
        "p99_cpu_ms": [1e3 * value for value in p99_cpu],
        "p99_cpu_ratio": p99_cpu[-1] / p99_cpu[0],
        "cpu_ms_a_request": [1e3 * value / each for value in cpu],
        "cpu_ratio": cpu[-1] / cpu[0],
        "features_kept": measured.kept_features,
        "features_bound": FEATURES,
        "features_encoded": measured.encoded,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    memory, slope = report["memory_mib"], report["slope_bytes"]
    first = memory[len(memory) // len(report["p99_ms"]) - 1]
    kept, bound, encoded = (report[f"features_{name}"] for name in ("kept", "bound", "encoded"))
    rows = [
        ("requests", f"{report['requests']}, {report['distinct']} distinct, in {report['seconds']:.0f} s"),
        ("wrong answers", str(len(report["wrong"]))),
        ("parted at a tie", f"{len(report['parted'])} ({', '.join(sorted(set(report['parted'])))})"),
        ("anonymous memory", f"{first:.1f} MiB after {report['warm_up_requests']} requests, {memory[-1]:.1f} at last"),
        ("slope", "{value:+.0f} bytes a request ({low:+.0f} to {high:+.0f})".format(**slope)),
        ("interval includes 0", "yes" if report["level"] else "NO"),
        ("open files", "{} to {}".format(*report["files"])),
        ("threads", "{} to {}".format(*report["threads"])),
        ("p99, first and last tenth", _pair(report["p99_ms"], report["p99_ratio"], "ms")),
        ("the same, CPU time, one by one", _pair(report["p99_cpu_ms"], report["p99_cpu_ratio"], "ms")),
        ("CPU time a request", _pair(report["cpu_ms_a_request"], report["cpu_ratio"], "ms")),
        ("features kept", f"{kept} of {bound} bytes, {encoded} encoded"),
    ]  # fmt: skip
    lines = [f"{name:32}{value}" for name, value in rows]
    return "\n".join([*lines, *(f"WRONG {name}: {fault[:300]}" for name, fault in report["wrong"][:20])])


def _pair(values: Sequence[float], ratio: float, unit: str) -> str:
    return f"{values[0]:.1f} and {values[-1]:.1f} {unit}, ratio {ratio:.3f}"


if __name__ == "__main__":
    sys.exit(main())
