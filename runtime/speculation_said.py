"""What was said before: passages that come again, and what nearly always follows what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

LONGEST_MATCH: Final = 8
# Tokens of earlier answers in which passages are looked for, and how many more may gather before the oldest go.
_KEPT: Final = 4096
_SPARE: Final = 1024
# Counts begin anew at so many contexts, of which each tells apart so many tokens that followed.
_MOST_CONTEXTS: Final = 1 << 14
_MOST_FOLLOWERS: Final = 64
_CONTEXT: Final = 2
# A token follows surely if it did so in that share of all cases, and in half a case more; a row of them, if it is
# likely enough as a whole.
_SURE: Final = 0.9
_SURE_TOGETHER: Final = 0.5
# Of rolling hashes, modulo 2**64.
_FACTOR: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
_LEAVES: Final = pow(_FACTOR, LONGEST_MATCH, 1 << 64)


class Said:
    """Earlier answers.

    Attributes:
        tokens: of the latest ones; -1 stands behind each.
        passages: hashes of all `LONGEST_MATCH` tokens on end of them.
    """

    def __init__(self) -> None:
        self.tokens: Ids = np.zeros(0, np.int64)
        self.passages: frozenset[int] = frozenset()
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}

    def add(self, answer: Sequence[int]) -> None:
        """An answer was given."""
        tokens = np.concatenate((self.tokens, np.array([*answer, -1], np.int64)))
        if len(tokens) > _KEPT + _SPARE:
            tokens = tokens[-_KEPT:]
            self.passages = frozenset(_hashes(tokens))
        else:
            fresh = len(answer) + LONGEST_MATCH
            self.passages |= set(_hashes(tokens[-fresh:]))
        self.tokens = tokens
        if len(self._counts) + _CONTEXT * len(answer) > _MOST_CONTEXTS:
            self._counts = {}
        for place in range(1, min(len(answer), _MOST_CONTEXTS // _CONTEXT)):
            for size in range(1, min(place, _CONTEXT) + 1):
                followed = self._counts.setdefault(tuple(answer[place - size : place]), {})
                token = answer[place]
                if token in followed or len(followed) < _MOST_FOLLOWERS:
                    followed[token] = followed.get(token, 0) + 1

    def follows(self, last: Sequence[int], most: int) -> list[int]:
        """What surely follows the tokens `last`, `most` tokens at most."""
        found: list[int] = []
        context, sure = list(last[-_CONTEXT:]), 1.0
        while len(found) < most:
            followed = None
            for size in range(len(context), 0, -1):
                followed = self._counts.get(tuple(context[-size:]))
                if followed is not None:
                    break
            if followed is None:
                break
            counts = tuple(followed.items())
            token, count = max(counts, key=_by_count)
            share = count / (sum(map(_by_count, counts)) + 0.5)
            sure *= share
            if share < _SURE or sure < _SURE_TOGETHER:
                break
            found.append(token)
            context = [*context, token][-_CONTEXT:]
        return found


def _by_count(pair: tuple[int, int]) -> int:
    return pair[1]


class Passages:
    """Whether a text's last `LONGEST_MATCH` tokens came before, in it or in earlier answers; a step for each token.

    Args:
        said: earlier answers; None for none.
    """

    def __init__(self, said: Said | None) -> None:
        self._said = frozenset[int]() if said is None else said.passages
        self._seen: set[int] = set()  # all but the last
        self._last: int | None = None
        self._count = 0

    def repeats(self, text: Ids) -> bool:
        """Of a text that is that of the last call and more. May seldom say yes where it is no."""
        fresh = len(text) - self._count
        if self._last is None or fresh > _CONTEXT * LONGEST_MATCH:
            if len(text) < LONGEST_MATCH:
                return False
            found = _hashes(text)
            self._last = found.pop()
            self._seen.update(found)
        elif fresh:
            part = text[self._count - LONGEST_MATCH :].tolist()
            for gone, token in zip(part, part[LONGEST_MATCH:], strict=False):
                self._seen.add(self._last)
                self._last = (self._last * _FACTOR - gone * _LEAVES + token) & _MASK
        self._count = len(text)
        return self._last in self._seen or self._last in self._said


def _hashes(tokens: Ids) -> list[int]:
    """Of all `LONGEST_MATCH` tokens on end, in their order."""
    count = len(tokens) - LONGEST_MATCH + 1
    if count <= 0:
        return []
    found, values = np.zeros(count, np.uint64), tokens.astype(np.uint64)
    for place in range(LONGEST_MATCH):
        found = found * np.uint64(_FACTOR) + values[place : place + count]
    hashes: list[int] = found.tolist()
    return hashes
