"""How many tokens to draft: as many as pay, by what passes cost here and how often drafts are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# Weight of the newest value in a moving mean.
_NEW: Final = 0.1
# Before anything is known: drafts are worth a try, and a further token costs little.
_HOPED: Final = 0.8
_HOPED_COST: Final = 0.1
# First passes of a size also pay for its memory; the least of so many is taken.
_FIRST: Final = 4
_PLAIN_FIRST: Final = 2
_LEAST_GAIN: Final = 1.02
_RETRY, _LONGEST_RETRY = 32, 1024


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


class Pace:
    """Learns while tokens are generated; good for one bundle on one machine, from request to request.

    Drafts are of a kind, by where they come from and how sure they are; each kind has its own record.
    """

    def __init__(self) -> None:
        self._passes: dict[int, _Seconds] = {}
        self._drafts: dict[str, _Seconds] = {}
        self._right: dict[str, list[float]] = {}
        self._idle: dict[str, list[int]] = {}  # tokens since the last try, and until the next

    def passed(self, tokens: int, seconds: float) -> None:
        """A pass of the decoder over so many tokens took so long."""
        self._passes.setdefault(tokens, _Seconds()).add(seconds)

    def drafted(self, source: str, seconds: float) -> None:
        """One token of this source took so long to draft."""
        self._drafts.setdefault(source, _Seconds()).add(seconds)

    def judged(self, kind: str, drafted: int, accepted: int) -> None:
        """Of so many drafted tokens, the first `accepted` were right, and the next was not."""
        rates = self._right.setdefault(kind, [])
        rates += [rates[-1] if rates else _HOPED] * (drafted - len(rates))
        for place in range(min(drafted, accepted + 1)):
            rates[place] += _NEW * ((place < accepted) - rates[place])

    def plain_seconds(self) -> float | None:
        """Seconds of a pass over one token; None before there was one."""
        known = self._passes.get(1)
        return known.value if known else None

    def best(self, offers: Sequence[tuple[str, str, int]]) -> tuple[int, int]:
        """Which offer to take, and how many tokens of it.

        Args:
            offers: of each: source, kind, most tokens.

        Returns:
            The offer's place and the number of tokens, which is 0 where plain decoding is the fastest.
        """
        plain = self._passes.get(1)
        if plain is None or plain.count < _PLAIN_FIRST:
            return 0, 0
        chosen, rate = (0, 0), _LEAST_GAIN / plain.value
        for place, (source, kind, most) in enumerate(offers):
            count, found = self._best_count(source, kind, most)
            if found > rate:
                chosen, rate = (place, count), found
        if chosen[1]:
            self._idle.pop(offers[chosen[0]][1], None)
            return chosen
        return self._retry(offers)

    def _best_count(self, source: str, kind: str, most: int) -> tuple[int, float]:
        """The number of tokens that gives the most tokens a second, and how many those are."""
        best, tokens, right = (0, 0.0), 1.0, 1.0
        for count in range(1, most + 1):
            right *= self._rate(kind, count - 1)
            tokens += right
            rate = tokens / (self._pass_seconds(count + 1) + count * self._draft_seconds(source))
            best = max(best, (count, rate), key=lambda pair: pair[1])
        return best

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
        """How likely a further drafted token must be right to be worth its cost, behind `tokens` of a pass."""
        plain = self.plain_seconds()
        if not plain:
            return 0.0
        more = self._pass_seconds(tokens + 1) - self._pass_seconds(tokens)
        return min(1.0, max(0.0, more) / plain + self._draft_seconds(source) / plain)

    def _rate(self, kind: str, place: int) -> float:
        rates = self._right.get(kind)
        return _HOPED if not rates else rates[min(place, len(rates) - 1)]

    def _draft_seconds(self, source: str) -> float:
        known = self._drafts.get(source)
        return known.value if known else 0.0

    def _pass_seconds(self, tokens: int) -> float:
        """As measured, or between the sizes that were."""
        if tokens in self._passes:
            return self._passes[tokens].value
        below = max((size for size in self._passes if size < tokens), default=1)
        above = min((size for size in self._passes if size > tokens), default=0)
        start = self._passes[below].value
        if above:
            return start + (self._passes[above].value - start) * (tokens - below) / (above - below)
        return start + (tokens - below) * _HOPED_COST * (self.plain_seconds() or start)
