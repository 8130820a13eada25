"""How many tokens to draft: as many as pay, by what passes cost here and how often drafts are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# Weight of the newest value in a moving mean, and how many values the guess before all of them is worth.
_NEW: Final = 0.1
_GUESS: Final = 3
# Before anything is known: how often a draft is right, by its kind, and what a further token costs.
_HOPED: Final = {"lookup 1": 0.1, "lookup 2": 0.2, "lookup 3": 0.4, "lookup 5": 0.6, "lookup 8": 0.8}
_HOPED_OF_OTHERS: Final = 0.8
_HOPED_COST: Final = 0.1
# First passes of a size also pay for its memory; the least of so many is taken.
_FIRST: Final = 4
_PLAIN_FIRST: Final = 2
# So many passes in a row over drafts; then one without, as machines become slower and faster.
_PLAIN_EVERY: Final = 64
# Less is not worth it: choosing among drafts takes time as well.
_LEAST_GAIN: Final = 1.04
_RETRY, _LONGEST_RETRY = 32, 1024
# Costs are looked up more often than they change.
_TABLE: Final = 24
_TABLE_EVERY: Final = 16
# Of a source that stops by itself, what it gains is known after so many passes.
_ENOUGH: Final = 6
# One that was used at all is not given up before so many: the first passes of each size are slow.
_TRIED: Final = 20
# What was decided about it then holds for so many passes: to decide takes a tenth of a small model's pass.
_HOLDS: Final = 8


class _Seconds:
    """A moving mean of what something takes."""

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count <= _FIRST:
            self.value = seconds if self.count == 1 else min(self.value, seconds)
        else:
            # One slow pass among many says nothing.
            self.value += _NEW * (min(seconds, 3 * self.value) - self.value)


class _Mean:
    """A moving mean that begins with a guess."""

    def __init__(self, guess: float) -> None:
        self.value, self.count = guess, 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(_NEW, 1 / (self.count + _GUESS)) * (value - self.value)


class Pace:
    """Learns while tokens are generated; good for one bundle on one machine, from request to request.

    Drafts are of a kind, by where they come from and how sure they are; each kind has its own record.
    """

    def __init__(self) -> None:
        self._passes: dict[int, _Seconds] = {}
        self._drafts: dict[str, list[_Seconds]] = {}  # a first draft and further ones
        self._right: dict[str, list[_Mean]] = {}
        self._gained: dict[str, tuple[_Mean, _Mean]] = {}  # by source: tokens and seconds of a pass with its drafts
        self._idle: dict[str, list[int]] = {}  # tokens since the last try, and until the next
        self._since_plain = 0
        self._table: list[float] = []
        self._table_age = 0
        self._held: tuple[tuple[str, str, int], tuple[int, int]] | None = None  # an offer alone, and what was decided
        self._holds = 0
        self._worth: dict[tuple[str, int], float] = {}

    def passed(self, tokens: int, seconds: float) -> None:
        """A pass of the decoder over so many tokens took so long."""
        known = self._passes.get(tokens)
        if known is None:
            known = self._passes[tokens] = _Seconds()
        known.add(seconds)
        self._since_plain = 0 if tokens == 1 else self._since_plain + 1
        self._table_age += 1
        if known.count <= _FIRST or self._table_age >= _TABLE_EVERY:
            self._table.clear()

    def drafted(self, source: str, seconds: float, further: bool = False) -> None:
        """One token of this source took so long to draft; the first of a pass, or a further one."""
        known = self._drafts.get(source)
        if known is None:
            known = self._drafts[source] = [_Seconds(), _Seconds()]
        known[further].add(seconds)

    def judged(self, kind: str, drafted: int, accepted: int) -> None:
        """Of so many drafted tokens, the first `accepted` were right, and the next was not."""
        rates = self._right.setdefault(kind, [])
        while len(rates) < drafted:
            rates.append(_Mean(rates[-1].value if rates else _hoped(kind)))
        for place in range(min(drafted, accepted + 1)):
            rates[place].add(float(place < accepted))

    def gained(self, source: str, tokens: int, drafted: int, made: int | None = None) -> None:
        """A pass with so many drafts, of which a source that stops by itself made all or `made`, gave so many tokens.

        What it took is reckoned like everything else, not measured: single passes are too uneven to be compared.
        """
        self._holds -= 1
        if source not in self._gained:
            self._gained[source] = _Mean(1.0), _Mean(self.plain_seconds() or 0.0)
        values = float(tokens), self._pass_seconds(drafted + 1) + self._draft_seconds(source, made or drafted)
        for mean, value in zip(self._gained[source], values, strict=True):
            mean.add(value)

    def plain_seconds(self) -> float | None:
        """Seconds of a pass over one token; None before there was one."""
        known = self._passes.get(1)
        return known.value if known else None

    def best(self, offers: Sequence[tuple[str, str, int]], least: int = 0) -> tuple[int, int]:
        """Which offer to take, and how many tokens of it.

        Args:
            offers: of each: source, kind, most tokens.
            least: tokens to take whether they pay or not; 0 or 1.

        Returns:
            The offer's place and the number of tokens, which is 0 where plain decoding is the fastest, or has to be
            measured.
        """
        if self._holds > 0 and self._held is not None and len(offers) == 1 and offers[0] == self._held[0]:
            return self._held[1]
        self._holds = 0
        self._worth.clear()
        plain = self._passes.get(1)
        if plain is None or plain.count < _PLAIN_FIRST or self._since_plain >= _PLAIN_EVERY:
            return 0, 0
        chosen, rate = (0, 0), 0.0 if least else _LEAST_GAIN / plain.value
        for place, (source, kind, most) in enumerate(offers):
            count, found = self._best_count(source, kind, most)
            if found > rate:
                chosen, rate = (place, count), found
        if chosen[1]:
            self._idle.pop(offers[chosen[0]][1], None)
            if self._known_gain(offers[chosen[0]][0]) is not None:
                self._held, self._holds = (offers[chosen[0]], (0, chosen[1])), _HOLDS
            return chosen
        for place, (source, _, most) in enumerate(offers):
            if source in self._gained and self._gained[source][0].count < _TRIED and most:
                return place, most
        return self._retry(offers)

    def likely(self, kind: str) -> bool:
        """Whether drafts of a kind will be wanted, as far as anything is known."""
        return kind not in self._idle

    def _best_count(self, source: str, kind: str, most: int) -> tuple[int, float]:
        """The number of tokens that gives the most tokens a second, and how many those are."""
        if self._known_gain(source) is not None:
            return most, self._known_gain(source) or 0.0  # it stops where a further draft is not worth its cost
        best, tokens, right = (0, 0.0), 1.0, 1.0
        for count in range(1, most + 1):
            right *= self._rate(kind, count - 1)
            tokens += right
            rate = tokens / (self._pass_seconds(count + 1) + self._draft_seconds(source, count))
            best = max(best, (count, rate), key=lambda pair: pair[1])
        return best

    def _known_gain(self, source: str) -> float | None:
        """Tokens a second."""
        known = self._gained.get(source)
        return None if known is None or known[0].count < _ENOUGH else known[0].value / known[1].value

    def _retry(self, offers: Sequence[tuple[str, str, int]]) -> tuple[int, int]:
        """What does not pay is tried again after a while, and ever more seldom: texts change."""
        for place, (_, kind, most) in enumerate(offers):
            idle = self._idle.setdefault(kind, [0, _RETRY])
            idle[0] += 1
            if idle[0] >= idle[1] and most:
                self._idle[kind] = [0, min(2 * idle[1], _LONGEST_RETRY)]
                return place, most
        return 0, 0

    def worth(self, source: str, tokens: int) -> float:
        """How likely a further drafted token must be right to be worth its cost, behind `tokens` of a pass.

        Time is worth what could be made of it: the tokens of plain decoding, or those that drafts of this source give.
        """
        known = self._worth.get((source, tokens))
        if known is not None:
            return known
        plain = self.plain_seconds()
        if not plain:
            return 0.0
        more = self._pass_seconds(tokens + 1) - self._pass_seconds(tokens)
        cost = max(0.0, more) + self._draft_seconds(source, 2) - self._draft_seconds(source, 1)
        likely = self._worth[source, tokens] = min(1.0, cost * max(1 / plain, self._known_gain(source) or 0.0))
        return likely

    def _rate(self, kind: str, place: int) -> float:
        rates = self._right.get(kind)
        return _hoped(kind) if not rates else rates[min(place, len(rates) - 1)].value

    def _draft_seconds(self, source: str, count: int) -> float:
        if source not in self._drafts:
            return 0.0
        first, further = self._drafts[source]
        return first.value + (count - 1) * (further.value if further.count else first.value)

    def _pass_seconds(self, tokens: int) -> float:
        if tokens >= len(self._table):
            self._table = [0.0, *(self._reckoned(size) for size in range(1, max(_TABLE, tokens + 1)))]
            self._table_age = 0
        return self._table[tokens]

    def _reckoned(self, tokens: int) -> float:
        """As measured, or between the sizes that were."""
        if tokens in self._passes:
            return self._passes[tokens].value
        below = max((size for size in self._passes if size < tokens), default=1)
        above = min((size for size in self._passes if size > tokens), default=0)
        start = self._passes[below].value if below in self._passes else 1.0
        if above:
            return start + (self._passes[above].value - start) * (tokens - below) / (above - below)
        return start + (tokens - below) * _HOPED_COST * (self.plain_seconds() or start)


def _hoped(kind: str) -> float:
    return _HOPED.get(kind, _HOPED_OF_OTHERS)
