"""Answers held to a JSON schema, a regular expression or a grammar: which tokens may come next.

llguidance does the parsing; it is optional (extra "constrained") and imported when a constraint is first asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from model.errors import EnvironmentFault, ResourceError, UsageError
from runtime.options import GenerationOptions
from runtime.reasoning import CALL_OPEN, THINK_CLOSE
from runtime.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]
Ids = Sequence[int] | npt.NDArray[np.int64]

_WHAT: Final = "cannot constrain the answer"
_NEVER: Final = np.float32(-np.inf)
_MOST_NEWLINES: Final = 2  # between </think> and the answer, as the chat templates write them
# JSON may be laid out, but a model that would rather write white space than go on comes to an end.
_SCHEMA_LAYOUT: Final = {"whitespace_pattern": r"(\n[ \t]{0,40}| {1,2})"}


class Vocabulary:
    """What constraints need to know of a tokenizer; made once for a bundle.

    Args:
        tokenizer: the bundle's.
        size: logits of the model; ids past the tokenizer's own are never allowed.
        eos_ids: ids that end a turn.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.size = size
        self.eos_ids = sorted(token for token in eos_ids if token < size)
        if not self.eos_ids:
            raise UsageError(_WHAT, "config.json", "the model has no end-of-turn token", "Generate without constraint")
        self.token_bytes: Callable[[int], bytes] = tokenizer.token_bytes
        call = tokenizer.token_to_id(CALL_OPEN)
        self.not_while_thinking = np.array(self.eos_ids + ([] if call is None else [call]), np.int64)
        spelled = [tokenizer.token_bytes(token) for token in range(size)]
        newlines = {token: len(text) for token, text in enumerate(spelled) if text and text.strip(b"\n") == b""}
        self.newlines = {token: count for token, count in newlines.items() if count <= _MOST_NEWLINES}
        special = {*tokenizer.control_ids, *tokenizer.hidden_ids, *self.eos_ids}
        words = _Words(spelled, sorted(special & set(range(size))), self.eos_ids[0], tokenizer.encode_plain)
        self.parser = _llguidance().LLTokenizer(words, size, self.eos_ids)


class _Words:
    """The vocabulary in the form llguidance asks for; control tokens are none of the text's."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class Constraints:
    """Makes the constraints of a bundle's answers; usable from several threads.

    Args:
        vocabulary: makes the vocabulary, when it is first needed.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._make = vocabulary
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._last: tuple[tuple[str, str], Any] | None = None

    def rows(self, options: GenerationOptions, thinking: Sequence[bool]) -> list[Constraint | None]:
        """A constraint for each row, None where the options ask for none.

        Args:
            options: whose json_schema, regex or grammar holds.
            thinking: for each row, whether its prompt ends inside an open think block.

        Raises:
            EnvironmentFault: llguidance is not installed.
            UsageError: the schema, expression or grammar has a fault or cannot be held.
        """
        asked = _asked(options)
        if asked is None:
            return [None] * len(thinking)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._make()
            if self._last is None or self._last[0] != asked:
                self._last = asked, _compiled(self._vocabulary, *asked)
            vocabulary, compiled = self._vocabulary, self._last[1]
            return [Constraint(compiled.deep_copy(), vocabulary, open_think) for open_think in thinking]


