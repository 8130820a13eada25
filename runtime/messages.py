"""Conversations: building them from a prompt and images, and checking them.

A message is a dict as transformers and OpenAI-compatible servers have it: ``role`` is system, user, assistant or
tool; ``content`` is a string, or a list of ``{"type": "text", "text": ...}``, ``{"type": "image"}`` and ``{"type":
"video"}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from model.errors import UsageError
from runtime.tokenizer import check_encodable

Message = dict[str, Any]

ROLES: Final = ("system", "user", "assistant", "tool")
_MEDIA: Final = ("image", "video")
_MAX_DEPTH: Final = 64
# Names under which clients pass a turn's reasoning; templates read the first.
_REASONING_NAMES: Final = ("reasoning_content", "reasoning", "thinking")


def build_messages(
    prompt: str | None = None,
    images: int = 0,
    videos: int = 0,
    system: str | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> list[Message]:
    """A conversation from what a command line gives: the prompt becomes one user turn, its images and videos first.

    Args:
        prompt: the user's text; may be None if there are images, videos or a history.
        images: number of images that come before the text.
        videos: number of videos that come after the images, before the text.
        system: text of a system turn at the very beginning.
        history: turns before this one.

    Raises:
        UsageError: the prompt is blank, there is nothing to answer, or `history` has a fault.
    """
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages += [dict(message) for message in history]
    parts: list[Message] = [{"type": "image"}] * images + [{"type": "video"}] * videos
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
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise _refusal("messages", "they are not a list", "Pass a list of objects with role and content")
    clean = [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if not any(message["role"] == "user" for message in clean):
        raise _refusal("messages", "there is no user turn", "Add a prompt")
    return clean


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
    reasoning = next((clean[name] for name in _REASONING_NAMES if clean.get(name) is not None), None)
    if reasoning is not None:
        clean["reasoning_content"] = reasoning
    return clean


def _check_content(message: Mapping[str, Any], where: str) -> str | list[Message]:
    content = message.get("content")
    where = f"{where}.content"
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
