"""Requests from the lines of a file that anybody may have written.

A line is ``{"id", "prompt" or "messages", "images", "videos", "system", "tools", "preset", ...}`` with options by their
names in `runtime.options.GenerationOptions`, or a line of OpenAI's batch files, ``{"custom_id", "body": {...}}``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from model.errors import UsageError, printable
from model.jsonfile import parse_json_object
from runtime.messages import build_messages, take_media
from runtime.options import GenerationOptions

LONGEST: Final = 16 << 20  # bytes of a line
_WHAT: Final = "cannot use line"
_BLOCK: Final = 1 << 20
_LONGEST_ID: Final = 512
_OPTIONS: Final = frozenset(field.name for field in dataclasses.fields(GenerationOptions))
_OWN: Final = frozenset({"id", "prompt", "messages", "images", "videos", "system", "tools", "preset"})
# Of OpenAI's body: names that are ours too, others with ours, and what changes nothing here.
_SAME: Final = frozenset({"messages", "temperature", "top_p", "presence_penalty", "seed", "stop", "tools"})
_RENAMED: Final = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_IGNORED: Final = frozenset({"model", "user", "metadata", "store"})
_WHOLE: Final[dict[str, tuple[Any, ...]]] = {"n": (None, 1), "stream": (None, False)}
_FORMS: Final = ("json_schema", "regex", "grammar")


@dataclass(frozen=True)
class Ask:
    """What a line asks for.

    Attributes:
        messages: the conversation; its images and videos are apart.
        images, videos: paths, those that are relative with the file's folder before them.
        tools: descriptions of functions, None for none.
        preset: the line's own; None = the command's.
        options: of this line alone.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    videos: list[Any]
    tools: list[Any] | None
    preset: str | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Survey:
    """A file of requests as a whole: the sha256 of its bytes, and how many lines have something in them."""

    sha256: str
    requests: int


def survey(path: Path) -> Survey:
    """Looks through the file once. Raises UsageError if it is none, or cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError("cannot read input", path.name, "it is not an ordinary file", "Give a file of JSON lines")
        digest, count = hashlib.sha256(), 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        count = sum(1 for _ in lines(path))
    except OSError as reason:
        raise UsageError("cannot read input", path.name, reason.strerror or "unreadable", "Check its name") from None
    return Survey(digest.hexdigest(), count)


def lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number, from 1, and content of each line that is not blank; None for one that is longer than `LONGEST`."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > LONGEST:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_BLOCK)
                yield number, None
            elif line.strip():
                yield number, line


def parse(line: bytes | None, number: int) -> dict[str, Any]:
    """The line as one JSON object; OpenAI's form becomes ours.

    Raises:
        UsageError: it is not JSON, or not an object.
    """
    where = f"line {number}"
    if line is None:
        raise UsageError(_WHAT, where, f"it is longer than {LONGEST} bytes", "Give images by their paths")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise UsageError(_WHAT, where, f"it is not UTF-8 at byte {reason.start}") from None
    return parse_json_object(text, where, UsageError, _WHAT)


def id_of(raw: Mapping[str, Any], number: int) -> str | int:
    """The line's own id, or its number.

    Raises:
        UsageError: the id is neither text nor a whole number.
    """
    own = raw.get("custom_id") if "body" in raw else raw.get("id")
    if own is None:
        return number
    if isinstance(own, bool) or not isinstance(own, str | int):
        raise _refusal(number, "its id is neither text nor a whole number")
    if len(str(own)) > _LONGEST_ID:
        raise _refusal(number, f"its id is longer than {_LONGEST_ID} characters")
    return own


def ask_of(raw: Mapping[str, Any], number: int, folder: Path, system: str | None) -> Ask:
    """What a parsed line asks for.

    Args:
        raw: from `parse`.
        number: of the line.
        folder: where relative paths begin.
        system: the command's system text, for lines without their own.

    Raises:
        UsageError: a key is unknown or has a value that cannot be used.
    """
    plain = _from_openai(raw, number) if "body" in raw else dict(raw)
    unknown = sorted(plain.keys() - _OWN - _OPTIONS)
    if unknown:
        raise _refusal(number, f"the key {printable(unknown[0], 40)!r} is unknown")
    if (plain.get("prompt") is None) == (plain.get("messages") is None):
        raise _refusal(number, "it needs either a prompt or messages")
    given: dict[str, list[Any]] = {}
    for name in ("images", "videos", "tools"):
        value = plain.get(name)
        if value is not None and not isinstance(value, list):
            raise _refusal(number, f"{name} is not a list")
        given[name] = value or []
    for name in ("prompt", "system", "preset"):
        if not isinstance(plain.get(name), str | None):
            raise _refusal(number, f"{name} is not text")
    system = plain.get("system", system)
    if plain.get("prompt") is not None:
        images, videos = given["images"], given["videos"]
        messages = build_messages(plain["prompt"], len(images), len(videos), system)
    else:
        if not isinstance(plain["messages"], list):
            raise _refusal(number, "messages is not a list")
        clean, images, videos = take_media(plain["messages"], given["images"], given["videos"])
        messages = build_messages(None, system=system, history=_objects(clean, number))
    options = {name: value for name, value in plain.items() if name in _OPTIONS and value is not None}
    paths = [[_placed(medium, folder) for medium in media] for media in (images, videos)]
    return Ask(messages, paths[0], paths[1], given["tools"] or None, plain.get("preset"), options)


def merged(flags: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the command with those of a line, which go first; of two forms of an answer only the line's holds."""
    held = dict(flags)
    for names in (_FORMS, ("fps", "num_frames")):
        if any(name in own for name in names):
            held = {name: value for name, value in held.items() if name not in names}
    if "do_sample" not in own and "temperature" in own:
        held.pop("do_sample", None)
    return held | dict(own)


