"""Conversations: building them from a prompt and images, and checking them.

A message is a dict as transformers and OpenAI-compatible servers have it: ``role`` is system, user, assistant or
tool; ``content`` is a string, or a list of ``{"type": "text", "text": ...}``, ``{"type": "image"}`` and ``{"type":
"video"}``. An assistant turn may have ``tool_calls``, as OpenAI's API gives them or as a `Result` has them; the content
of a tool turn may be any JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from model.errors import UsageError
from runtime.tokenizer import check_encodable

Message = dict[str, Any]

ROLES: Final = ("system", "user", "assistant", "tool")
_MEDIA: Final = ("image", "video")
_MAX_DEPTH: Final = 64
_ADDRESS: Final = re.compile(r"(?:[a-z][a-z0-9+.-]+://|data:|file:)", re.IGNORECASE)
# Names under which clients pass a turn's reasoning; templates read the first.
_REASONING_NAMES: Final = ("reasoning_content", "reasoning", "thinking")


def build_messages(
    prompt: str | None = None,
    images: int = 0,
    videos: int = 0,
    system: str | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    media: Sequence[str] | None = None,
) -> list[Message]:
    """A conversation from what a command line gives: the prompt becomes one user turn, its images and videos first.

    Args:
        prompt: the user's text; may be None if there are images, videos or a history.
        images: number of images that come before the text.
        videos: number of videos that come after the images, before the text.
        system: text of a system turn at the very beginning.
        history: turns before this one.
        media: "image" and "video" in their order, in place of `images` and `videos`.

    Raises:
        UsageError: the prompt is blank, there is nothing to answer, or `history` has a fault.
    """
    messages: list[Mapping[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages += history
    kinds = ["image"] * images + ["video"] * videos if media is None else media
    parts: list[Message] = [{"type": kind} for kind in kinds]
    if prompt is not None:
        if not prompt.strip():
            raise UsageError("cannot use prompt", "prompt", "it is empty", "Write what the model should do")
        content = [*parts, {"type": "text", "text": prompt}] if parts else prompt
        messages.append({"role": "user", "content": content})
    elif parts:
        messages.append({"role": "user", "content": parts})
    return check_messages(messages)


def check_messages(messages: object) -> list[Message]:
    """A clean copy of a conversation: plain JSON types, ``content`` always present, parts of known kinds only.

    Raises:
        UsageError: names the message and what is wrong with it.
    """
    clean = [_check_message(message, f"messages[{index}]") for index, message in enumerate(check_list(messages))]
    if not any(message["role"] == "user" for message in clean):
        raise _refusal("messages", "there is no user turn", "Add a prompt")
    return clean


def check_list(messages: object) -> Sequence[object]:
    """What may be turns. Raises UsageError for what is no list."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise _refusal("messages", "they are not a list", "Pass a list of objects with role and content")
    return messages


def check_tools(tools: object) -> list[Message] | None:
    """A clean copy of tool descriptions; None for none.

    Raises:
        UsageError: they are not a list of JSON objects.
    """
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise _refusal("tools", "they are not a list")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise _refusal(f"tools[{index}]", "it is not an object")
    return [_plain(tool, f"tools[{index}]") for index, tool in enumerate(tools)] or None


def take_media(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any] = (), videos: Sequence[Any] = ()
) -> tuple[list[Message], list[Any], list[Any]]:
    """Moves images and videos out of a conversation that names them itself: ``{"type": "video", "video": PATH}``.

    Paths are meant for the local user's own files. Messages of somebody else's go through `check_messages`, which drops
    them.

    Args:
        messages: of any form; faults that have nothing to do with images are left to `check_messages`.
        images, videos: for the parts that name none, in order.

    Returns:
        Messages whose parts name nothing, and all images and all videos in the order of their parts.

    Raises:
        UsageError: a part names what is no local path.
    """
    waiting = {"image": list(images), "video": list(videos)}
    found: dict[str, list[Any]] = {"image": [], "video": []}
    clean: list[Any] = []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for place, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in _MEDIA:
                continue
            own = _own_medium(part, kind, f"messages[{index}].content[{place}]")
            if own is not None:
                found[kind].append(own)
            elif waiting[kind]:
                found[kind].append(waiting[kind].pop(0))
        if isinstance(content, list):
            message = {**message, "content": [_without_medium(part) for part in content]}
        clean.append(message)
    return clean, found["image"] + waiting["image"], found["video"] + waiting["video"]


