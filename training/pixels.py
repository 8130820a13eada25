"""Pages as training sees them: colours and noise, patches in the processor's order, and what is where."""

from __future__ import annotations

from random import Random

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from exaone_export.demo.render import GRID, Page, page_coverage, piece_centres

PATCH, SLOTS, BLANK = 14, 4, 94
IGNORED = -100
PRICE = 10  # place of the first character right of a name; those of lines and names begin at 0
PLACES, ROWS = 17, 8


def page_targets(page: Page) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Targets of the auxiliary heads: characters in each token, place of the first of them, number of its line.

    Returns:
        [tokens, SLOTS], [tokens] and [tokens]; the last two are `IGNORED` in tokens without a character.
    """
    down, across = page.height // GRID, page.width // GRID
    characters = np.full((down, across, SLOTS), BLANK, np.int64)
    first, line = np.full((down, across), IGNORED, np.int64), np.full((down, across), IGNORED, np.int64)
    used = np.zeros((down, across), np.int64)
    tops = sorted({piece.top for piece in page.pieces})
    for piece in page.pieces:
        row = min(max(int((piece.top + 0.62 * page.font_size) // GRID), 0), down - 1)
        start = 0 if all(other.left >= piece.left for other in page.pieces if other.top == piece.top) else PRICE
        for place, (character, centre) in enumerate(zip(piece.text, piece_centres(piece, page.font_size), strict=True)):
            column = min(int(centre // GRID), across - 1)
            slot = used[row, column]
            if character == " " or slot == SLOTS:
                continue
            if not slot:
                first[row, column], line[row, column] = start + place, tops.index(piece.top)
            characters[row, column, slot] = ord(character) - 33
            used[row, column] += 1
    return characters.reshape(-1, SLOTS), first.reshape(-1), line.reshape(-1)


def colored(rng: Random, cover: npt.NDArray[np.uint8], page: Page, varied: bool) -> npt.NDArray[np.uint8]:
    """Ink on paper [height, width, 3 or 1]; `varied` gives three in ten noise or colours."""
    if not varied or rng.random() < 0.7:
        shades = page.paper[0] + (page.ink[0] - page.paper[0]) * np.arange(256) / 255
        return np.rint(shades).astype(np.uint8)[cover][:, :, None]
    paper, ink = np.array(page.paper, np.float32), np.array(page.ink, np.float32)
    if rng.random() < 0.5:
        ink = np.array([rng.randint(0, 130) for _ in range(3)], np.float32)
        paper = np.array([rng.randint(190, 255) for _ in range(3)], np.float32)
    pixels = paper + (ink - paper) * (cover[:, :, None].astype(np.float32) / 255)
    if rng.random() < 0.67:
        noise = np.random.default_rng(rng.getrandbits(32))
        pixels += noise.normal(0, rng.uniform(1, 6), cover.shape)[:, :, None]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def resized(rng: Random, page: Page) -> Image.Image:
    """The ink drawn at a size that is no multiple of 28, brought to the page's size as the processor would."""
    scale_x, scale_y = 1 + rng.uniform(-13, 13) / page.width, 1 + rng.uniform(-9, 9) / page.height
    drawn = page_coverage(page)
    box = (0.0, 0.0, page.width, page.height)
    rough = drawn.resize((round(page.width * scale_x), round(page.height * scale_y)), Image.Resampling.BICUBIC, box)
    return rough.resize((page.width, page.height), Image.Resampling.BICUBIC)


def drawn(rng: Random, page: Page, varied: bool) -> npt.NDArray[np.uint8]:
    """The page's pixels [height, width, 3 or 1]; `varied` ones have noise, colours or another size now and then."""
    cover = resized(rng, page) if varied and rng.random() < 0.1 else page_coverage(page)
    return colored(rng, np.asarray(cover), page, varied)


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
