"""How many of its tasks the demonstration checkpoint still does after quantization: exact answers, images in, text out.

Exports the checkpoint as float and with every recipe, and gives each bundle the same held-out samples through
`exaone_export.load`, greedily; an answer counts if it is right to the last character. The task "think" is all tasks in
turn with reasoning on, where the reasoning has to be right too.

    python -m benchmarks.tasks --count 2000
    python -m benchmarks.tasks --count 200 --tasks receipt find --recipes none rtn-g128
    python -m benchmarks.tasks --count 500 --outliers 5       # 4 channels a layer 32 times as large, same function

Beside the shipped recipes and recipe files there are two to measure other methods against: "rtn-g128", every matrix of
the decoder in plain round-to-nearest int4, symmetric, with blocks of 128, all else float; "rtn-g128-all", the vision
encoder and the embedding too. The demonstration checkpoint is not LG's EXAONE: ratios between the rows mean something,
their level does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

import exaone_export as ee
from benchmarks.reading import wilson
from exaone_export.demo import checkpoint_folder
from exaone_export.demo.render import render_page
from exaone_export.demo.tasks import LEVELS, Exercise, exercise
from quantize.recipe import Recipe, Rule
from quantize.scheme import Scheme
from tests import outliers

THINK = "think"
MEASURED = ("line", "receipt", "question", "two", "find", THINK)
LONGEST, BATCH, SEED = 120, 16, 2027
RECIPES = ("none", "int8", "int8-dynamic", "int4", "rtn-g128", "rtn-g128-all")
_ROUNDED = Scheme(bits=4, block_size=128, symmetric=True, method="rtn")
PLAIN = {
    "rtn-g128": Recipe("rtn-g128", (Rule("decoder.*", _ROUNDED),)),
    "rtn-g128-all": Recipe("rtn-g128-all", (Rule("vision_encoder.patch_embed.*", None), Rule("*", _ROUNDED))),
}


@dataclass(frozen=True)
class Sample:
    """A held-out exercise and whether reasoning is on."""

    work: Exercise
    thinking: bool

    @property
    def images(self) -> list[npt.NDArray[np.uint8]]:
        """uint8 [height, width, 3] each."""
        return [np.array(render_page(page)) for page in self.work.pages]

    @property
    def shape(self) -> tuple[object, ...]:
        """Samples of one shape have prompts of about one length."""
        return (self.thinking, [(page.height, page.width) for page in self.work.pages], len(self.work.prompt))


def samples(task: str, count: int, seed: int = SEED) -> Iterator[Sample]:
    """Held-out samples of a task of `MEASURED` at its hardest, none twice."""
    rng, seen, names = Random(f"{task} {seed}"), set[Exercise](), list(LEVELS)
    while len(seen) < count:
        work = exercise(rng, names[len(seen) % len(names)] if task == THINK else task, held_out=True)
        if work not in seen:
            seen.add(work)
            yield Sample(work, task == THINK)


def answers(engine: ee.Engine, work: Sequence[Sample], batch: int = BATCH) -> list[tuple[str, str]]:
    """Reasoning and answer for each sample, in order."""
    found: dict[int, tuple[str, str]] = {}
    order = sorted(range(len(work)), key=lambda i: work[i].shape)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        results = engine.generate(
            [work[i].work.prompt for i in part],
            images=[work[i].images for i in part],
            do_sample=False,
            max_new_tokens=LONGEST,
            enable_thinking=work[part[0]].thinking,
        )
        found |= {i: (result.reasoning, result.text) for i, result in zip(part, results, strict=True)}
    return [found[i] for i in range(len(work))]


def right(sample: Sample, answer: tuple[str, str]) -> bool:
    """Whether an answer, and the reasoning before it, is the one asked for."""
    reasoning, text = (part.strip() for part in answer)
    return text == sample.work.answer and reasoning == (sample.work.reasoning if sample.thinking else "")


def score(work: Sequence[Sample], given: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Share of right answers with its 95 % interval, by kind, and the first wrong ones."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for sample, answer in zip(work, given, strict=True):
        correct = right(sample, answer)
        kinds[sample.work.task if sample.thinking else sample.work.kind].append(correct)
        if not correct:
            wrong.append((sample.work.prompt[-40:], sample.work.answer, *answer))
    exact = sum(map(sum, kinds.values()))
    return {
        "samples": len(work),
        "exact": exact / len(work),
        "interval_95": wilson(exact, len(work)),
        "kinds": {kind: f"{sum(marks)}/{len(marks)}" for kind, marks in sorted(kinds.items())},
        "wrong": wrong[:10],
    }


def measure(bundle: Path, tasks: Iterable[str], count: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a bundle scores in each task, with the seconds it took."""
    with ee.load(bundle) as engine:
        assert isinstance(engine, ee.Engine)
        for task in tasks:
            work = list(samples(task, count, seed))
            begin = time.perf_counter()
            given = answers(engine, work)
            yield task, {**score(work, given), "seconds": time.perf_counter() - begin}


def cell(figures: dict[str, Any]) -> str:
    """A share and its interval in percent."""
    low, high = figures["interval_95"]
    return f"{100 * figures['exact']:.2f} ({100 * low:.1f}–{100 * high:.1f})"


def main() -> None:
    """Prints one JSON object for each recipe and task, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=checkpoint_folder(), help="the checkpoint")
    parser.add_argument("--count", type=int, default=2000, help="samples of each task")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tasks", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names, files, rtn-g128 or rtn-g128-all")
    parser.add_argument("--outliers", type=int, help="exponent of 2 for massive activations, see tests/outliers.py")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="exaone-tasks-") as name:
        plain = Path(name) / "none"
        source = options.folder
        if options.outliers is not None:
            source = outliers.write_checkpoint(source, Path(name) / "source", options.outliers)
        ee.export(source, plain)
        for number, recipe in enumerate(options.recipes):
            bundle = plain
            if recipe != "none":
                bundle = Path(name) / str(number)
                ee.quantize(plain, bundle, recipe=PLAIN.get(recipe, recipe))
            cells = []
            for task, figures in measure(bundle, options.tasks, options.count, options.seed):
                print(json.dumps({"recipe": recipe, "task": task, **figures}, ensure_ascii=False), flush=True)
                cells.append(cell(figures))
            rows.append(f"| {recipe} | {' | '.join(cells)} |")
    print(f"| recipe | {' | '.join(options.tasks)} |")
    print(f"| --- |{' --- |' * len(options.tasks)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
