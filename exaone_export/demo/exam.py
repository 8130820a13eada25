"""Held-out exercises for a bundle of the demonstration checkpoint, what it answers, and whether that is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from exaone_export.demo.render import render_page
from exaone_export.demo.tasks import LEVELS, Exercise, exercise

if TYPE_CHECKING:
    from runtime.engine import Engine

THINK = "think"  # all other tasks in turn, with reasoning on
LONGEST, BATCH = 120, 32


@dataclass(frozen=True)
class Asked:
    """An exercise and whether reasoning is on."""

    work: Exercise
    thinking: bool

    @property
    def task(self) -> str:
        """A task, or `THINK`."""
        return THINK if self.thinking else self.work.task

    @property
    def kind(self) -> str:
        """What sort of exercise of its task."""
        return self.work.task if self.thinking else self.work.kind

    @property
    def images(self) -> list[npt.NDArray[np.uint8]]:
        """uint8 [height, width, 3] each."""
        return [np.array(render_page(page)) for page in self.work.pages]

    @property
    def cost(self) -> tuple[object, ...]:
        """Exercises of nearly the same take about as long, so that a batch of them waits for none."""
        pages = [(page.height, page.width) for page in self.work.pages]
        return (self.thinking, pages, len(self.work.prompt), len(self.work.answer))


def draw(task: str, count: int, seed: int, of: Sequence[str] = tuple(LEVELS)) -> Iterator[Asked]:
    """Held-out exercises of a task at its hardest, none twice.

    Args:
        task: a key of `LEVELS`, or `THINK`.
        count: how many.
        seed: of the choice.
        of: the tasks that `THINK` takes in turn.
    """
    rng, seen = Random(f"{task} {seed}"), set[Exercise]()
    while len(seen) < count:
        work = exercise(rng, of[len(seen) % len(of)] if task == THINK else task, held_out=True)
        if work not in seen:
            seen.add(work)
            yield Asked(work, task == THINK)


def batches(asked: Sequence[Asked], size: int = BATCH) -> Iterator[list[int]]:
    """Indices of exercises to answer together: those with reasoning apart, and such of one size beside each other."""
    order = sorted(range(len(asked)), key=lambda i: asked[i].cost)
    for thinking in (False, True):
        part = [i for i in order if asked[i].thinking is thinking]
        yield from (part[start : start + size] for start in range(0, len(part), size))


def answers(engine: Engine, asked: Sequence[Asked]) -> list[tuple[str, str]]:
    """Reasoning and answer to each of a batch of `batches`, greedily; raises as `Engine.generate`."""
    results = engine.generate(
        [one.work.prompt for one in asked],
        images=[one.images for one in asked],
        do_sample=False,
        max_new_tokens=LONGEST,
        enable_thinking=asked[0].thinking,
    )
    return [(result.reasoning, result.text) for result in results]


def right(asked: Asked, answer: tuple[str, str]) -> bool:
    """Whether an answer, and the reasoning before it, is to the letter what the exercise wants."""
    reasoning, text = (part.strip() for part in answer)
    return text == asked.work.answer and reasoning == (asked.work.reasoning if asked.thinking else "")
