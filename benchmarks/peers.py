"""Our runtime beside llama.cpp, onnxruntime-genai and OpenVINO GenAI, on the same random checkpoint, in turns.

    python -m benchmarks.peers WORK                                  # all of it: environments, models, measurement
    python -m benchmarks.peers WORK --layers 2 --rounds 2 --contexts 0 64 --prefill 64        # a quick try
    python -m benchmarks.peers WORK --only ours-int4 llama-Q4_0 --bundle mine=FOLDER          # some of them

WORK gets the checkpoint (the published 4.0-1.2B shape, or its first layers), every engine's model and environment, and
logs; what is there is used again. Each engine with each of its files is one process that loads once and then waits for
its turn: in a round, every one of them runs a context before the next context comes, each round another one first, one
at a time, after a few tokens that do not count: while it waited, the system may have put its memory away. Ratios are of
one round, because a shared machine is another one a minute later. A run that warms up does not count. All run on the
same random token ids, which no two runs share, so that no cache of prompts helps.

Prefill is the time to the first token; decode is what follows; "after 0" is after one token. Sizes leave tokenizers
out. Peak memory is VmHWM after loading and the run that warms up, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.peers_envs import Environments
from benchmarks.peers_models import BASELINE, Contender, Models, all_contenders
from benchmarks.peers_table import Measured, against, as_json, table
from benchmarks.synthetic import config_of, write_checkpoint
from benchmarks.worker import Process

WORKER = Path(__file__).resolve().parent / "peers_worker.py"
WAKING = 8  # tokens
LOWEST_ID = 400  # above the ids that have a meaning
BASELINE_KEY = "llama-Q4_0"
OURS = "ours"


class Worker(Process):
    """One process of `peers_worker.py`; a context manager."""

    def __init__(self, contender: Contender, threads: int, log: Path) -> None:
        paths = contender.python.absolute(), WORKER, contender.model.absolute()
        python, worker, model = map(str, paths)
        super().__init__([python, worker, contender.kind, model, str(threads)], log)

    def run(self, ids: Sequence[int], new: int) -> dict[str, float]:
        """Seconds to the first token and for `new` more."""
        return self.ask({"ids": list(ids), "new": new})


@dataclass
class Entrant:
    """A contender that takes part: its process and its figures."""

    worker: Worker
    measured: Measured


def enter(contender: Contender, options: argparse.Namespace, stack: ExitStack) -> Entrant:
    """Loads a contender as often as asked for; the last process stays, and warms up."""
    log = options.work / "logs" / f"worker-{contender.name.replace(' ', '-')}.log"
    measured = Measured(contender.name, contender.megabytes, ours=contender.kind == OURS)
    with Worker(contender, options.threads, log):
        pass  # reads the files from the disk
    for _ in range(options.loads - 1):
        with Worker(contender, options.threads, log) as worker:
            measured.load_s.append(worker.loaded["load_s"])
    worker = stack.enter_context(Worker(contender, options.threads, log))
    measured.load_s.append(worker.loaded["load_s"])
    measured.version = worker.loaded["version"]
    measured.peak_bytes = int(worker.run(prompt(options, options.prefill, "warm-up"), options.new_tokens)["peak_bytes"])
    return Entrant(worker, measured)


def prompt(options: argparse.Namespace, length: int, label: str) -> list[int]:
    """Random ids, the same for every contender."""
    source = random.Random(f"{label} {length}")
    return [source.randrange(LOWEST_ID, options.vocabulary) for _ in range(max(1, length))]


def measure(entrants: list[Entrant], options: argparse.Namespace) -> None:
    """All rounds: for every context, every contender once."""
    for i in range(options.rounds):
        for context in options.contexts:
            if context > options.prefill and i >= options.deep_rounds:
                continue
            ids = prompt(options, context, f"round {i}")
            first = i % len(entrants)
            for entrant in entrants[first:] + entrants[:first]:
                # Systems that put idle memory away have to bring the weights back before the time counts.
                entrant.worker.run(prompt(options, WAKING, f"waking {i} {context}"), 1)
                found = entrant.worker.run(ids, options.new_tokens)
                entrant.measured.prefill.setdefault(context, []).append(found["prefill_s"])
                entrant.measured.decode.setdefault(context, []).append(found["decode_s"] / options.new_tokens)
            print(f"round {i + 1}: context {context} done", file=sys.stderr, flush=True)


def collect(options: argparse.Namespace, stack: ExitStack) -> tuple[list[Entrant], dict[str, str]]:
    """Everybody who can take part, and why the others cannot."""
    checkpoint = options.checkpoint or options.work / "checkpoint"
    if not checkpoint.exists():
        print("making the checkpoint", file=sys.stderr, flush=True)
        partial = options.work / f"partial-checkpoint-{int(time.time())}"
        write_checkpoint(partial, config_of("4.0-1.2b", options.layers), real=True)
        partial.rename(checkpoint)
    options.vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    logs = options.work / "logs"
    models = Models(
        checkpoint, options.work / "models", Environments(options.envs or options.work / "envs", logs), logs
    )
    available = all_contenders(models)
    unknown = set(options.only or ()) - set(available)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(available)}")
    chosen = [key for key in available if options.only is None or key in options.only or key == BASELINE_KEY]
    contenders = {f"bundle {name}": models.bundle(name, folder) for name, folder in options.bundle}
    absent: dict[str, str] = {}
    for key in chosen:  # before any is loaded: conversions need the memory
        try:
            contenders[key] = available[key]()
        except SystemExit as reason:
            absent[key] = str(reason)
            print(f"{key} takes no part: {reason}", file=sys.stderr, flush=True)
    return [enter(contender, options, stack) for contender in contenders.values()], absent


def machine() -> str:
    """The CPU's name and the number of its cores that are here."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {len(names)} cores, {platform.system()} {platform.machine()}"
    )


