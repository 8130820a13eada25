"""Prompts as a model takes them, made with its checkpoint's own tokenizer, chat template and image processor."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from exaone_export.verifying.pages import draw_page
from model.config import ExaoneConfig, load_config
from model.errors import ExaoneError, UsageError
from model.jsonfile import parse_json_object, read_json_object
from quantize.calibration.prompts import Prompt, PromptSet
from quantize.scheme import Floats
from runtime.image_file import load_image
from runtime.messages import check_messages, count_media
from runtime.request import RequestBuilder

DEFAULT = "default"
LONGEST = 2048  # tokens of a prompt; what is behind them is left out, images never are
_WHAT = "cannot calibrate"
_LARGEST_FILE = 256 << 20
_KEYS = ("text", "messages", "images", "language")
_FORMAT = 'Write {"messages": [...], "images": [paths]} or {"text": "..."} on each line'

Loader = Callable[[], Image.Image]


@dataclass(frozen=True)
class _Line:
    """One line of a file.

    Attributes:
        where: it stands, for errors.
        text: taken as it is; None where there are messages.
        messages: without the last assistant turn.
        answer: that turn's text.
        images: to be loaded when they are needed.
    """

    where: str
    text: str | None
    messages: Sequence[Mapping[str, Any]] = ()
    answer: str = ""
    images: tuple[Loader, ...] = ()


def load_prompts(folder: Path, file: Path | None) -> PromptSet:
    """The prompts to calibrate a checkpoint on.

    Args:
        folder: the checkpoint, for its tokenizer, chat template and preprocessor configuration.
        file: JSON lines, each ``{"messages": [...], "images": [paths]}`` with paths relative to the file and a last
            assistant turn being the answer, or ``{"text": ...}`` taken as it is; None takes our own.

    Raises:
        UsageError: the file cannot be read, a line cannot be used, or the checkpoint has no tokenizer.
        CheckpointError, BundleError: tokenizer, template or preprocessor configuration are damaged.
    """
    config = load_config(folder)
    builder = RequestBuilder(folder, config)
    if not builder.has_tokenizer:
        why = "the checkpoint has no tokenizer.json, so no prompt can be given to it"
        remedy = "Add it from the model's source, or use a recipe whose methods need no calibration"
        raise UsageError(_WHAT, folder.name, why, remedy)
    with contextlib.closing(builder):
        encoder = _Encoder(builder, config, template=any(_has_template(folder)))
        if file is None:
            prompts = [encoder.prompt(line) for line in _own_lines() if encoder.sees or not line.images]
        else:
            prompts = [encoder.prompt(line) for line in _file_lines(file)]
        media = tuple(token for token in (config.image_token_id, config.video_token_id) if token is not None)
    return PromptSet(DEFAULT if file is None else file.name, tuple(prompts), media)


class _Encoder:
    """Turns lines into prompts for one model."""

    def __init__(self, builder: RequestBuilder, config: ExaoneConfig, *, template: bool) -> None:
        self._builder, self._config, self._template = builder, config, template
        self.sees = config.vision is not None and template

    def prompt(self, line: _Line) -> Prompt:
        """What the model takes."""
        try:
            return self._prompt(line)
        except UsageError as reason:
            raise _at(line.where, reason) from None

    def _prompt(self, line: _Line) -> Prompt:
        tokenizer = self._builder.tokenizer
        if line.text is not None:
            return Prompt(self._cut(tokenizer.encode_plain(line.text)))
        if line.images and not self.sees:
            raise UsageError(_WHAT, "images", "this model has no place for images in a prompt", "Leave them out")
        images = self._builder.scaled([load() for load in line.images]) if line.images else ()
        if self._template:
            asked = self._builder.prompt(line.messages, images, enable_thinking=False).token_ids
        else:
            asked = tuple(tokenizer.encode_plain("\n".join(_texts(line.messages))))
        ids = self._cut([*asked, *tokenizer.encode_plain(line.answer)])
        if not images:
            return Prompt(ids)
        patches = [self._builder.image_processor.patches(image) for image in images]
        digest = hashlib.sha256(b"".join(pixels.tobytes() for pixels, _ in patches)).hexdigest()
        grids = np.concatenate([grid.reshape(-1, 3) for _, grid in patches])
        return Prompt(ids, grids, self._pixels(line), digest)

    def _pixels(self, line: _Line) -> Callable[[], Floats]:
        def load() -> Floats:
            images = self._builder.scaled([load() for load in line.images])
            return np.concatenate([self._builder.image_processor.patches(image)[0] for image in images])

        return load

    def _cut(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """As many ids as are used, int64."""
        if len(ids) < 2:
            raise UsageError(_WHAT, "prompt", "it has fewer than two tokens", "Write more")
        limit = self._config.text.max_position_embeddings
        media = (self._config.image_token_id, self._config.video_token_id)
        last = max((i for i, token in enumerate(ids) if token in media), default=0)
        if last >= limit:
            raise UsageError(_WHAT, "images", f"they take more than the context of {limit} tokens", "Use smaller ones")
        return np.array(ids[: min(limit, max(LONGEST, last + 1))], np.int64)


def _own_lines() -> Iterator[_Line]:
    text = (files("exaone_export.calibration") / "prompts.jsonl").read_text("utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        raw = json.loads(line)
        page = raw.pop("page", None)
        images = () if page is None else (_drawn(page),)
        yield _parse(raw, f"prompts.jsonl:{number}", images)


def _drawn(page: Mapping[str, Any]) -> Loader:
    return lambda: draw_page(**page)


def _file_lines(path: Path) -> Iterator[_Line]:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(_WHAT, path.name, f"it is larger than {_LARGEST_FILE >> 20} MiB", "Use fewer prompts")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as reason:
        why = reason.strerror or "it cannot be read"
        raise UsageError(_WHAT, str(path), why, "Give a file with one JSON object on each line") from None
    except UnicodeDecodeError as reason:
        raise UsageError(_WHAT, path.name, f"not UTF-8 at byte {reason.start}", "Save it as UTF-8") from None
    if not any(line.strip() for line in lines):
        raise UsageError(_WHAT, path.name, "it has no lines", _FORMAT)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        raw = parse_json_object(line, where, UsageError, _WHAT)
        yield _parse(raw, where, _files(raw, where, path.parent))


def _files(raw: Mapping[str, Any], where: str, folder: Path) -> tuple[Loader, ...]:
    """What loads a line's images."""
    images = raw.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise UsageError(_WHAT, where, "images is no list of paths", _FORMAT)
    paths = [folder / image for image in images]
    return tuple((lambda path=path: load_image(path)) for path in paths)


