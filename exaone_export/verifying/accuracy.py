"""How well a bundle of the demonstration checkpoint does what that was trained for, on samples that no training saw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from exaone_export.demo import INSTRUCTION, checkpoint_folder
from exaone_export.demo.render import render_page
from exaone_export.demo.tasks import Exercise, exercise
from model.bundle import Manifest, file_sha256
from model.progress import Progress
from runtime.engine import Engine
from runtime.graphs import Graphs

# What the checkpoint that comes with the package was trained for, of `exaone_export.demo.tasks`.
TASKS = ("line",)
SAMPLES, SEED = 256, 5  # of each task, and where the random ones begin
_LONGEST, _BATCH = 120, 16
_WEIGHTS = "model.safetensors"
_Z = 1.959964  # standard deviations that 95 % of a normal distribution are within


@dataclass(frozen=True)
class Accuracy:
    """Answers that are right to the letter.

    Attributes:
        task: what was asked.
        asked: how often.
        exact: share of exact answers.
        interval_95: where the true share is with 95 % confidence (Wilson, 1927).
    """

    task: str
    asked: int
    exact: float
    interval_95: tuple[float, float]


def of_demonstration(manifest: Manifest) -> bool:
    """Whether a bundle was made from the demonstration checkpoint that comes with the package."""
    made_from = manifest.source.get("files", {}).get(_WEIGHTS)
    weights = checkpoint_folder() / _WEIGHTS
    return made_from is not None and weights.is_file() and bool(made_from == file_sha256(weights))


def measure_accuracy(graphs: Graphs, progress: Progress, samples: int = SAMPLES) -> list[Accuracy]:
    """Gives a bundle of the demonstration checkpoint its tasks, greedily; raises as `Engine.generate`."""
    engine = Engine(graphs)
    progress.start("asking the demonstration checkpoint", samples * len(TASKS), "samples")
    found = []
    for task in TASKS:
        right = 0
        for work in _batches(task, samples):
            images = [[render_page(page) for page in one.pages] for one in work]
            prompts = [one.prompt for one in work]
            answers = engine.generate(prompts, images=images, do_sample=False, max_new_tokens=_LONGEST)
            right += sum(given.text.strip() == one.answer for given, one in zip(answers, work, strict=True))
            progress.advance(len(work))
        found.append(Accuracy(task, samples, right / samples, wilson(right, samples)))
    progress.finish()
    return found


def overall(accuracies: Sequence[Accuracy]) -> float:
    """Share of exact answers over all tasks, of which there is at least one."""
    return sum(accuracy.exact * accuracy.asked for accuracy in accuracies) / sum(a.asked for a in accuracies)


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    share, square = right / count, _Z * _Z
    middle = share + square / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, (middle - spread) / (1 + square / count)), min(1.0, (middle + spread) / (1 + square / count))


def _batches(task: str, samples: int) -> Iterator[list[Exercise]]:
    """Held-out samples of a task at its hardest; those of one size are together, which saves padding."""
    rng = Random(f"{task} {SEED}")
    work = [exercise(rng, task, held_out=True) for _ in range(samples)]
    if task == "line":
        work = [replace(one, prompt=INSTRUCTION) for one in work]
    work.sort(key=lambda one: ([(page.height, page.width) for page in one.pages], len(one.prompt)))
    for start in range(0, samples, _BATCH):
        yield work[start : start + _BATCH]