def named_bundle(text: str) -> tuple[str, Path]:
    """NAME=FOLDER."""
    name, found, folder = text.partition("=")
    if not found or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with a folder that exists")
    return name, Path(folder)


def parse() -> argparse.Namespace:
    """The command line; contexts in rising order, the one of the prefill figure among them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for checkpoint, models, environments and logs")
    parser.add_argument("--envs", type=Path, help="folder of the environments (default: WORK/envs)")
    parser.add_argument("--checkpoint", type=Path, help="another bfloat16 checkpoint of the EXAONE 4.0 kind")
    parser.add_argument("--layers", type=int, help="layers of the random checkpoint (default: the model's own)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some contenders, and the baseline")
    parser.add_argument("--bundle", type=named_bundle, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--contexts", type=int, nargs="+", default=[0, 512, 2048, 4096])
    parser.add_argument("--prefill", type=int, default=512, help="the context whose reading is told")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--deep-rounds", type=int, default=3, help="rounds of contexts longer than --prefill")
    parser.add_argument("--loads", type=int, default=5, help="times each is loaded, the files in memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where to write FILE.md and FILE.json (default: WORK/peers)")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    options.contexts = sorted({*options.contexts, options.prefill})
    return options


def main() -> int:
    options = parse()
    with ExitStack() as stack:
        entrants, absent = collect(options, stack)
        measure(entrants, options)
    results = [entrant.measured for entrant in entrants]
    baseline = next((one for one in results if one.name == BASELINE), results[0])
    today = date.today().isoformat()
    text = [table(results, baseline, options.prefill, options.contexts), ""]
    text.append(
        f"Ratios to {baseline.name}, paired by round: median; least–most. {machine()}; {options.threads} threads,"
    )
    text.append(f"{options.rounds} rounds ({options.deep_rounds} beyond {options.prefill} tokens), {today}.")
    if pairs := against(results, options.prefill, options.contexts):
        text += ["", "Ours over the others, paired by round:", "", pairs, ""]
    text += [f"- {one.name}: {one.version}" for one in results] + [f"- {key}: {why}" for key, why in absent.items()]
    print("\n".join(text))
    out = options.out or options.work / "peers"
    out.with_suffix(".md").write_text("\n".join(text) + "\n")
    report = {"machine": machine(), "date": today, "threads": options.threads, "absent": absent}
    out.with_suffix(".json").write_text(json.dumps(report | {"results": as_json(results, baseline)}, indent=1))
    return 1 if absent else 0


if __name__ == "__main__":
    raise SystemExit(main())
