"""Endless training batches: rendered lines in groups of one image size, and lines to copy without an image."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from exaone_export.demo.render import (
    GRID,
    HEIGHTS,
    WIDTHS,
    LineStyle,
    advance,
    centres,
    coverage,
    font_sizes,
    placed,
    random_height,
    random_style,
)
from exaone_export.demo.texts import KINDS, random_text
from training.make_tokenizer import FIRST_BYTE, build

IMAGE, PATCH, SLOTS, BLANK = 67, 14, 4, 94
IGNORED = -100
INSTRUCTIONS = ("Read the text.", "Read the text.", "What does the image say?", "Read this.", "What is written here?")
REASONING = "The image shows one line.\n</think>\n\n"


@dataclass(frozen=True)
class Stage:
    """What one stage of the curriculum draws from."""

    kinds: tuple[str, ...]
    longest: int
    heights: tuple[int, ...]
    copying: float = 0.0
    thinking: float = 0.0
    varied: bool = False


EVERYTHING = (*KINDS, "pair", "pair", "code")  # letters need more practice than digits
STAGES = (
    Stage(("number",), 4, HEIGHTS[:1]),
    Stage(EVERYTHING, 8, HEIGHTS[:1]),
    Stage(EVERYTHING, 16, HEIGHTS[:2]),
    Stage(EVERYTHING, 16, HEIGHTS, copying=0.12, thinking=0.1),
    Stage(EVERYTHING, 16, HEIGHTS, copying=0.12, thinking=0.1, varied=True),
)


@dataclass(frozen=True)
class Sample:
    """One line with what the auxiliary heads should find in each image token."""

    text: str
    image: npt.NDArray[np.uint8] | None
    characters: npt.NDArray[np.int64] | None
    first: npt.NDArray[np.int64] | None


@dataclass(frozen=True)
class Batch:
    """Tensors of one step.

    Attributes:
        input_ids: int64 [batch, sequence], padded with 0 on the right.
        labels: int64 [batch, sequence], the token to predict at each position or `IGNORED`.
        patches: float32 [batch, patches, C*P*P], or None without images.
        rows, columns: of patches.
        characters: int64 [batch, tokens, SLOTS], characters whose centre lies in each image token.
        first: int64 [batch, tokens], the place in the line of the first of them, or `IGNORED`.
    """

    input_ids: Tensor
    labels: Tensor
    patches: Tensor | None
    rows: int
    columns: int
    characters: Tensor | None
    first: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        values = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **values)


def image_targets(text: str, style: LineStyle) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Targets of the auxiliary heads: [tokens, SLOTS] and [tokens]."""
    down, across = style.height // GRID, style.width // GRID
    characters = np.full((down, across, SLOTS), BLANK, np.int64)
    first = np.full((down, across), IGNORED, np.int64)
    used = np.zeros(across, np.int64)
    row = min(max(int((style.top + 0.62 * style.font_size) // GRID), 0), down - 1)
    for place, (character, centre) in enumerate(zip(text, centres(text, style), strict=True)):
        column = min(int(centre // GRID), across - 1)
        if character == " " or used[column] == SLOTS:
            continue
        if not used[column]:
            first[row, column] = place
        characters[row, column, used[column]] = ord(character) - 33
        used[column] += 1
    return characters.reshape(-1, SLOTS), first.reshape(-1)


def colored(rng: Random, cover: npt.NDArray[np.uint8], style: LineStyle, varied: bool) -> npt.NDArray[np.uint8]:
    """Ink on paper [height, width, 3 or 1]; `varied` gives three in ten noise or colours."""
    if not varied or rng.random() < 0.7:
        shades = style.paper[0] + (style.ink[0] - style.paper[0]) * np.arange(256) / 255
        return np.rint(shades).astype(np.uint8)[cover][:, :, None]
    paper, ink = np.array(style.paper, np.float32), np.array(style.ink, np.float32)
    if rng.random() < 0.5:
        ink = np.array([rng.randint(0, 130) for _ in range(3)], np.float32)
        paper = np.array([rng.randint(190, 255) for _ in range(3)], np.float32)
    pixels = paper + (ink - paper) * (cover[:, :, None].astype(np.float32) / 255)
    if rng.random() < 0.67:
        noise = np.random.default_rng(rng.getrandbits(32))
        pixels += noise.normal(0, rng.uniform(1, 6), cover.shape)[:, :, None]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def resized(rng: Random, text: str, style: LineStyle) -> Image.Image:
    """The line drawn at a size that is no multiple of 28, brought to the style's size as the processor would."""
    scale_x, scale_y = 1 + rng.uniform(-13, 13) / style.width, 1 + rng.uniform(-9, 9) / style.height
    drawn = coverage(text, style)
    box = (0.0, 0.0, style.width, style.height)
    rough = drawn.resize((round(style.width * scale_x), round(style.height * scale_y)), Image.Resampling.BICUBIC, box)
    return rough.resize((style.width, style.height), Image.Resampling.BICUBIC)


def draw_sample(rng: Random, stage: Stage) -> tuple[LineStyle, Sample]:
    """One rendered line of the training part."""
    while True:
        text = random_text(rng, rng.choice(stage.kinds), held_out=False, longest=stage.longest)
        style = random_style(rng, text, random_height(rng, stage.heights))
        if style is not None:
            break
    resize = stage.varied and rng.random() < 0.1
    cover = resized(rng, text, style) if resize else coverage(text, style)
    image = colored(rng, np.asarray(cover), style, stage.varied)
    return style, Sample(text, image, *image_targets(text, style))


@cache
def encoded(text: str) -> tuple[int, ...]:
    """Ids of a fixed piece of a prompt."""
    return tuple(_TOKENIZER.encode(text, add_special_tokens=False).ids)


_TOKENIZER = build()


def sequence(rng: Random, text: str, tokens: int, thinking: float) -> tuple[list[int], list[int]]:
    """Prompt and answer ids of one sample with `tokens` image tokens (0 for a line to copy)."""
    answer = [FIRST_BYTE + byte for byte in text.encode()] + [53]
    if tokens:
        prompt = [*encoded("<|user|>\n<vision>"), *[IMAGE] * tokens, *encoded("</vision>\n" + rng.choice(INSTRUCTIONS))]
    else:
        prompt = [*encoded("<|user|>\nRepeat:"), *(FIRST_BYTE + byte for byte in b" " + text.encode())]
    if tokens and rng.random() < thinking:
        return [*prompt, *encoded("<|endofturn|>\n<|assistant|>\n<think>\n")], [*encoded(REASONING), *answer]
    return [*prompt, *encoded("<|endofturn|>\n<|assistant|>\n<think>\n\n</think>\n\n")], answer


def to_patches(images: npt.NDArray[np.uint8]) -> Tensor:
    """[batch, H, W, 3 or 1] -> [batch, patches, C*P*P] in the processor's order, paper 0 and black ink -1."""
    x = torch.from_numpy(images)
    batch, height, width, channels = x.shape
    x = x.view(batch, height // GRID, 2, PATCH, width // GRID, 2, PATCH, channels).permute(0, 1, 4, 2, 5, 7, 3, 6)
    x = x.reshape(batch, height * width // PATCH**2, channels, PATCH**2).expand(-1, -1, 3, -1).flatten(2)
    return x.float().div_(255).sub_(1)


def stacked(images: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """Images of one size as one array; grey ones take three channels only where another has them."""
    channels = max(image.shape[2] for image in images)
    return np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])


def assemble(rng: Random, samples: list[Sample], size: tuple[int, int], stage: Stage) -> Batch:
    """Samples of one image size (width, height) as tensors."""
    rows, columns = size[1] // PATCH, size[0] // PATCH
    pairs = [sequence(rng, sample.text, rows * columns // 4, stage.thinking) for sample in samples]
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    input_ids = torch.zeros(len(pairs), length, dtype=torch.int64)
    labels = torch.full((len(pairs), length), IGNORED, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    if not rows:
        return Batch(input_ids, labels, None, 0, 0, None, None)
    patches = to_patches(stacked([sample.image for sample in samples if sample.image is not None]))
    characters = torch.from_numpy(np.stack([x.characters for x in samples if x.characters is not None]))
    first = torch.from_numpy(np.stack([x.first for x in samples if x.first is not None]))
    return Batch(input_ids, labels, patches, rows, columns, characters, first)


class Batches:
    """Draws batches of `size` samples; samples wait until their image size has enough of them."""

    def __init__(self, seed: int, size: int) -> None:
        self.rng, self.size = Random(seed), size
        self.waiting: dict[tuple[int, int], list[Sample]] = defaultdict(list)
        self.stage = STAGES[0]

    def set_stage(self, number: int) -> None:
        """Enters a stage of the curriculum; samples of the old one are dropped."""
        self.stage = STAGES[number]
        self.waiting.clear()

    def dense(self) -> tuple[Tensor, Tensor, int, int]:
        """Images full of characters for the vision encoder alone: patches, characters in each token, rows, columns."""
        height, width = random_height(self.rng, self.stage.heights), self.rng.choice(WIDTHS[-4:])
        drawn, targets = [], []
        for _ in range(self.size):
            size = self.rng.randint(*font_sizes(height))
            text = self.filling(size, width - 4)
            style = placed(self.rng, text, size, width, height)
            drawn.append(colored(self.rng, np.asarray(coverage(text, style)), style, self.stage.varied))
            targets.append(image_targets(text, style)[0])
        return to_patches(stacked(drawn)), torch.from_numpy(np.stack(targets)), height // PATCH, width // PATCH

    def filling(self, size: int, width: float) -> str:
        """Lines of all kinds one after the other, cut off at `width` pixels."""
        text, pieces = "", ""
        while True:
            pieces = random_text(self.rng, self.rng.choice(EVERYTHING), held_out=False) + self.rng.choice(("", " "))
            for character in pieces:
                width -= advance(character, size)
                if width < 0:
                    return text
                text += character

    def __call__(self) -> Batch:
        if self.rng.random() < self.stage.copying:
            texts = (random_text(self.rng, self.rng.choice(EVERYTHING), held_out=False) for _ in range(self.size))
            return assemble(self.rng, [Sample(text, None, None, None) for text in texts], (0, 0), self.stage)
        while True:
            style, sample = draw_sample(self.rng, self.stage)
            key = (style.width, style.height)
            self.waiting[key].append(sample)
            if len(self.waiting[key]) == self.size:
                return assemble(self.rng, self.waiting.pop(key), key, self.stage)
