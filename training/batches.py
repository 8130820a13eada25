"""Endless training batches: exercises of one task whose images have the same sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exaone_export.demo.render import HEIGHTS, WIDTHS, advance, font_sizes, line_page, placed, random_height
from exaone_export.demo.tasks import EVERYTHING, LEVELS, Exercise, exercise
from exaone_export.demo.texts import random_text
from training.make_tokenizer import build
from training.pixels import IGNORED, PATCH, drawn, page_targets, stacked, to_patches

IMAGE, END = 67, 53
THINKING = 0.12  # share of samples with reasoning on
_TOKENIZER = build()


@dataclass(frozen=True)
class Images:
    """The first, or the second, image of every sample.

    Attributes:
        patches: float32 [batch, patches, C*P*P].
        rows, columns: of patches.
        characters: int64 [batch, tokens, SLOTS], characters whose centre lies in each image token.
        first: int64 [batch, tokens], the place in the line of the first of them, or `IGNORED`.
        line: int64 [batch, tokens], the number of its line, or `IGNORED`.
    """

    patches: Tensor
    rows: int
    columns: int
    characters: Tensor
    first: Tensor
    line: Tensor

    def to(self, device: torch.device) -> Images:
        """The same on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch:
    """Tensors of one task.

    Attributes:
        task: a key of `TASKS`.
        input_ids: int64 [batch, sequence], padded with 0 on the right.
        labels: int64 [batch, sequence], the token to predict at each position or `IGNORED`.
        images: one entry for each image of a sample, none for text.
    """

    task: str
    input_ids: Tensor
    labels: Tensor
    images: tuple[Images, ...]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        images = tuple(part.to(device) for part in self.images)
        return replace(self, input_ids=self.input_ids.to(device), labels=self.labels.to(device), images=images)


@dataclass(frozen=True)
class Sample:
    """An exercise with its images drawn, and whether reasoning is on."""

    exercise: Exercise
    pixels: tuple[npt.NDArray[np.uint8], ...]
    thinking: bool

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each image."""
        return tuple((page.height, page.width) for page in self.exercise.pages)


def encode(text: str) -> list[int]:
    """Ids of a text."""
    return list(_TOKENIZER.encode(text, add_special_tokens=False).ids)


def prompt_text(work: Exercise, thinking: bool) -> str:
    """The chat up to the answer, as the template writes it; one placeholder an image."""
    images = "<vision><|image_pad|></vision>\n" * len(work.pages)
    turn = f"<|user|>\n{images}{work.prompt}<|endofturn|>\n<|assistant|>\n<think>\n"
    return turn if thinking else turn + "\n</think>\n\n"


def expanded(ids: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Ids with each placeholder repeated as often as its image has tokens."""
    counts, full = iter(tokens), list[int]()
    for one in ids:
        full += [one] * (next(counts) if one == IMAGE else 1)
    return full


def sequence(work: Exercise, thinking: bool) -> tuple[list[int], list[int]]:
    """Prompt and answer ids; the answer has the reasoning, if on, and the end of turn."""
    tokens = [page.height * page.width // (2 * PATCH) ** 2 for page in work.pages]
    prompt = expanded(encode(prompt_text(work, thinking)), tokens)
    reasoning = encode(f"{work.reasoning}\n</think>\n\n") if thinking else []
    return prompt, [*reasoning, *encode(work.answer), END]


def assemble(samples: Sequence[Sample]) -> Batch:
    """Samples of one task and the same image sizes as tensors."""
    pairs = [sequence(sample.exercise, sample.thinking) for sample in samples]
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    input_ids = torch.zeros(len(pairs), length, dtype=torch.int64)
    labels = torch.full((len(pairs), length), IGNORED, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    images = []
    for number, (height, width) in enumerate(samples[0].sizes):
        patches = to_patches(stacked([sample.pixels[number] for sample in samples]))
        targets = [page_targets(sample.exercise.pages[number]) for sample in samples]
        found = [torch.from_numpy(np.stack(part)) for part in zip(*targets, strict=True)]
        images.append(Images(patches, height // PATCH, width // PATCH, *found))
    return Batch(samples[0].exercise.task, input_ids, labels, tuple(images))


class Batches:
    """Draws batches of `size` samples; samples wait until there are enough of their task and image sizes.

    Args:
        seed: of all that is drawn.
        size: samples of a batch.
        held_out: whether texts are from the held-out part.
    """

    def __init__(self, seed: int, size: int, held_out: bool = False) -> None:
        self.rng, self.size, self.held_out = Random(seed), size, held_out
        self.waiting: dict[tuple[str, int, object], list[Sample]] = defaultdict(list)

    def sample(self, task: str, level: int) -> Sample:
        """One exercise of a task and level, drawn."""
        work = exercise(self.rng, task, self.held_out, level)
        varied = LEVELS[task][level].varied
        pixels = tuple(drawn(self.rng, page, varied) for page in work.pages)
        thinking = (level > 0 or len(LEVELS[task]) == 1) and self.rng.random() < THINKING
        return Sample(work, pixels, thinking)

    def batch(self, task: str, level: int) -> Batch:
        """A batch of one task."""
        while True:
            sample = self.sample(task, level)
            key = (task, level, sample.sizes)
            self.waiting[key].append(sample)
            if len(self.waiting[key]) == self.size:
                return assemble(self.waiting.pop(key))

    def choose(self, weights: Mapping[str, float]) -> str:
        """A task, drawn by weight."""
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def dense(self) -> Images:
        """Images full of characters, for the vision encoder alone."""
        height, width = random_height(self.rng, HEIGHTS), self.rng.choice(WIDTHS[-4:])
        pixels, targets = [], []
        for _ in range(self.size):
            size = self.rng.randint(*font_sizes(height))
            text = self.filling(size, width - 4)
            page = line_page(text, placed(self.rng, text, size, width, height))
            pixels.append(drawn(self.rng, page, varied=False))
            targets.append(page_targets(page))
        found = [torch.from_numpy(np.stack(part)) for part in zip(*targets, strict=True)]
        return Images(to_patches(stacked(pixels)), height // PATCH, width // PATCH, *found)

    def filling(self, size: int, width: float) -> str:
        """Lines of all kinds one after the other, cut off at `width` pixels."""
        text = ""
        while True:
            pieces = random_text(self.rng, self.rng.choice(EVERYTHING), held_out=False) + self.rng.choice(("", " "))
            for character in pieces:
                width -= advance(character, size)
                if width < 0:
                    return text
                text += character
