"""The prompts that quality is measured on: a user's, or a small set of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.config import ExaoneConfig
from model.errors import UsageError
from model.jsonfile import parse_json_object, read_json_object
from runtime.image import Grid, PixelValues
from runtime.image_file import load_image
from runtime.request import RequestBuilder

LONGEST = 512  # tokens of a sample that are scored
RANDOM_SAMPLES, RANDOM_LENGTH = 8, 48
Message = dict[str, Any]

# (question, answer) pairs; both are ours. The answers are what is scored most of.
_TALKS = (
    (
        "Why does the sky look blue?",
        "Air scatters short wavelengths of sunlight far more than long ones, so blue light reaches our eyes from every "
        "direction, while red light mostly passes straight through.",
    ),
    (
        "하늘은 왜 파랗게 보이나요?",
        "공기 분자는 햇빛 가운데 파장이 짧은 빛을 더 많이 흩뜨립니다. "
        "그래서 파란빛이 사방에서 눈에 들어오고, "
        "해가 질 무렵에는 빛이 더 긴 거리를 지나므로 붉은빛이 남습니다.",
    ),
    (
        "Write a function that tells whether a word is a palindrome.",
        "def is_palindrome(word: str) -> bool:\n"
        "    letters = [c.lower() for c in word if c.isalnum()]\n"
        "    return letters == letters[::-1]\n",
    ),
    (
        "A train leaves at 9:40 and arrives at 13:05. How long does it take?",
        "From 9:40 to 13:00 are 3 hours and 20 minutes, and 5 more minutes make 3 hours and 25 minutes.",
    ),
    (
        "서울에서 부산까지 가는 방법을 세 가지 알려 주세요.",
        "1. 고속열차: 약 두 시간 반이 걸립니다.\n"
        "2. 고속버스: 약 네 시간 반이 걸리고 더 쌉니다.\n"
        "3. 비행기: 한 시간 남짓이지만 공항까지 가는 시간이 더 듭니다.",
    ),
    (
        "Summarise in one sentence: The bakery opens at six. By eight the rye bread is usually gone, so regulars "
        "order it the evening before.",
        "Since the bakery's rye bread sells out by eight, regulars order it a day ahead.",
    ),
)
_SIGNS = ("OPEN 24 HOURS", "Total: 13,750 won", "Platform 7 -> Busan")


@dataclass(frozen=True)
class Sample:
    """One sequence to score.

    Attributes:
        ids: token ids, placeholders expanded.
        images: patches and grid of each image in it.
    """

    ids: tuple[int, ...]
    images: tuple[tuple[PixelValues, Grid], ...] = ()


@dataclass(frozen=True)
class _Talk:
    messages: list[Message]
    answer: str = ""
    images: tuple[Image.Image, ...] = ()


def load_samples(folder: Path, config: ExaoneConfig, prompts: Path | None) -> list[Sample]:
    """The sequences to score.

    Args:
        folder: the bundle, for its tokenizer, chat template and preprocessor configuration.
        config: of its model.
        prompts: JSON lines, each ``{"text": ...}`` taken as it is, or ``{"messages": [...], "images": [paths]}``,
            a last assistant turn being the answer to score; None takes our own. A bundle without tokenizer gets
            random ids.

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

    def sample(self, talk: _Talk | str, where: str) -> Sample:
        if isinstance(talk, str):
            return Sample(self._checked(self._builder.tokenizer.encode_plain(talk), where))
        if talk.images and not self.sees:
            raise UsageError("cannot use prompts", where, "it has images, which this bundle cannot place in a prompt")
        images = self._builder.scaled(talk.images) if talk.images else ()
        prompt = self._prompt(talk.messages, images)
        ids = [*prompt, *self._builder.tokenizer.encode_plain(talk.answer)]
        return Sample(self._checked(ids, where), tuple(map(self._patches, images)))

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
    for question, answer in _TALKS:
        yield _Talk([{"role": "user", "content": question}], answer)
    for i, text in enumerate(_SIGNS if vision else ()):
        parts = [{"type": "image"}, {"type": "text", "text": "Read the text in the picture."}]
        yield _Talk([{"role": "user", "content": parts}], text, (_sign(text, 24 + 8 * i),))


def _sign(text: str, size: int) -> Image.Image:
    """A picture with a line of text; its proportions differ with text and size."""
    font = ImageFont.load_default(size)
    box = font.getbbox(text)
    image = Image.new("RGB", (int(box[2]) + 2 * size, int(box[3]) + size), (250, 248, 240))
    ImageDraw.Draw(image).text((size, size // 2), text, fill=(20, 20, 60), font=font)
    return image


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


def _parse(line: str, where: str, folder: Path) -> _Talk | str:
    raw: Mapping[str, Any] = parse_json_object(line, where, UsageError, "cannot use prompts")
    text, messages, images = raw.get("text"), raw.get("messages"), raw.get("images", [])
    if isinstance(text, str) and messages is None:
        return text
    if not isinstance(messages, list) or not messages or not isinstance(images, list):
        raise UsageError("cannot use prompts", where, "it has neither a text nor a list of messages")
    if not all(isinstance(message, dict) for message in messages):
        raise UsageError("cannot use prompts", where, "a message is not an object")
    answer, last = "", messages[-1]
    if last.get("role") == "assistant" and isinstance(last.get("content"), str):
        answer, messages = last["content"], messages[:-1]
    return _Talk(messages, answer, tuple(load_image(folder / str(path)) for path in images))


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