def _own_medium(part: Mapping[str, Any], kind: str, where: str) -> Any:
    names = [name for name in (kind, "path", "url") if part.get(name) is not None]
    if not names:
        return None
    own = part[names[0]]
    if names[0] == "url" or (isinstance(own, str) and _ADDRESS.match(own)):
        raise _refusal(f"{where}.{names[0]}", "it is an address", "Give the path of a local file")
    if isinstance(own, str) and not own:
        raise _refusal(f"{where}.{names[0]}", "it is empty", "Give the path of a local file")
    if isinstance(own, bool | int | float | Mapping):
        raise _refusal(f"{where}.{names[0]}", f"it is of type {type(own).__name__}", "Give the path of a local file")
    return own


def _without_medium(part: Any) -> Any:
    return {"type": part["type"]} if isinstance(part, Mapping) and part.get("type") in _MEDIA else part


def count_media(messages: Sequence[Mapping[str, Any]], kind: str) -> int:
    """How many parts of `kind` ("image" or "video") checked messages have."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return sum(part["type"] == kind for content in contents for part in content)


def user_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of the user turns of checked messages, in order."""
    texts: list[str] = []
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            texts += [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
    return texts


def _refusal(where: str, why: str, remedy: str = "") -> UsageError:
    return UsageError("cannot use messages", where, why, remedy)


def _check_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise _refusal(where, "it is not an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        shown = "missing" if "role" not in message else repr(role)[:40]
        raise _refusal(f"{where}.role", f"it is {shown}", f"Use one of {', '.join(ROLES)}")
    clean = {_key(key, where): _plain(value, f"{where}.{key}") for key, value in message.items() if key != "content"}
    clean["content"] = _check_content(message, where)
    if clean.get("tool_calls") is not None:
        clean["tool_calls"] = _check_calls(clean["tool_calls"], f"{where}.tool_calls")
    reasoning = next((clean[name] for name in _REASONING_NAMES if clean.get(name) is not None), None)
    if reasoning is not None:
        clean["reasoning_content"] = reasoning
    return clean


def _check_content(message: Mapping[str, Any], where: str) -> str | list[Message]:
    content = message.get("content")
    where = f"{where}.content"
    if message["role"] == "tool" and isinstance(content, Mapping | bool | int | float):
        return json.dumps(_plain(content, where), ensure_ascii=False)  # what a function returned
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return ""  # as OpenAI's API has it for a turn of calls alone
    if isinstance(content, str):
        check_encodable(content, where)
        blank = not content.strip()
        parts: str | list[Message] = content
    elif isinstance(content, list):
        parts = [_check_part(part, f"{where}[{index}]") for index, part in enumerate(content)]
        blank = all(part["type"] == "text" and not part["text"].strip() for part in parts)
    else:
        shown = "missing" if "content" not in message else f"of type {type(content).__name__}"
        raise _refusal(where, f"it is {shown}", "Use a string, or a list of text, image and video parts")
    if blank and message["role"] == "user":
        raise _refusal(where, "it is empty", "Write what the model should do")
    return parts


def _check_calls(calls: object, where: str) -> list[Message]:
    """Calls in the one form that templates read: ``{"type": "function", "function": {"name", "arguments"}}``.

    OpenAI's API has arguments as JSON text; templates would write that text in quotes.
    """
    if not isinstance(calls, list):
        raise _refusal(where, "they are not a list")
    clean = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _refusal(f"{where}[{index}]", "it has no name", 'Use {"name": ..., "arguments": {...}}')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{where}[{index}].arguments")
        outer = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
        inner = dict(function) if function is not call else {"name": call["name"]}
        clean.append({"type": "function"} | outer | {"function": inner | {"arguments": arguments}})
    return clean


def _parsed(text: str, where: str) -> Any:
    """The object that `text` is as JSON; the text itself where it is none, as tools may take a bare text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return _plain(value, where) if isinstance(value, dict) else text


def _check_part(part: object, where: str) -> Message:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind in _MEDIA:
        return {"type": kind}  # the pixels travel apart; templates only look at the kind
    if not isinstance(part, Mapping) or kind != "text":
        raise _refusal(where, "it is not a text, image or video part", 'Use {"type": "text", "text": ...}')
    text = part.get("text")
    if not isinstance(text, str):
        raise _refusal(f"{where}.text", "it is not a string")
    check_encodable(text, f"{where}.text")
    return {"type": "text", "text": text}


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise _refusal(where, f"the key {key!r} is not a string")
    check_encodable(key, where)
    return key


def _plain(value: object, where: str, depth: int = 0) -> Any:
    """A copy in plain JSON types; refuses anything else, and what is nested too deep to print."""
    if depth > _MAX_DEPTH:
        raise _refusal(where, f"it is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        check_encodable(value, where)
        return str(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise _refusal(where, f"{type(value).__name__} {str(value)[:20]} is not JSON")