def _objects(messages: list[Any], number: int) -> list[Any]:
    if not all(isinstance(message, Mapping) for message in messages):
        raise _refusal(number, "a message is not an object with role and content")
    return messages


def _placed(medium: Any, folder: Path) -> Any:
    """A path from where the file is; frames of a video are several. What is no path at all is refused elsewhere."""
    if isinstance(medium, str):
        return str(folder / medium)
    return [_placed(part, folder) for part in medium] if isinstance(medium, list) else medium


def _from_openai(raw: Mapping[str, Any], number: int) -> dict[str, Any]:
    unknown = sorted(raw.keys() - {"custom_id", "method", "url", "body"})
    body = raw["body"]
    if unknown or not isinstance(body, Mapping):
        raise _refusal(number, f"the key {printable(unknown[0], 40)!r} is unknown" if unknown else "body is no object")
    found: dict[str, Any] = {}
    for key, value in body.items():
        name = str(key)
        if name in _SAME or name in _RENAMED:
            found[_RENAMED.get(name, name)] = value
        elif name == "response_format":
            found |= _form(value, number)
        elif name == "logprobs" and isinstance(value, bool | None):
            found |= {"logprobs": body.get("top_logprobs") or 0} if value else {}
        elif name in _WHOLE and not any(value is usual for usual in _WHOLE[name]):
            raise _refusal(number, f"{name} cannot be {printable(str(value), 20)}: a line has one whole answer")
        elif name not in _IGNORED and name not in (*_WHOLE, "top_logprobs"):
            raise _refusal(number, f"the key {printable(name, 40)!r} of body is unknown")
    return found


def _form(value: Any, number: int) -> dict[str, Any]:
    """OpenAI's response_format."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if value is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    schema = value.get("json_schema") if kind == "json_schema" else None
    if not isinstance(schema, Mapping) or not isinstance(schema.get("schema"), Mapping):
        raise _refusal(number, "response_format is neither text, json_object nor json_schema with a schema")
    return {"json_schema": schema["schema"]}


def _refusal(number: int, why: str) -> UsageError:
    return UsageError(_WHAT, f"line {number}", why)
