"""Splits what a model wrote into reasoning and content, tool calls included (see `runtime.tools`).

The rules are those under which EXAONE 4.5 is served elsewhere (reasoning parser "qwen3"), with one change: a JSON tool
call inside an unclosed ``<think>`` ends the thinking, so that the call is not lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"
CALL_OPEN: Final = "<tool_call>"
CALL_CLOSE: Final = "</tool_call>"
TAGS: Final = (THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE)

Kind = Literal["reasoning", "content"]
Piece = tuple[Kind, str]


def opens_think(prompt: str) -> bool:
    """Whether a rendered prompt ends inside an open think block, so that the model's first words are reasoning."""
    return prompt.rstrip().endswith(THINK_OPEN)


def split_reasoning(text: str, thinking: bool) -> tuple[str, str]:
    """Splits a finished text into (reasoning, content).

    A leading ``<think>`` is dropped; what comes before the first ``</think>`` is reasoning, what comes after is
    content. Without ``</think>`` all is reasoning up to a ``<tool_call>`` if a think block is open, else all is
    content. Newlines next to the tags belong to the template's layout and are dropped.

    Args:
        text: the generated text, without special tokens.
        thinking: `opens_think` of the prompt.
    """
    bare = text.lstrip()
    opened = bare.startswith(THINK_OPEN)
    if opened:
        text = bare[len(THINK_OPEN) :]
    before, tag, after = text.partition(THINK_CLOSE)
    if tag:
        return before.strip("\n"), after.lstrip("\n")
    if not (thinking or opened):
        return "", text
    before, tag, after = text.partition(CALL_OPEN)
    return before.strip("\n"), tag + after


class ReasoningSplitter:
    """`split_reasoning` for a stream: tags may be cut anywhere.

    The joined pieces equal `split_reasoning` of the whole, except for a ``</think>`` that no think block opened: what
    came before it has already been given out as content and stays so.

    Args:
        thinking: `opens_think` of the prompt.
    """

    def __init__(self, thinking: bool) -> None:
        self._state: Literal["start", "reasoning", "content"] = "start"
        self._thinking = thinking
        self._held = ""
        self._strip_newlines = False

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are now certain, in order."""
        self._held += text
        if self._state == "start" and not self._decide_start():
            return []
        pieces: list[Piece] = []
        if self._state == "reasoning":
            pieces += self._take_reasoning()
        if self._state == "content":
            pieces += self._take_content()
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back. A tool call in an unclosed think block is content."""
        rest, self._held = self._held, ""
        if self._state == "start":
            self._state = "reasoning" if self._thinking else "content"
            self._strip_newlines = self._thinking
        if self._state == "content":
            return _pieces("content", rest)
        reasoning, tag, after = rest.partition(CALL_OPEN)
        self._state = "content"
        if self._strip_newlines:
            reasoning = reasoning.lstrip("\n")
        return _pieces("reasoning", reasoning.rstrip("\n")) + _pieces("content", tag + after)

    def _decide_start(self) -> bool:
        """Looks for a leading <think>; False while it may still come."""
        bare = self._held.lstrip()
        if bare.startswith(THINK_OPEN):
            self._held = bare[len(THINK_OPEN) :]
            self._state = "reasoning"
        elif THINK_OPEN.startswith(bare):
            return False
        else:
            self._state = "reasoning" if self._thinking else "content"
        self._strip_newlines = self._state == "reasoning"
        return True

    def _take_reasoning(self) -> list[Piece]:
        if self._strip_newlines:
            self._held = self._held.lstrip("\n")
            self._strip_newlines = not self._held
        before, tag, after = self._held.partition(THINK_CLOSE)
        if tag:
            self._state, self._held, self._strip_newlines = "content", after, True
            return _pieces("reasoning", before.rstrip("\n"))
        # A tool call waits for </think>: if that comes, the model only thought about calling.
        call = before.find(CALL_OPEN)
        keep = call if call >= 0 else len(before) - partial_tag(before, (THINK_CLOSE, CALL_OPEN))
        sure = before[:keep].rstrip("\n")
        self._held = before[len(sure) :]
        return _pieces("reasoning", sure)

    def _take_content(self) -> list[Piece]:
        if self._strip_newlines:
            self._held = self._held.lstrip("\n")
            self._strip_newlines = not self._held
        text, self._held = self._held, ""
        return _pieces("content", text)


def _pieces(kind: Kind, text: str) -> list[Piece]:
    return [(kind, text)] if text else []


def partial_tag(text: str, tags: Sequence[str]) -> int:
    """How many characters at the end of `text` may begin one of `tags`."""
    for length in range(min(max(map(len, tags)) - 1, len(text)), 0, -1):
        end = text[-length:]
        if any(tag.startswith(end) for tag in tags):
            return length
    return 0
