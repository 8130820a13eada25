"""Several tokens with one pass: some are drafted, and the decoder checks them all at once.

A draft is one certain token, not a distribution. So to accept it with its probability, and otherwise to draw from the
others (rejection sampling, Leviathan et al. 2023), is to draw as ever and to look whether the draft was drawn. Each
token is chosen from the logits after the text before it by the row's own sampler, with constraint, penalties and the
row's own stream of random numbers: the answer is that of plain decoding, token for token, as far as a pass over several
tokens gives the logits that passes over one give. What may differ are their last bits (kernels add in another order).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Final, Protocol

import numpy as np

from runtime import decode
from runtime.cache import KVCache
from runtime.decode import Ids, Logits, Token
from runtime.sampling import Sampler, likeliest
from runtime.speculation_drafts import DraftHead, Lookup
from runtime.speculation_pace import Pace
from runtime.speculation_said import LONGEST_MATCH, Passages, Said

MTP: Final = "mtp"
LOOKUP: Final = "lookup"
# Drafts in a pass where nobody says how many.
_MOST_DRAFTS: Final = 7
_HEAD_DRAFTS: Final = 4
# What came once before after a single token says little; a draft head knows better, but where long passages come again.
_LEAST_MATCH: Final = 2
_LEAST_BESIDE_HEAD: Final = LONGEST_MATCH
# After a look that was of no use, so many tokens go by before the next: a match that goes on is still there.
_LOOK_EVERY: Final = 4


class Rewinds(Protocol):
    """A `runtime.decode.Forward` of one row that can forget its last tokens."""

    @property
    def cache(self) -> KVCache:
        """Of the row."""

    def __call__(self, ids: Ids, lengths: Ids, keep: int = 1) -> Logits:
        """As `runtime.rows.RowPasses`."""

    def rewind(self, length: int) -> None:
        """Forgets what lies beyond `length` tokens."""


@dataclass(frozen=True)
class Speculation:
    """How drafting went.

    Attributes:
        passes: of the decoder, after the prompt's.
        drafted, accepted: tokens.
        by_source: the same two numbers for "mtp" and "lookup", as far as they were used.
        speed_up: estimate: seconds that passes over one token would have taken, over those of passes and drafts. None
            where no pass over one token was measured.
    """

    passes: int
    drafted: int
    accepted: int
    by_source: dict[str, tuple[int, int]]
    speed_up: float | None


@dataclass
class Drafts:
    """Proposes tokens for one answer, and keeps account.

    Args:
        pace: decides how many; None takes as many as allowed, of the first source that has any.
        least: drafts in a pass whether they pay or not, for a pace that decides.
        head: the draft head, None without one.
        lookup: whether to look for repetitions.
        most: drafts in a pass, None for what suits the source.
        said: earlier answers, to look into as well.

    Attributes:
        costs: what was measured.
    """

    pace: Pace | None = None
    head: DraftHead | None = None
    lookup: bool = True
    most: int | None = None
    said: Said | None = None
    least: int = 0
    costs: Pace = field(default_factory=Pace)
    _source: str = ""
    _kind: str = ""
    _passes: int = 0
    _tokens: int = 0
    _seconds: float = 0.0
    _unseen: int = 0  # tokens to go by before the next look
    _made: int = 0  # by the head, for the last pass
    _after: list[int] = field(default_factory=list)  # what surely follows them
    _counts: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.costs = self.pace or self.costs
        self._found = Lookup(None if self.said is None else self.said.tokens)
        self._passages = Passages(self.said) if self.lookup and self.head is not None else None

    def begin(self, prompt: Ids) -> None:
        """The prompt was read."""
        if self._passages is not None:
            self._passages.repeats(prompt)
        if self.head is not None and (self.pace is None or self.pace.likely(MTP) or self.least):
            self.head.read()

    def propose(self, text: Ids, room: int) -> list[int]:
        """Ids that may follow `text`, `room` at most.

        Args:
            text: prompt and answer.
            room: tokens that the next pass can take beside the last one.
        """
        started = time.perf_counter()
        drafts = self._propose(text, room) if room > 0 else []
        self._seconds += time.perf_counter() - started
        return drafts

    def _propose(self, text: Ids, room: int) -> list[int]:
        most = min(room, self.most or _MOST_DRAFTS)
        found, offers = self._look(text, most)
        if self.head is not None:
            offers.append((MTP, MTP, min(most, self.most or _HEAD_DRAFTS)))
        if not offers:
            return []
        place, count = (0, offers[0][2]) if self.pace is None else self.pace.best(offers, self.least)
        if self.pace is not None and not self._unseen and (not count or offers[place][0] != LOOKUP):
            self._unseen = _LOOK_EVERY
        if not count:
            return []
        self._source, self._kind = offers[place][:2]
        if self._source == LOOKUP or self.head is None:
            return found[:count]
        self._made, self._after, self._text = 0, [], text
        drafts = self.head.propose(int(text[-1]), count, self._worth, self._timed)
        if self.pace is not None and not self._after and drafts:
            self._after = self._follows(drafts)
        return drafts + self._after[: most - len(drafts)]

    def _follows(self, drafts: list[int]) -> list[int]:
        """What surely follows drafts."""
        if self.said is None or not self.lookup:
            return []
        last = drafts if len(drafts) > 1 else [int(self._text[-1]), *drafts]
        return self.said.follows(last, _MOST_DRAFTS)

    def _look(self, text: Ids, most: int) -> tuple[list[int], list[tuple[str, str, int]]]:
        """Tokens that were found, and the offer of them."""
        self._unseen = max(0, self._unseen - 1)
        if not self.lookup or self._unseen or (self._passages is not None and not self._passages.repeats(text)):
            return [], []
        found, matched = self._found.find(text, most)
        least = _LEAST_BESIDE_HEAD if self.head is not None else _LEAST_MATCH if self.pace is None else 1
        if not found or matched < least:
            return [], []
        return found, [(LOOKUP, f"{LOOKUP} {_group(matched)}", len(found))]

    def _worth(self, drafts: list[int]) -> float:
        """How likely drafts of the head must be for a further one; above 1 where what follows is known without it."""
        if self.pace is None:
            return 0.0
        self._after = self._follows(drafts)
        return 2.0 if self._after else self.pace.worth(MTP, len(drafts) + 1)

    def _timed(self, seconds: float) -> None:
        self.costs.drafted(MTP, seconds, further=self._made > 0)
        self._made += 1

    def passed(self, tokens: int, seconds: float) -> None:
        """A pass took so long."""
        self.costs.passed(tokens, seconds)
        self._passes += 1
        self._seconds += seconds

    def judged(self, drafted: int, accepted: int, chosen: int, whole: bool) -> None:
        """After a pass: drafts in it, how many were right, how many tokens it gave.

        `whole` says that the walk ended at a wrong draft or behind the last; one that was cut short tells nothing
        about the drafts it did not come to.
        """
        self._tokens += chosen if self._passes else 0
        if not drafted:
            return
        if self.head is not None:
            self.head.keep(accepted + 1)
        made = self._made if self._source == MTP else drafted
        self._count(self._source, made, min(accepted, made))
        if drafted > made:
            self._count(LOOKUP, drafted - made, max(0, accepted - made))
        if whole or accepted:
            self.costs.judged(self._kind, drafted if whole else accepted, accepted)
            if whole and self._source == MTP:
                self.costs.gained(MTP, chosen, drafted, made)

    def _count(self, source: str, drafted: int, accepted: int) -> None:
        counts = self._counts.setdefault(source, [0, 0])
        counts[0] += drafted
        counts[1] += accepted

    def account(self) -> Speculation:
        """How it went so far."""
        plain = self.costs.plain_seconds()
        known = plain is not None and self._seconds > 0 and self._passes > 0
        drafted, accepted = (sum(counts[place] for counts in self._counts.values()) for place in (0, 1))
        by_source = {source: (counts[0], counts[1]) for source, counts in sorted(self._counts.items())}
        speed_up = self._tokens * plain / self._seconds if known and plain else None
        return Speculation(self._passes, drafted, accepted, by_source, speed_up)


def _group(matched: int) -> int:
    """Matches of like length have one record."""
    return min(matched, LONGEST_MATCH) if matched < 3 else 3 if matched < 5 else 5 if matched < LONGEST_MATCH else 8


class _Answer:
    """Prompt and answer in one array, and what of it the cache holds."""

    def __init__(self, prompt: Sequence[int], limit: int) -> None:
        self.text = np.empty(len(prompt) + limit, np.int64)
        self.text[: len(prompt)] = prompt
        self.prompt = self.text[: len(prompt)]
        self.limit = limit
        self.count = 0
        self.held = len(prompt)

    @property
    def ids(self) -> Ids:
        """Those so far, the prompt's not among them."""
        return self.text[len(self.prompt) :][: self.count]

    @property
    def so_far(self) -> Ids:
        """Prompt and answer."""
        return self.text[: len(self.prompt) + self.count]

    def add(self, token: int) -> None:
        """Appends a token that the cache does not hold."""
        self.text[len(self.prompt) + self.count] = token
        self.count += 1