class Constraint:
    """What one row may still say. Reasoning is free up to ``</think>``, but must not end the turn or call a tool.

    Args:
        matcher: llguidance's, at the grammar's beginning.
        vocabulary: the bundle's.
        thinking: whether the row begins inside an open think block.
    """

    def __init__(self, matcher: Any, vocabulary: Vocabulary, thinking: bool) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._thinking = thinking
        self._restart()

    def _restart(self) -> None:
        self._ids: list[int] = []
        self._tail = b""  # of the reasoning, as much as may begin the closing tag
        self._gap: int | None = None if self._thinking else _MOST_NEWLINES
        self._start: int | None = None if self._thinking else 0  # of the grammar, among the ids

    @property
    def complete(self) -> bool:
        """Whether the answer matches and nothing can be added to it."""
        return self._start is not None and bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def matches(self) -> bool:
        """Whether the answer as it stands is one that the grammar allows."""
        return self._start is not None and bool(self._matcher.is_accepting())

    def restrict(self, logits: Logits) -> Logits:
        """`logits` [vocab] with -inf for every token that may not come next; EOS only where the answer `matches`."""
        if self._start is None and self._gap is None:
            free = logits.copy()
            free[self._vocabulary.not_while_thinking] = _NEVER
            return free
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        allowed = np.unpackbits(bits, count=logits.size, bitorder="little").view(np.bool_)
        if self._start is None:
            for token, count in self._vocabulary.newlines.items():
                allowed[token] |= count <= (self._gap or 0)
        return np.where(allowed, logits, _NEVER)

    def follow(self, ids: Ids) -> None:
        """Makes the row's generated ids known: those of the last call and more, or others where drafts were wrong."""
        told: list[int] = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if self._ids != told[: len(self._ids)]:
            pairs = enumerate(zip(self._ids, told, strict=False))
            self._go_back(next((i for i, (known, new) in pairs if known != new), min(len(self._ids), len(told))))
        for token in told[len(self._ids) :]:
            self.take(token)

    def take(self, token: int) -> None:
        """Adds one token. One that ends the turn changes nothing."""
        self._ids.append(token)
        spelled = self._vocabulary.token_bytes(token)
        if self._start is None and self._gap is None:
            self._tail = (self._tail + spelled)[-(len(THINK_CLOSE) + len(spelled)) :]
            if THINK_CLOSE.encode() in self._tail:
                self._gap = _MOST_NEWLINES
            return
        if self._start is None:
            count = self._vocabulary.newlines.get(token, _MOST_NEWLINES + 1)
            if self._gap is not None and count <= self._gap:
                self._gap -= count
                return
            self._start = len(self._ids) - 1
        if token not in self._vocabulary.eos_ids:
            self._matcher.consume_token(token)
            self._require_sound()

    def _go_back(self, length: int) -> None:
        """Forgets all ids but the first `length`."""
        again = self._ids[:length]
        if self._start is None or length < self._start or any(i in self._vocabulary.eos_ids for i in self._ids):
            self._matcher.reset()
            self._restart()
            for token in again:
                self.take(token)
            return
        self._matcher.rollback(len(self._ids) - length)
        self._ids = again

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            why = _first_line(self._matcher.get_error())
            raise ResourceError(_WHAT, "grammar", f"it cannot be followed any further: {why}", "Make it simpler")


def _asked(options: GenerationOptions) -> tuple[str, str] | None:
    for name in ("json_schema", "regex", "grammar"):
        text = getattr(options, name)
        if text is not None:
            return name, text
    return None


def _compiled(vocabulary: Vocabulary, kind: str, text: str) -> Any:
    """A matcher at the beginning of what `text` allows."""
    library = _llguidance()
    matchers = library.LLMatcher
    try:
        if kind == "json_schema":
            # llguidance takes options with objects alone; the schema `true` allows what `{}` does.
            source = matchers.grammar_from_json_schema(
                "{}" if text.strip() == "true" else text, overrides=_SCHEMA_LAYOUT
            )
        elif kind == "regex":
            source = matchers.grammar_from_regex(text)
        else:
            source = library.grammar_from("grammar", text)
    except (ValueError, RecursionError) as reason:
        raise _refusal(kind, str(reason)) from None
    failed, messages = matchers.validate_grammar_with_warnings(source, vocabulary.parser)
    if failed:
        raise _refusal(kind, messages[0])
    matcher = matchers(vocabulary.parser, source, log_level=0)
    if matcher.is_error():
        raise _refusal(kind, matcher.get_error())
    return matcher


def _refusal(kind: str, reason: str) -> UsageError:
    return UsageError(_WHAT, kind, _first_line(reason), "")


def _first_line(reason: str) -> str:
    """llguidance's messages point at places over several lines; the ones that say something, as one."""
    lines = [line.strip() for line in reason.splitlines()]
    parts = [line for line in lines if line and not set(line) <= set("^ ") and not line[0].isdigit()]
    return " ".join(parts or ["it has a fault"])[:240]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        remedy = "pip install 'exaone-export[constrained]'"
        raise EnvironmentFault(_WHAT, "llguidance", "it is not installed", remedy) from None
    return llguidance
