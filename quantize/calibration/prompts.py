"""Prompts as the model takes them, and how much every token of them counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from quantize.scheme import Floats

Ids = NDArray[np.int64]
Grids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One sequence.

    Attributes:
        ids: int64 [tokens], image placeholders expanded; at least two.
        grids: int64 [images, 3], frames, rows and columns of patches of each image.
        pixels: gives float32 [patches, patch_dim] of all its images; called when needed, as patches are large.
        digest: sha256 of the patches; empty where there are none.
    """

    ids: Ids
    grids: Grids = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    pixels: Callable[[], Floats] | None = None
    digest: str = ""

    @property
    def patches(self) -> int:
        """Patches of all its images."""
        return int(self.grids.prod(1).sum())


@dataclass(frozen=True, eq=False)
class PromptSet:
    """What a model is calibrated on.

    Attributes:
        name: of the set: "default", or of a file.
        prompts: in order.
        media: token ids that stand for images.
    """

    name: str
    prompts: tuple[Prompt, ...]
    media: tuple[int, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Of everything that the model is given: ids and patches."""
        whole = hashlib.sha256()
        for prompt in self.prompts:
            whole.update(f"{prompt.ids.size} {prompt.grids.tolist()} {prompt.digest}\n".encode())
            whole.update(prompt.ids.astype("<i8").tobytes())
        return whole.hexdigest()

    @property
    def text_tokens(self) -> int:
        """Tokens that are not images."""
        return sum(int((~self.is_media(prompt)).sum()) for prompt in self.prompts)

    @property
    def image_tokens(self) -> int:
        """Tokens that are images."""
        return sum(int(self.is_media(prompt).sum()) for prompt in self.prompts)

    def is_media(self, prompt: Prompt) -> NDArray[np.bool_]:
        """Bool [tokens]: which tokens of a prompt are images."""
        return np.isin(prompt.ids, self.media)

    def describe(self) -> dict[str, str | int]:
        """What a manifest says of it."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "prompts": len(self.prompts),
            "text_tokens": self.text_tokens,
            "image_tokens": self.image_tokens,
        }


def token_weights(prompts: PromptSet) -> list[Floats]:
    """How much each token counts, float32 [tokens] a prompt; all of them together 1.

    Text and images count the same, however many tokens they have: pictures have many that say little, and what text
    needs would drown in them (Li et al., MBQ, arXiv 2412.19509, balance the two by their gradients).
    """
    found = [prompts.is_media(prompt) for prompt in prompts.prompts]
    images = sum(int(media.sum()) for media in found)
    texts = sum(media.size for media in found) - images
    kinds = (images > 0) + (texts > 0)
    of_image, of_text = (1 / (kinds * count) if count else 0.0 for count in (images, texts))
    return [np.where(media, of_image, of_text).astype(np.float32) for media in found]


def even_weights(counts: Sequence[int]) -> list[Floats]:
    """The same for rows that all count alike: those of the vision encoder."""
    each = 1 / max(1, sum(counts))
    return [np.full(count, each, np.float32) for count in counts]