def generate(
    forward: Rewinds,
    prompt: Sequence[int],
    sampler: Sampler,
    limit: int,
    eos_ids: Collection[int],
    drafts: Drafts,
    ended: Collection[int] = (),
    read: Callable[[Ids], Logits] | None = None,
) -> Iterator[list[Token]]:
    """Generates one row; as `runtime.decode.generate`, with fewer passes.

    Args:
        forward: the model.
        prompt: token ids.
        sampler: see `runtime.choosing.Chooser`; it is called once for each token of the answer, in order.
        limit: most tokens to generate.
        eos_ids: ids that end the row.
        drafts: where drafts come from.
        ended: the caller puts 0 there to end the row; looked at after every token.
        read: reads the prompt [1, tokens] and gives logits [1, 1, vocab] at its end.

    Yields:
        Each token alone, as it becomes certain.

    Raises:
        NumericalError: logits are NaN or infinite.
    """
    answer = _Answer(prompt, limit)
    logits = (read or (lambda ids: decode.prefill(forward, [ids[0]])))(answer.prompt[None])[0]
    drafts.begin(answer.prompt)
    guess: list[int] = []
    while not (yield from _walk(forward, answer, sampler, (guess, logits), eos_ids, drafts, ended)):
        room = min(limit - answer.count - 1, forward.cache.forgettable(limit) - 1)
        guess = drafts.propose(answer.so_far, room)
        started = time.perf_counter()
        answer.held += 1 + len(guess)
        ids = np.array([[answer.ids[-1], *guess]], np.int64)
        logits = forward(ids, np.array([answer.held], np.int64), keep=len(guess) + 1)[0]
        drafts.passed(len(guess) + 1, time.perf_counter() - started)


