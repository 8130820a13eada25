"""How many of its tasks the demonstration checkpoint still does after quantization: exact answers, images in, text out.

Exports the checkpoint as float and with every recipe, and gives each bundle the same held-out exercises through
`exaone_export.load`, greedily; an answer counts if it is right to the last character. The task "think" is all tasks in
turn with reasoning on, where the reasoning has to be right too. Beside each share stands its 95 % interval (Wilson,
1927), and beside a recipe's what it gains on the float bundle, with its standard error: they are asked the same.

    python -m benchmarks.tasks --count 2000
    python -m benchmarks.tasks --count 200 --tasks receipt find --recipes none rtn-g128
    python -m benchmarks.tasks --count 500 --outliers 5       # 4 channels a layer 32 times as large, same function
    python -m benchmarks.tasks --out scores.jsonl --part 1/2  # half of the work, on one core; the other half
    python -m benchmarks.tasks --out scores.jsonl --part 2/2  # at the same time in a process of its own
    python -m benchmarks.tasks --out scores.jsonl             # what is missing, and the tables of all

What stands in the file of `--out` already, of the same checkpoint, seed and number, is not asked again.

Beside the shipped recipes and recipe files there are two to measure other methods against: "rtn-g128", every matrix of
the decoder in plain round-to-nearest int4, symmetric, with blocks of 128, all else float; "rtn-g128-all", the vision
encoder and the embedding too. The demonstration checkpoint is not LG's EXAONE: ratios between the rows mean something,
their level does not.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import exaone_export as ee
from exaone_export.demo import checkpoint_folder
from exaone_export.demo.exam import THINK, Asked, answers, batches, draw, right
from exaone_export.verifying.accuracy import wilson
from model.bundle import file_sha256
from quantize.recipe import Recipe, Rule
from quantize.scheme import Scheme
from tests import outliers

MEASURED = ("line", "receipt", "question", "two", "find", THINK)
SEED, WRONG = 2027, 10
CALIBRATED = ("int4-quality",)
RECIPES = ("none", "int8", "int8-dynamic", "int4", "int4-edge", *CALIBRATED, "rtn-g128", "rtn-g128-all")
_ROUNDED = Scheme(bits=4, block_size=128, symmetric=True, method="rtn")
PLAIN = {
    "rtn-g128": Recipe("rtn-g128", (Rule("decoder.*", _ROUNDED),)),
    "rtn-g128-all": Recipe("rtn-g128-all", (Rule("vision_encoder.patch_embed.*", None), Rule("*", _ROUNDED))),
}


@dataclass(frozen=True)
class Run:
    """What is asked of whom.

    Attributes:
        checkpoint: folder.
        outliers: exponent of 2 for massive activations, or None.
        count, seed: of the exercises of each task.
        threads: of one operator; None takes one for each core.
    """

    checkpoint: Path
    outliers: int | None
    count: int
    seed: int
    threads: int | None

    def key(self) -> dict[str, Any]:
        """What a figure depends on, beside recipe and task."""
        digest = file_sha256(self.checkpoint / "model.safetensors")
        return {"weights": digest[:16], "outliers": self.outliers, "samples": self.count, "seed": self.seed}

    def bundle(self, folder: Path, recipe: str) -> Path:
        """A bundle of the checkpoint in `folder`, made if it is not there."""
        plain, wanted, source = folder / "none", folder / recipe.replace("/", "-"), self.checkpoint
        if self.outliers is not None:
            source = folder / "source"
            if not source.exists():
                outliers.write_checkpoint(self.checkpoint, source, self.outliers)
        if recipe in CALIBRATED and not wanted.exists():
            ee.export(source, wanted, quantize=recipe)
        elif recipe not in CALIBRATED and not plain.exists():
            ee.export(source, plain)
        if not wanted.exists():
            ee.quantize(plain, wanted, recipe=PLAIN.get(recipe, recipe))
        return wanted

    def measure(self, bundle: Path, task: str) -> dict[str, Any]:
        """What a bundle scores in a task, with the seconds it took."""
        work = list(draw(task, self.count, self.seed))
        given = [("", "")] * len(work)
        with ee.load(bundle, threads=self.threads) as engine:
            assert isinstance(engine, ee.Engine)
            begin = time.perf_counter()
            for part in batches(work):
                for i, answer in zip(part, answers(engine, [work[i] for i in part]), strict=True):
                    given[i] = answer
        return {**score(work, given), "seconds": round(time.perf_counter() - begin, 1)}


def score(asked: Sequence[Asked], given: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Right answers, all and by kind, a mark for each in order, and the first wrong ones."""
    marks = [right(one, answer) for one, answer in zip(asked, given, strict=True)]
    kinds: dict[str, list[int]] = {}
    for one, mark in zip(asked, marks, strict=True):
        counts = kinds.setdefault(one.kind, [0, 0])
        counts[0] += mark
        counts[1] += 1
    triples = zip(asked, given, marks, strict=True)
    wrong = [(one.work.prompt[-40:], one.work.answer, *answer) for one, answer, mark in triples if not mark]
    return {
        "right": sum(marks),
        "kinds": dict(sorted(kinds.items())),
        "marks": "".join(str(int(mark)) for mark in marks),
        "wrong": wrong[:WRONG],
    }


