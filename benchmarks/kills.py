"""How exports survive SIGKILL: at every change of the disk, at random times, and the real command line.

    python -m benchmarks.kills [--kind vlm] [--random 200] [--commands 10] [--seed 0]

Each kill is followed by the same export again. It counts if that one ends, its bundle has the bytes of an undisturbed
one, nothing else is left, no part was made again that the journal had, and no weight was read for it. The graphs are
really traced, once; each export then runs in a forked child, but for those of the command line, which do everything.
The exit code tells if all survived.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import onnx_ir as ir
import torch

from exporter import export as export_room
from exporter.export import ExportOptions
from exporter.partials import staging_folders
from model.config import load_config
from model.progress import NullProgress
from tests import tiny
from tests.faults import crash
from tests.faults.trial import Trial, finished_parts

ROOT = Path(__file__).parents[1]


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(1)  # threads do not live on in a forked child
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        source = tiny.make_checkpoint(folder / "source", arguments.kind, sharded=3)
        graphs = _traced(source)
        crash.trace = lambda config, draft, options, progress: graphs
        trial = Trial(folder, lambda out: crash.export(source, out))
        draw = Random(arguments.seed)
        print(f"{arguments.kind}: {len(trial.calm.made)} parts, {len(trial.calm.operations)} changes of the disk")
        points = _points(trial)
        timed = _timed(trial, arguments.random, draw)
        commands = _commands(source, folder, arguments.commands, draw)
        return int(not (points and timed and commands))
    finally:
        shutil.rmtree(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="vlm", choices=tiny.KINDS)
    parser.add_argument("--random", type=int, default=200, metavar="N", help="kills at random times")
    parser.add_argument("--commands", type=int, default=10, metavar="N", help="kills of the real command")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _traced(source: Path) -> dict[str, ir.Model]:
    """The graphs as they are before their weights are bound; children change their own copies of them."""
    config = export_room._for_task(load_config(source), "auto")
    return export_room._trace(config, config.vision is not None, ExportOptions(), NullProgress())


def _points(trial: Trial) -> bool:
    """A kill at every change of the disk."""
    points = len(trial.calm.operations)
    good, resumed = 0, 0
    for point in range(1, points + 1):
        done: set[str] = set()
        name = f"point{point}"
        good += _survived(trial, name, partial(trial.kill, name, crash.kill_at(point)), done)
        resumed += len(done)
    share = 100 * resumed / points / len(trial.calm.made)
    print(f"at every change of the disk: {good}/{points} survived; {share:.0f} % of the parts were not made again")
    return good == points


def _timed(trial: Trial, count: int, draw: Random) -> bool:
    """Kills at random times of the export."""
    started = time.perf_counter()
    crash.child(trial.make(trial.folder / "timing"), trial.notes)
    seconds = time.perf_counter() - started
    good, early = 0, 0
    for number in range(count):
        name, moment = f"random{number}", draw.uniform(0, 1.1 * seconds)
        done: set[str] = set()
        good += _survived(trial, name, partial(trial.strike, name, moment), done)
        early += bool(done) and len(done) < len(trial.calm.made)
    if count:
        bound = f", so less than {300 / count:.1f} % do not (95 %)" if good == count else ""
        print(f"at random times: {good}/{count} survived{bound}; {early} of them between two parts")
    return good == count


def _survived(trial: Trial, name: str, kill: Callable[[], set[str]], done: set[str]) -> bool:
    """Kills and repeats; puts the parts that were finished into `done`."""
    try:
        done |= kill()
        trial.end(name, done)
    except AssertionError as failure:
        print(f"{name}: {str(failure)[:300]}", file=sys.stderr)
        return False
    finally:
        shutil.rmtree(trial.folder / name, ignore_errors=True)
    return True


def _commands(source: Path, folder: Path, count: int, draw: Random) -> bool:
    """The real command, killed at random times between its start and its end."""
    command = [sys.executable, "-m", "exaone_export", "export", str(source), "--quantize", "int4", "--quiet"]
    environment: dict[str, str] = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run(out: Path) -> subprocess.Popen[Any]:
        return subprocess.Popen([*command, str(out)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    started = time.perf_counter()
    run(folder / "command").wait()
    seconds = time.perf_counter() - started
    wanted = crash.tree(folder / "command")
    good, resumed = 0, 0
    for number in range(count):
        out = folder / f"command{number}"
        process = run(out)
        if number % 2:
            time.sleep(draw.uniform(0, seconds))
        else:  # while it writes, which takes a hundredth of the time
            while not staging_folders(out) and process.poll() is None:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.wait()
        resumed += bool(finished_parts(out))
        good += (out.exists() or run(out).wait() == 0) and crash.tree(out) == wanted and not crash.beside(out)
        shutil.rmtree(out, ignore_errors=True)
    if count:
        print(f"the real command ({seconds:.1f} s): {good}/{count} survived; {resumed} had parts to go on with")
    return good == count


if __name__ == "__main__":
    sys.exit(main())
