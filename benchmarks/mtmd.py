"""Our vision encoder beside llama.cpp's (mtmd), of the same random checkpoint and on the same picture, in turns.

    python -m benchmarks.mtmd FOLDER [--envs ENVS] [--images 1024] [--rounds 2] [--depth 28]
    python -m benchmarks.mtmd FOLDER --rounds 1 --runs FILE       # adds a round to those in FILE

FOLDER gets what `benchmarks.vision` puts there and llama.cpp's files, 13 GB in all; its environment is made in ENVS
(default: FOLDER/envs). llama.cpp has this encoder by its own name (projector type exaone4_5), with bfloat16 matrices;
windows are there, as a mask over attention to everything. The agreement in the last column says that both compute the
same.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from benchmarks.peers_envs import Environments, logged
from benchmarks.vision import Worker, export, measure, options, report
from benchmarks.worker import ROOT

NAME = "mtmd bf16"


def convert(python: Path, checkpoint: Path, folder: Path, logs: Path) -> Path:
    """The folder of llama.cpp's files, made if it is not there."""
    if not folder.exists():
        partial = folder.with_name(f"partial-{folder.name}-{os.getpid()}")
        command = [str(python), "-m", "benchmarks.mtmd_gguf", str(checkpoint.resolve()), str(partial.resolve())]
        logged(command, logs / "mtmd.log", {"PYTHONPATH": str(ROOT)})
        partial.rename(folder)
    return folder


def main() -> None:
    """Converts, measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--envs", type=Path, help="folder of the environments (default: FOLDER/envs)")
    options(parser, ["1024"])
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    bundles = export(folder, arguments.depth, arguments.recipes)
    logs = folder / "logs"
    python = Environments(arguments.envs or folder / "envs", logs).python("llama")
    model = convert(python, folder / f"checkpoint-{arguments.depth}", folder / f"mtmd-{arguments.depth}", logs)
    if arguments.export_only:
        return
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, bundle in bundles.items():
            workers[name] = stack.enter_context(Worker("ours", bundle, arguments.threads))
        workers[NAME] = stack.enter_context(Worker("mtmd", model, arguments.threads, python))
        report(measure(workers, arguments.images, arguments.rounds), [*arguments.recipes[:1], NAME], arguments.runs)


if __name__ == "__main__":
    main()
