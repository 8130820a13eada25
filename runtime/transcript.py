"""What a generation gives back, and how a row's tokens become it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runtime.detokenize import Detokenizer, StopStrings
from runtime.logprobs import TokenLogprob
from runtime.reasoning import Piece, ReasoningSplitter, split_reasoning
from runtime.speculation import Speculation
from runtime.tokenizer import Tokenizer
from runtime.tools import CallHolder, Calls, find_tool_calls

ChunkKind = Literal["text", "reasoning"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class Timings:
    """Seconds. `load_s`: opening the graphs, in this call or an earlier one; the rest is of this call.

    `prefill_s` is up to the first token, `decode_s` from there to the row's last; in a batch, rows share both.
    `decode_tokens_per_s` is the row's own rate, its first token not counted. `speculation` says how drafting went where
    options.speculate asks for it.
    """

    load_s: float
    vision_s: float
    prefill_s: float
    decode_s: float
    decode_tokens_per_s: float
    speculation: Speculation | None = None


@dataclass(frozen=True)
class Result:
    r"""One finished answer.

    Attributes:
        text: the answer, without reasoning and tool calls.
        reasoning: what stood in the think block, "" if there was none.
        tool_calls: each ``{"name", "arguments"}``; as ``tool_calls`` of an assistant turn they can be given back.
        token_ids: all generated ids, the end-of-turn id included when it was produced.
        prompt_tokens: length of the prompt, images included.
        image_tokens: how many of those stand for images.
        finish_reason: "stop" (end of turn, stop string, or a constraint that leaves nothing to say), "tool_calls" (the
            same, with calls), "length", or "cancelled" (by the caller; see `runtime.scheduler`).
        ep: execution provider that ran it.
        timings: see `Timings`.
        boxed: what stands in the last ``\boxed{}`` of `text`, None without one.
        logprobs: one for each of `token_ids` where options.logprobs asks for them, else None.
        warnings: what a caller should know: a tool call that is not JSON, an answer cut off before it matched.
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
    boxed: str | None = None
    logprobs: list[TokenLogprob] | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as ``generate --json`` prints them; `speculation` only where something was drafted."""
        found = dataclasses.asdict(self)
        if self.timings.speculation is None:
            del found["timings"]["speculation"]
        return found


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer.

    Attributes:
        text: complete characters; may be empty in the last chunk. Tool calls are not given out, but in the result.
        kind: "reasoning" inside the think block, else "text".
        token_ids: ids generated since the chunk before.
        result: the whole answer in the last chunk, else None.
        logprobs: of `token_ids`, where options.logprobs asks for them, else None.
    """

    text: str
    kind: ChunkKind
    token_ids: tuple[int, ...] = ()
    result: Result | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

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
    logprob: TokenLogprob | None = None


def chunks(events: Iterable[Event]) -> Iterator[Chunk]:
    """One row's events as chunks: one for each piece of text, and a last one with the result."""
    pending: tuple[int, ...] = ()
    told: tuple[TokenLogprob, ...] | None = None
    for event in events:
        pending += (event.token_id,)
        if event.logprob is not None:
            told = (*(told or ()), event.logprob)
        for kind, text in event.pieces:
            yield Chunk(text, "reasoning" if kind == "reasoning" else "text", pending, None, told)
            pending, told = (), None if told is None else ()
        if event.result is not None:
            yield Chunk("", "text", pending, event.result, told)


class Transcript:
    """Turns one row's tokens into text as they come.

    Args:
        tokenizer: the bundle's; None gives no text.
        stop: stop strings.
        thinking: whether the prompt ends inside an open think block.
        answer_only: the text has no reasoning but that of `thinking`: tags in it are the answer's.
        calls: whether to look for tool calls.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Sequence[str] = (),
        thinking: bool = False,
        answer_only: bool = False,
        calls: bool = True,
    ) -> None:
        self.token_ids: list[int] = []
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopStrings(stop)
        self._splitter = None if answer_only and not thinking else ReasoningSplitter(thinking)
        self._thinking = thinking
        self._calls = CallHolder() if calls else None
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
        pieces = self._take(self._stop.finish())
        pieces += self._certain([] if self._splitter is None else self._splitter.finish())
        return pieces + (_content(self._calls.finish()) if self._calls else [])

    def _take(self, text: str) -> list[Piece]:
        self._text += text
        if not text:
            return []
        return self._certain(_content(text) if self._splitter is None else self._splitter.feed(text))

    def _certain(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces without what may be a tool call."""
        if self._calls is None:
            return pieces
        certain: list[Piece] = []
        for kind, text in pieces:
            certain += [(kind, text)] if kind == "reasoning" else _content(self._calls.feed(text))
        return certain

    def parts(self) -> tuple[str, Calls]:
        """After `finish`: the reasoning, and the answer with its tool calls."""
        reasoning, content = "", self._text
        if self._splitter is not None:
            reasoning, content = split_reasoning(self._text, self._thinking)
        return reasoning, find_tool_calls(content) if self._calls else Calls(content)


def _content(text: str) -> list[Piece]:
    return [("content", text)] if text else []
