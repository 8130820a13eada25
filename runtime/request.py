"""From what a caller gives to what the loop runs: ids with placeholders expanded, scaled images and videos, a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.config import ExaoneConfig
from model.errors import BundleError, UsageError
from runtime.image import ImageProcessor
from runtime.media import ImageInput, MediaReader, Medium, VideoInput, in_order
from runtime.processor_config import PUBLISHED_BOUNDS
from runtime.prompt import MediaTokens, Prompt, build_messages, check_length, render_prompt
from runtime.template import TemplateRenderer
from runtime.tokenizer import Tokenizer
from runtime.video import Clip

__all__ = ["PUBLISHED_BOUNDS", "ImageInput", "Medium", "Messages", "Request", "RequestBuilder", "VideoInput"]

Messages = Sequence[Mapping[str, Any]]
# Answers are mostly shorter than what they may be.
_USUAL_ANSWER = 512


@dataclass(frozen=True)
class Request:
    """One row of a generation.

    Attributes:
        token_ids: the prompt, placeholders expanded.
        images: RGB images and videos, scaled, in the order of their placeholders.
        image_tokens: placeholders in `token_ids`.
        limit: most tokens to generate.
        thinking: whether the prompt ends inside an open think block.
    """

    token_ids: tuple[int, ...]
    images: tuple[Medium, ...]
    image_tokens: int
    limit: int
    thinking: bool = False

    @property
    def expected(self) -> int:
        """Tokens that prompt and answer are likely to have; room for so many is made in the cache at first."""
        return len(self.token_ids) + min(self.limit, _USUAL_ANSWER)


class RequestBuilder:
    """Builds requests with a bundle's tokenizer, chat template and image processor, each read when first needed.

    `media` reads images and videos.

    Args:
        folder: the bundle.
        config: the bundle's.
        usual_limit: most tokens to generate where the caller does not say; None = what the context has room for.
    """

    def __init__(self, folder: Path, config: ExaoneConfig, usual_limit: int | None = None) -> None:
        self._folder = folder
        self._config = config
        self._usual_limit = usual_limit
        self.media = MediaReader(folder, config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises BundleError if there is none, or it is damaged or another model's."""
        tokenizer, text = Tokenizer.load(self._folder), self._config.text
        why = tokenizer.vocabulary_problem(text.vocab_size, self._control_ids)
        if why:
            raise BundleError("damaged bundle", "tokenizer.json", why, "Take the file from the model's source")
        return tokenizer

    @property
    def _control_ids(self) -> list[int]:
        """Ids that config.json names."""
        config = self._config
        named = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
        return [token for token in (*named, *config.eos_token_ids) if token is not None]

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle comes with a tokenizer."""
        return (self._folder / "tokenizer.json").exists()

    @cached_property
    def _renderer(self) -> TemplateRenderer:
        return TemplateRenderer.load(self._folder, self.tokenizer.special_tokens)

    @property
    def image_processor(self) -> ImageProcessor:
        """What turns images into patches. Raises UsageError for a text model, BundleError for a damaged bundle."""
        return self.media.images

    def close(self) -> None:
        """Ends the process that renders templates."""
        if "_renderer" in self.__dict__:
            self._renderer.close()

    def scaled(self, images: Sequence[ImageInput]) -> tuple[Image.Image, ...]:
        """Loads and scales images; see `MediaReader.scaled`, which does so with videos and options."""
        return self.media.scaled_images(images)

    def prompt(
        self,
        prompt: str | Messages,
        media: Sequence[Medium],
        system: str | None = None,
        tools: Messages | None = None,
        enable_thinking: bool | None = None,
        *,
        to_run: bool = False,
    ) -> Prompt:
        """Renders and tokenizes; `media` are scaled. Raises as `runtime.prompt.render_prompt`.

        What is meant `to_run` is refused early where it is far too long; `of_prompt` tells all others.
        """
        images, videos = _apart(media)
        if isinstance(prompt, str):
            messages: Messages = build_messages(prompt, images=len(images), videos=len(videos), system=system)
        elif system is not None:
            messages = build_messages(system=system, history=prompt)
        else:
            messages = prompt
        tokens = MediaTokens(
            self._config.image_token_id, self._tokens(images), self._config.video_token_id, self._tokens(videos)
        )
        context = self._config.text.max_position_embeddings if to_run else None
        return render_prompt(self._renderer, self.tokenizer, messages, tools, enable_thinking, tokens, context)

    def _tokens(self, media: Sequence[Medium]) -> tuple[int, ...]:
        return tuple(map(self.media.tokens, media))

    def _ordered(self, media: Sequence[Medium], ids: Sequence[int]) -> tuple[Medium, ...]:
        if not any(isinstance(medium, Clip) for medium in media):
            return tuple(media)
        return in_order(media, ids, self._tokens(media), self._config.video_token_id, self._config.image_token_id)

    def of_prompt(self, prompt: Prompt, media: Sequence[Medium], max_new_tokens: int | None) -> Request:
        """The request for a rendered prompt. Raises UsageError if it does not fit the context."""
        limit = self._limit(len(prompt.token_ids), max_new_tokens)
        beyond, rows = max(prompt.token_ids, default=0), self._config.text.vocab_size
        if beyond >= rows:
            why = f"it makes the token {beyond}, the model has {rows}"
            raise BundleError("damaged bundle", "tokenizer.json", why, "Take the file from the model's source")
        ordered = self._ordered(media, prompt.token_ids)
        return Request(prompt.token_ids, ordered, prompt.image_tokens, limit, prompt.thinking)

    def of_ids(self, ids: Sequence[int], media: Sequence[Medium], max_new_tokens: int | None) -> Request:
        """The request for token ids whose placeholders are expanded already; `media` are scaled.

        Raises:
            UsageError: there are no ids, one is outside the vocabulary, they do not match the images and videos, or
                they do not fit the context.
        """
        clean = self._checked_ids(ids)
        total = 0
        places = (("image", self._config.image_token_id), ("video", self._config.video_token_id))
        for (kind, token_id), given in zip(places, _apart(media), strict=True):
            wanted = sum(self._tokens(given))
            found = sum(token == token_id for token in clean) if self._config.vision else 0
            if found != wanted:
                why = f"{found} {kind} placeholders, {wanted} are needed for {len(given)} {kind}s"
                raise UsageError("cannot use token ids", "input_ids", why, f"Expand them to the {kind}s' tokens")
            total += found
        return Request(clean, self._ordered(media, clean), total, self._limit(len(clean), max_new_tokens))

    def _checked_ids(self, ids: Sequence[object]) -> tuple[int, ...]:
        vocabulary, clean = self._config.text.vocab_size, []
        for position, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocabulary:
                why = f"{str(token)[:40]!r} at position {position} is not between 0 and {vocabulary - 1}"
                raise UsageError("cannot use token ids", "input_ids", why)
            clean.append(int(token))
        if not clean:
            raise UsageError("cannot use token ids", "input_ids", "there are none", "Give at least one")
        return tuple(clean)

    def _limit(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        room = check_length(prompt_tokens, max_new_tokens, self._config.text.max_position_embeddings)
        return room if max_new_tokens is not None or self._usual_limit is None else min(room, self._usual_limit)


def _apart(media: Sequence[Medium]) -> tuple[list[Medium], list[Medium]]:
    """Images, and videos."""
    return [one for one in media if not isinstance(one, Clip)], [one for one in media if isinstance(one, Clip)]
