"""What a generation gives back, and how a row's tokens become it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runtime.decode import FinishReason
from runtime.detokenize import Detokenizer, StopStrings
from runtime.reasoning import Piece, ReasoningSplitter, parse_tool_calls, split_reasoning
from runtime.tokenizer import Tokenizer

ChunkKind = Literal["text", "reasoning"]


@dataclass(frozen=True)
class Timings:
    """Seconds. `load_s`: opening the graphs, in this call or an earlier one; the rest is of this call.

    `prefill_s` is up to the first token, `decode_s` from there to the row's last; in a batch, rows share both.
    `decode_tokens_per_s` is the row's own rate, its first token not counted.
    """

    load_s: float
    vision_s: float
    prefill_s: float
    decode_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Result:
    """One finished answer.

    Attributes:
        text: the answer, without reasoning and tool calls.
        reasoning: what stood in the think block, "" if there was none.
        tool_calls: each ``{"name", "arguments"}``.
        token_ids: all generated ids, the end-of-turn id included when it was produced.
        prompt_tokens: length of the prompt, images included.
        image_tokens: how many of those stand for images.
        finish_reason: "stop" (end of turn or stop string) or "length".
        ep: execution provider that ran it.
        timings: see `Timings`.
    """

    text: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    token_ids: list[int]
    prompt_tokens: int
    image_tokens: int
    finish_reason: FinishReason
    ep: str
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as ``generate --json`` prints them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer.

    Attributes:
        text: complete characters; may be empty in the last chunk.
        kind: "reasoning" inside the think block, else "text" (tool calls are given out as they are written).
        token_ids: ids generated since the chunk before.
        result: the whole answer in the last chunk, else None.
    """

    text: str
    kind: ChunkKind
    token_ids: tuple[int, ...] = ()
    result: Result | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the last chunk."""
        return self.result is not None


@dataclass(frozen=True)
class Event:
    """A new token of a row, the pieces of text it made certain, and with the row's last token the result."""

    row: int
    token_id: int
    pieces: list[Piece]
    result: Result | None


def chunks(events: Iterable[Event]) -> Iterator[Chunk]:
    """One row's events as chunks: one for each piece of text, and a last one with the result."""
    pending: tuple[int, ...] = ()
    for event in events:
        pending += (event.token_id,)
        for kind, text in event.pieces:
            yield Chunk(text, "reasoning" if kind == "reasoning" else "text", pending)
            pending = ()
        if event.result is not None:
            yield Chunk("", "text", pending, event.result)


class Transcript:
    """Turns one row's tokens into text as they come.

    Args:
        tokenizer: the bundle's; None gives no text.
        stop: stop strings.
        thinking: whether the prompt ends inside an open think block.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = (), thinking: bool = False) -> None:
        self.token_ids: list[int] = []
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopStrings(stop)
        self._splitter = ReasoningSplitter(thinking)
        self._thinking = thinking
        self._text = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.stopped

    def feed(self, token_id: int) -> list[Piece]:
        """Adds a token; returns the pieces of text that are now certain."""
        self.token_ids.append(token_id)
        return [] if self._detokenizer is None else self._take(self._stop.feed(self._detokenizer.feed(token_id)))

    def finish(self) -> list[Piece]:
        """Ends the row; returns what was held back, but for the bytes of a character that was never completed."""
        return self._take(self._stop.finish()) + self._splitter.finish()

    def _take(self, text: str) -> list[Piece]:
        self._text += text
        return self._splitter.feed(text) if text else []

    def parts(self) -> tuple[str, str, list[dict[str, Any]]]:
        """After `finish`: text, reasoning and tool calls."""
        reasoning, content = split_reasoning(self._text, self._thinking)
        text, calls = parse_tool_calls(content)
        return text, reasoning, calls