def _parse(raw: Mapping[str, Any], where: str, images: tuple[Loader, ...]) -> _Line:
    unknown = [key for key in raw if key not in _KEYS]
    if unknown:
        raise UsageError(_WHAT, where, f"unknown key {unknown[0][:40]!r}", f"Known keys: {', '.join(_KEYS)}")
    text, messages = raw.get("text"), raw.get("messages")
    if (text is None) == (messages is None):
        raise UsageError(_WHAT, where, "it needs either a text or messages", _FORMAT)
    if messages is None:
        if not isinstance(text, str) or images:
            raise UsageError(_WHAT, where, "its text is no string, or has images", _FORMAT)
        return _Line(where, text)
    try:
        checked = check_messages(messages)
    except UsageError as reason:
        raise _at(where, reason) from None
    wanted = count_media(checked, "image")
    if wanted != len(images) or count_media(checked, "video"):
        why = f"its messages have {wanted} images, {len(images)} are given"
        if count_media(checked, "video"):
            why = "videos are not supported"
        raise UsageError(_WHAT, where, why, 'Put {"type": "image"} into a message for each of its images')
    answer, last = "", checked[-1]
    if last["role"] == "assistant" and isinstance(last["content"], str) and not last.get("tool_calls"):
        answer, checked = last["content"], checked[:-1]
    return _Line(where, None, checked, answer, images)


def _at(where: str, reason: ExaoneError) -> UsageError:
    """The same, saying in which line it is."""
    return UsageError(_WHAT, where, f"{reason.where}: {reason.why}", reason.remedy)


def _has_template(folder: Path) -> Iterator[bool]:
    yield (folder / "chat_template.jinja").exists()
    path = folder / "tokenizer_config.json"
    yield path.exists() and isinstance(read_json_object(path).get("chat_template"), str)


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The texts of messages for a model without a template."""
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content if "text" in part)
