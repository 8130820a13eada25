"""From what a caller gives to what the loop runs: ids with placeholders expanded, scaled images, a limit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.config import ExaoneConfig
from model.errors import BundleError, UsageError
from model.jsonfile import read_json_object
from runtime.image import ImageProcessor
from runtime.image_file import display_name, from_array, load_image
from runtime.prompt import MediaTokens, Prompt, build_messages, check_length, render_prompt
from runtime.template import TemplateRenderer
from runtime.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
PUBLISHED_BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 4096 * 28 * 28}  # 4 to 4096 image tokens
ImageInput = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Request:
    """One row of a generation.

    Attributes:
        token_ids: the prompt, placeholders expanded.
        images: RGB, scaled, in the order of their placeholders.
        image_tokens: placeholders in `token_ids`.
        limit: most tokens to generate.
        thinking: whether the prompt ends inside an open think block.
    """

    token_ids: tuple[int, ...]
    images: tuple[Image.Image, ...]
    image_tokens: int
    limit: int
    thinking: bool = False


class RequestBuilder:
    """Builds requests with a bundle's tokenizer, chat template and image processor, each read when first needed.

    Args:
        folder: the bundle.
        config: the bundle's.
        usual_limit: most tokens to generate where the caller does not say; None = what the context has room for.
    """

    def __init__(self, folder: Path, config: ExaoneConfig, usual_limit: int | None = None) -> None:
        self._folder = folder
        self._config = config
        self._usual_limit = usual_limit

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises BundleError if there is none, or it is damaged or another model's."""
        tokenizer = Tokenizer.load(self._folder)
        if tokenizer.vocab_size > self._config.text.vocab_size:
            why = f"{tokenizer.vocab_size} tokens, the model has {self._config.text.vocab_size}"
            raise BundleError("damaged bundle", "tokenizer.json", why, "Take the file from the model's source")
        return tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle comes with a tokenizer."""
        return (self._folder / "tokenizer.json").exists()

    @cached_property
    def _renderer(self) -> TemplateRenderer:
        return TemplateRenderer.load(self._folder, self.tokenizer.special_tokens)

    @cached_property
    def image_processor(self) -> ImageProcessor:
        """What turns images into patches. Raises UsageError for a text model, BundleError for a damaged bundle."""
        if self._config.vision is None:
            raise UsageError("cannot use images", "images", "this model reads text only", "Leave the images out")
        path = self._folder / "preprocessor_config.json"
        # A checkpoint may lack the file; export notes it, and images are then prepared as EXAONE 4.5 was published.
        raw = read_json_object(path, BundleError, "cannot open bundle") if path.exists() else PUBLISHED_BOUNDS
        return ImageProcessor.from_config(raw, self._config.vision)

    def close(self) -> None:
        """Ends the process that renders templates."""
        if "_renderer" in self.__dict__:
            self._renderer.close()

    def scaled(self, images: Sequence[ImageInput]) -> tuple[Image.Image, ...]:
        """Loads and scales images, one large one in memory at a time.

        Raises:
            UsageError: an image cannot be used, or the model takes none.
        """
        if isinstance(images, (str, bytes, os.PathLike, Image.Image, np.ndarray)):
            raise UsageError("cannot use images", "images", "a list is needed", "Put the image into a list")
        return tuple(self._scaled(image, f"images[{i}]") for i, image in enumerate(images))

    def _scaled(self, image: object, name: str) -> Image.Image:
        processor = self.image_processor
        if isinstance(image, (str, os.PathLike)):
            return processor.scaled(load_image(image), display_name(os.fspath(image)))
        if isinstance(image, np.ndarray):
            return processor.scaled(from_array(image), name)
        if isinstance(image, Image.Image):
            return processor.scaled(image, name)
        why = f"it is a {type(image).__name__}"
        raise UsageError("cannot use images", name, why, "Give a path, a Pillow image or a uint8 array")

    def prompt(
        self,
        prompt: str | Messages,
        images: Sequence[Image.Image],
        system: str | None = None,
        tools: Messages | None = None,
        enable_thinking: bool | None = None,
    ) -> Prompt:
        """Renders and tokenizes; `images` are scaled. Raises as `runtime.prompt.render_prompt`."""
        if isinstance(prompt, str):
            messages: Messages = build_messages(prompt, images=len(images), system=system)
        elif system is not None:
            messages = build_messages(system=system, history=prompt)
        else:
            messages = prompt
        media = MediaTokens(self._config.image_token_id, self._image_tokens(images), self._config.video_token_id)
        return render_prompt(self._renderer, self.tokenizer, messages, tools, enable_thinking, media)

    def _image_tokens(self, images: Sequence[Image.Image]) -> tuple[int, ...]:
        return tuple(self.image_processor.token_count(image) for image in images)

    def of_prompt(self, prompt: Prompt, images: tuple[Image.Image, ...], max_new_tokens: int | None) -> Request:
        """The request for a rendered prompt. Raises UsageError if it does not fit the context."""
        limit = self._limit(len(prompt.token_ids), max_new_tokens)
        return Request(prompt.token_ids, images, prompt.image_tokens, limit, prompt.thinking)

    def of_ids(self, ids: Sequence[int], images: tuple[Image.Image, ...], max_new_tokens: int | None) -> Request:
        """The request for token ids whose placeholders are expanded already; `images` are scaled.

        Raises:
            UsageError: there are no ids, one is outside the vocabulary, they do not match the images, or they do not
                fit the context.
        """
        clean = self._checked_ids(ids)
        counts = self._image_tokens(images)
        found = sum(token == self._config.image_token_id for token in clean) if self._config.vision else 0
        if found != sum(counts):
            why = f"{found} image placeholders, {sum(counts)} are needed for {len(images)} images"
            raise UsageError("cannot use token ids", "input_ids", why, "Expand the placeholders to the images' tokens")
        return Request(clean, images, found, self._limit(len(clean), max_new_tokens))

    def _checked_ids(self, ids: Sequence[object]) -> tuple[int, ...]:
        vocabulary, clean = self._config.text.vocab_size, []
        for position, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocabulary:
                why = f"{str(token)[:40]!r} at position {position} is not between 0 and {vocabulary - 1}"
                raise UsageError("cannot use token ids", "input_ids", why)
            clean.append(int(token))
        if not clean:
            raise UsageError("cannot use token ids", "input_ids", "there are none", "Give at least one")
        if self._config.vision is not None and self._config.video_token_id in clean:
            raise UsageError("cannot use token ids", "input_ids", "videos are not supported", "Use images")
        return tuple(clean)

    def _limit(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        room = check_length(prompt_tokens, max_new_tokens, self._config.text.max_position_embeddings)
        return room if max_new_tokens is not None or self._usual_limit is None else min(room, self._usual_limit)
