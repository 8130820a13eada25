"""The prompts that quality is measured on: a user's, or a small set of our own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from exaone_export.verifying.pages import draw_page
from model.config import ExaoneConfig
from model.errors import UsageError
from model.jsonfile import parse_json_object, read_json_object
from runtime.image import Grid, PixelValues
from runtime.image_file import load_image
from runtime.request import RequestBuilder

LONGEST = 512  # tokens of a sample that are scored
RANDOM_SAMPLES, RANDOM_LENGTH = 8, 48
_LONGEST_TAG = 20
Message = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One sequence to score.

    Attributes:
        ids: token ids, placeholders expanded.
        images: patches and grid of each image in it.
        language: what its text is in, "ko", "en", "code" or another word; empty where nobody said.
        answer_tokens: how many of the last ids are the answer.
    """

    ids: tuple[int, ...]
    images: tuple[tuple[PixelValues, Grid], ...] = ()
    language: str = ""
    answer_tokens: int = 0

    @property
    def modality(self) -> str:
        """What it is made of: "image" where there is one, else "text"."""
        return "image" if self.images else "text"


@dataclass(frozen=True)
class _Talk:
    messages: list[Message]
    answer: str = ""
    images: tuple[Image.Image, ...] = ()
    language: str = ""


@dataclass(frozen=True)
class _Text:
    text: str
    language: str = ""


def load_samples(folder: Path, config: ExaoneConfig, prompts: Path | None) -> list[Sample]:
    """The sequences to score.

    Args:
        folder: the bundle, for its tokenizer, chat template and preprocessor configuration.
        config: of its model.
        prompts: JSON lines, each ``{"text": ...}`` taken as it is, or ``{"messages": [...], "images": [paths]}``,
            a last assistant turn being the answer to score; either with a "language" to be counted under, if wanted.
            None takes our own. A bundle without tokenizer gets random ids.

    Raises:
        UsageError: the file cannot be read, a line cannot be used, or the bundle has no tokenizer for it.
        BundleError: tokenizer, template or preprocessor configuration are missing or damaged.
    """
    builder = RequestBuilder(folder, config)
    if not builder.has_tokenizer:
        if prompts is not None:
            raise UsageError("cannot use prompts", prompts.name, "the bundle has no tokenizer", "Leave out --prompts")
        return _random_samples(config)
    with contextlib.closing(builder):
        writer = _Writer(builder, config, template=any(_has_template(folder)))
        if prompts is not None:
            return [writer.sample(_parse(line, where, prompts.parent), where) for where, line in _lines(prompts)]
        return [writer.sample(talk, "built-in prompt") for talk in _own_talks(writer.sees)]


class _Writer:
    """Turns talks into samples, with one bundle's tokenizer, template and image processor."""

    def __init__(self, builder: RequestBuilder, config: ExaoneConfig, template: bool) -> None:
        self._builder, self._config, self._template = builder, config, template
        self.sees = config.vision is not None and template

    def sample(self, talk: _Talk | _Text, where: str) -> Sample:
        if isinstance(talk, _Text):
            text = self._builder.tokenizer.encode_plain(talk.text)
            return Sample(self._checked(text, where), language=talk.language)
        if talk.images and not self.sees:
            raise UsageError("cannot use prompts", where, "it has images, which this bundle cannot place in a prompt")
        images = self._builder.scaled(talk.images) if talk.images else ()
        prompt = self._prompt(talk.messages, images)
        ids = self._checked([*prompt, *self._builder.tokenizer.encode_plain(talk.answer)], where)
        return Sample(ids, tuple(map(self._patches, images)), talk.language, max(0, len(ids) - len(prompt)))

    def _patches(self, scaled: Image.Image) -> tuple[PixelValues, Grid]:
        return self._builder.image_processor.patches(scaled)

    def _prompt(self, messages: Sequence[Message], images: tuple[Image.Image, ...]) -> Sequence[int]:
        if self._template:
            return self._builder.prompt(messages, images, enable_thinking=False).token_ids
        return self._builder.tokenizer.encode_plain("\n".join(_texts(messages)))

    def _checked(self, ids: Sequence[int], where: str) -> tuple[int, ...]:
        if len(ids) < 2:
            raise UsageError("cannot use prompts", where, "it has fewer than two tokens", "Give longer texts")
        limit = self._config.text.max_position_embeddings
        media = (self._config.image_token_id, self._config.video_token_id)
        # Images are not cut: their features must all find their places.
        last_media = max((i for i, token in enumerate(ids) if token in media), default=0)
        if last_media >= limit:
            raise UsageError("cannot use prompts", where, f"its images take more than the context of {limit} tokens")
        return tuple(ids[: min(limit, max(LONGEST, last_media + LONGEST // 4))])


def _has_template(folder: Path) -> Iterator[bool]:
    yield (folder / "chat_template.jinja").exists()
    path = folder / "tokenizer_config.json"
    yield path.exists() and isinstance(read_json_object(path).get("chat_template"), str)


def _own_talks(vision: bool) -> Iterator[_Talk]:
    """The built-in prompts; those with a page to look at only for models that see."""
    text = (files("exaone_export.verifying") / "prompts.jsonl").read_text("utf-8")
    for raw in map(json.loads, text.splitlines()):
        if "page" in raw and not vision:
            continue
        page = (draw_page(**raw["page"]),) if "page" in raw else ()
        *messages, last = raw["messages"]
        yield _Talk(messages, last["content"], page, raw["language"])


def _random_samples(config: ExaoneConfig) -> list[Sample]:
    rng = np.random.default_rng(0)
    media = {config.image_token_id, config.video_token_id}
    ids = np.array([i for i in range(config.text.vocab_size) if i not in media])
    return [Sample(tuple(rng.choice(ids, RANDOM_LENGTH).tolist())) for _ in range(RANDOM_SAMPLES)]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as reason:
        raise UsageError("cannot use prompts", str(path), reason.strerror or "it cannot be read") from None
    except UnicodeDecodeError as reason:
        raise UsageError("cannot use prompts", path.name, f"not UTF-8 at byte {reason.start}") from None
    if not any(line.strip() for line in lines):
        raise UsageError("cannot use prompts", path.name, "it has no lines", "Give one JSON object on each line")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path.name}:{number}", line


def _parse(line: str, where: str, folder: Path) -> _Talk | _Text:
    raw: Mapping[str, Any] = parse_json_object(line, where, UsageError, "cannot use prompts")
    text, messages, images = raw.get("text"), raw.get("messages"), raw.get("images", [])
    language = raw.get("language", "")
    if not isinstance(language, str) or len(language) > _LONGEST_TAG:
        raise UsageError("cannot use prompts", where, "its language is not a short text", 'Write e.g. "language": "ko"')
    if isinstance(text, str) and messages is None:
        return _Text(text, language)
    if not isinstance(messages, list) or not messages or not isinstance(images, list):
        raise UsageError("cannot use prompts", where, "it has neither a text nor a list of messages")
    if not all(isinstance(message, dict) for message in messages):
        raise UsageError("cannot use prompts", where, "a message is not an object")
    answer, last = "", messages[-1]
    if last.get("role") == "assistant" and isinstance(last.get("content"), str):
        answer, messages = last["content"], messages[:-1]
    return _Talk(messages, answer, tuple(load_image(folder / str(path)) for path in images), language)


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