def _walk(
    forward: Rewinds,
    answer: _Answer,
    sampler: Sampler,
    guessed: tuple[list[int], Logits],
    eos_ids: Collection[int],
    drafts: Drafts,
    ended: Collection[int],
) -> Generator[list[Token], None, bool]:
    """Chooses tokens as far as drafts were right, and one more; returns whether the row is done.

    `guessed` are drafts, and logits before the first and after each. However the walk ends, the cache then holds what
    was chosen, but for the last token.
    """
    guess, logits = guessed
    right, before, whole = 0, answer.count, False
    chosen = logits.argmax(1).tolist() if sampler is likeliest else None
    try:
        for place in range(len(guess) + 1):
            if chosen is not None and isfinite(logits[place, chosen[place]]):
                token = chosen[place]
            else:
                decode.require_finite(logits[place], 0)
                token = sampler(logits[place], answer.prompt, answer.ids)
            answer.add(token)
            hit = place < len(guess) and guess[place] == token
            right += hit
            whole = not hit
            finish: decode.FinishReason | None = "length" if answer.count == answer.limit else None
            yield [Token(0, token, "stop" if token in eos_ids else finish)]
            if finish or token in eos_ids or 0 in ended:
                return True
            if not hit:
                break
        return False
    finally:
        drafts.judged(len(guess), right, answer.count - before, whole)
        if right < len(guess):
            answer.held -= len(guess) - right
            forward.rewind(answer.held)
