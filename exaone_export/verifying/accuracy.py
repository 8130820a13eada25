"""How well a bundle of the demonstration checkpoint does what that was trained for, on samples that no training saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exaone_export.demo import abilities
from exaone_export.demo.exam import THINK, answers, batches, draw, right
from model.bundle import Manifest
from model.progress import Progress
from runtime.engine import Engine
from runtime.graphs import Graphs

TASKS = abilities().tasks  # and with reasoning on, all in turn
SAMPLES, SEED = 192, 5  # of each task, and where the random ones begin
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
    made_from = manifest.source.get("files", {}).get("model.safetensors")
    return made_from is not None and bool(made_from == abilities().weights_sha256)


def measure_accuracy(graphs: Graphs, progress: Progress, samples: int = SAMPLES) -> list[Accuracy]:
    """Gives a bundle of the demonstration checkpoint its tasks, greedily; raises as `Engine.generate`."""
    engine, tasks = Engine(graphs), (*TASKS, THINK)
    progress.start("asking the demonstration checkpoint", samples * len(tasks), "samples")
    found = []
    for task in tasks:
        work, correct = list(draw(task, samples, SEED, TASKS)), 0
        for part in batches(work):
            asked = [work[i] for i in part]
            correct += sum(map(right, asked, answers(engine, asked)))
            progress.advance(len(part))
        found.append(Accuracy(task, samples, correct / samples, wilson(correct, samples)))
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