def share(right: int, asked: int) -> str:
    """A share and its interval in percent."""
    low, high = wilson(right, asked)
    return f"{100 * right / asked:.2f} ({100 * low:.1f}–{100 * high:.1f})"


def gained(marks: str, before: str) -> str:
    """Points gained on other answers to the same exercises, and their standard error."""
    gains = np.array([int(mark) - int(other) for mark, other in zip(marks, before, strict=True)])
    return f"{100 * gains.mean():+.2f} ± {100 * gains.std() / math.sqrt(len(gains)):.2f}"


def tables(cells: dict[tuple[str, str], dict[str, Any]], recipes: Sequence[str], tasks: Sequence[str]) -> Iterator[str]:
    """Shares by recipe and task, then by kind of exercise; of what there is."""
    yield f"| recipe | {' | '.join(tasks)} |"
    yield f"| --- |{' --- |' * len(tasks)}"
    for recipe in recipes:
        row = []
        for task in tasks:
            cell, plain = cells.get((recipe, task)), cells.get(("none", task))
            text = share(cell["right"], cell["samples"]) if cell else ""
            row.append(f"{text} {gained(cell['marks'], plain['marks'])}" if cell and plain and cell != plain else text)
        yield f"| {recipe} | {' | '.join(row)} |"
    yield f"\n| task | kind | {' | '.join(recipes)} |"
    yield f"| --- | --- |{' --- |' * len(recipes)}"
    for task in tasks:
        known = [cells.get((recipe, task), {"kinds": {}})["kinds"] for recipe in recipes]
        for kind in sorted({kind for kinds in known for kind in kinds}, key=lambda kind: (len(kind), kind)):
            row = [share(*kinds[kind]) if kind in kinds else "" for kinds in known]
            yield f"| {task} | {kind} | {' | '.join(row)} |"


def stored(path: Path | None, key: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Recipe and task → figures that a file has for `key`."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row["recipe"], row["task"]): row for row in rows if key.items() <= row.items()}


def part_of(text: str) -> tuple[int, int]:
    """`K/N`, 1 to N."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1/2")
    return int(number) - 1, int(count)


def main() -> None:
    """Prints one JSON object for each recipe and task, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=checkpoint_folder(), help="the checkpoint")
    parser.add_argument("--count", type=int, default=2000, help="exercises of each task")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tasks", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names, files, rtn-g128 or rtn-g128-all")
    parser.add_argument("--outliers", type=int, help="exponent of 2 for massive activations, see tests/outliers.py")
    parser.add_argument("--out", type=Path, help="JSON lines to add to; what they have already is not measured again")
    parser.add_argument("--part", type=part_of, default=(0, 1), metavar="K/N", help="one of N parts of the work")
    parser.add_argument("--threads", type=int, help="CPU cores (default: all; 1 with --part)")
    options = parser.parse_args()
    number, parts = options.part
    threads = options.threads or (1 if parts > 1 else None)
    run = Run(options.folder, options.outliers, options.count, options.seed, threads)
    key = run.key()
    found = stored(options.out, key)
    # Recipe after recipe for each task: so the parts have the same tasks, of which some take much longer.
    mine = [(recipe, task) for task, recipe in product(options.tasks, options.recipes)][number::parts]
    with tempfile.TemporaryDirectory(prefix="exaone-tasks-") as folder:
        for recipe, task in mine:
            if (recipe, task) in found:
                continue
            figures = run.measure(run.bundle(Path(folder), recipe), task)
            found[recipe, task] = {"recipe": recipe, "task": task, **key, **figures}
            line = json.dumps(found[recipe, task], ensure_ascii=False)
            print(line, flush=True)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    print("\n".join(tables(found | stored(options.out, key), options.recipes, options.tasks)))


if __name__ == "__main__":
    main()
