"""Tool calls in what a model wrote: JSON between ``<tool_call>`` tags, the format called "hermes".

A call is ``{"name": ..., "arguments": ...}``. One that is not makes all of them text, so that nothing a model wrote is
lost and no half of an answer is acted upon.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, NoReturn

from runtime.reasoning import CALL_CLOSE, CALL_OPEN, partial_tag

ToolCall = dict[str, Any]


@dataclass(frozen=True)
class Calls:
    """A content text taken apart.

    Attributes:
        text: what stands before the first call; the whole text if there is none, or a faulty one.
        calls: each ``{"name": str, "arguments": JSON}``.
        fault: why the calls could not be read, "" if they could.
    """

    text: str
    calls: list[ToolCall] = field(default_factory=list)
    fault: str = ""


def find_tool_calls(text: str) -> Calls:
    """Takes the tool calls out of a content text; never raises.

    The last call may lack its closing tag. What stands between and behind the calls is dropped, as vLLM's and SGLang's
    parsers do.
    """
    start = text.find(CALL_OPEN)
    if start < 0:
        return Calls(text)
    calls: list[ToolCall] = []
    place = start
    while place >= 0:
        try:
            call, place = _read_call(text, place + len(CALL_OPEN))
        except (ValueError, RecursionError) as reason:
            why = "it is nested too deep" if isinstance(reason, RecursionError) else str(reason).partition("\n")[0]
            return Calls(text, fault=f"tool call {len(calls) + 1} cannot be used: {why[:200]}")
        calls.append(call)
        place = text.find(CALL_OPEN, place)
    return Calls(text[:start], calls)


class CallHolder:
    """Keeps tool calls out of a stream of content: from the first ``<tool_call>`` on, text waits for the end.

    Whether it is a call or text is known only then; see `find_tool_calls`. The tag may be cut anywhere.
    """

    def __init__(self) -> None:
        self._held = ""
        self._calling = False

    def feed(self, text: str) -> str:
        """The text that is certainly before any call."""
        self._held += text
        if self._calling:
            return ""
        place = self._held.find(CALL_OPEN)
        self._calling = place >= 0
        keep = place if self._calling else len(self._held) - partial_tag(self._held, (CALL_OPEN,))
        sure, self._held = self._held[:keep], self._held[keep:]
        return sure

    def finish(self) -> str:
        """What was held back and is text after all."""
        rest, self._held = self._held, ""
        return find_tool_calls(rest).text


def _read_call(text: str, start: int) -> tuple[ToolCall, int]:
    """The call whose JSON begins at or behind `start`, and where the text goes on. Raises ValueError."""
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    value, end = _DECODER.raw_decode(text, start)
    rest = text[end:].lstrip()
    if rest and not rest.startswith(CALL_CLOSE):
        raise ValueError(f"there is more than JSON in it at character {end}")
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}")
    for name in ("name", "arguments"):
        if name not in value:
            raise ValueError(f"it has no {name}")
    if not isinstance(value["name"], str) or not value["name"]:
        raise ValueError("its name is not a text")
    call = {"name": value["name"], "arguments": value["arguments"]}
    json.dumps(call, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError: half of a surrogate pair
    return call, end


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
