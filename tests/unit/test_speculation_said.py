"""What drafts are made of: earlier answers, and the draft head's buffers."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from model.errors import ResourceError
from runtime.cache import CacheLayout, KVCache
from runtime.speculation import Drafts
from runtime.speculation_drafts import DraftHead
from runtime.speculation_said import LONGEST_MATCH, Passages, Said
from tests.unit.test_speculation import learned


def test_passages_that_came_before_are_known() -> None:
    said = Said()
    said.add(list(range(100, 120)))
    rng = np.random.default_rng(3)
    text = np.concatenate((rng.integers(0, 9, 40), np.arange(105, 118), rng.integers(0, 3, 600)))
    passages, whole = Passages(said), [100, *range(101, 120), -1]
    for length in [30, *range(31, 45), 60, *range(61, len(text) + 1)]:
        last = text[length - LONGEST_MATCH : length].tolist()
        earlier = [text[place : place + LONGEST_MATCH].tolist() for place in range(length - LONGEST_MATCH)]
        earlier += [whole[place : place + LONGEST_MATCH] for place in range(len(whole))]
        assert passages.repeats(text[:length]) == (last in earlier)
    assert not Passages(None).repeats(np.arange(3))


def test_what_nearly_always_follows() -> None:
    said = Said()
    for place in range(12):
        said.add([5, 6, 7, 8, 20 + place, 9])
    assert said.follows([5, 6], 7) == [7, 8]
    assert said.follows([5, 6], 1) == [7]
    assert said.follows([7, 8], 7) == []
    assert said.follows([30, 5], 7) == [6, 7, 8]  # of the two together nothing is known
    assert said.follows([5], 7) == [6, 7, 8]
    assert Said().follows([1], 3) == []


def test_earlier_answers_are_bounded() -> None:
    said, rng = Said(), np.random.default_rng(8)
    for _ in range(60):
        said.add(rng.integers(0, 60_000, 1000).tolist())
    assert len(said.tokens) <= 5200
    assert len(said.passages) <= 5200
    assert len(said._counts) <= 1 << 14
    assert Passages(said).repeats(said.tokens[-30:-1])


def test_what_surely_follows_a_draft_costs_no_draft() -> None:
    class Head:
        def read(self) -> None: ...

        def keep(self, tokens: int) -> None: ...

        def propose(self, token: int, most: int, worth: Any, timed: Any) -> list[int]:
            drafts = [token + 1]
            timed(0.1)
            while len(drafts) < most and worth(drafts) < 1:
                drafts.append(drafts[-1] + 1)
                timed(0.1)
            return drafts

    said, pace = Said(), learned({1: 1.0, 2: 1.01, 8: 1.05}, right=0)
    for _ in range(12):
        said.add([40, 41, 3, 4, 5, 6])
    drafts = Drafts(pace, cast(Any, Head()), said=said, least=1)
    drafts.begin(np.arange(9))
    assert drafts.propose(np.array([1, 40]), 9) == [41, 3, 4, 5, 6]
    drafts.judged(5, 3, 4, True)
    assert drafts.account().by_source == {"lookup": (4, 2), "mtp": (1, 1)}
    assert drafts.propose(np.array([1, 40]), 3) == [41, 3, 4]
    assert Drafts(None, cast(Any, Head()), lookup=False, most=2, said=said).propose(np.array([1, 40]), 9) == [41, 42]


def test_a_head_is_not_given_up_after_its_first_slow_passes() -> None:
    pace, offer, taken = learned({1: 1.0, 2: 1.1, 8: 1.5}, right=0), [("mtp", "mtp", 4)], []
    pace.gained("mtp", 1, 1)
    pace.drafted("mtp", 5.0)
    for _ in range(50):
        taken.append(pace.best(offer)[1])
        if taken[-1]:
            pace.gained("mtp", 1, 1)
    assert sum(map(bool, taken[:25])) == 19
    assert not any(taken[25:])


def test_a_head_whose_cache_cannot_grow_keeps_nothing_that_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its buffers are gone then, and what was bound only borrowed them."""
    cache = KVCache(CacheLayout(1, 1, 4, np.float32), 1, 1000)
    cache.reserve(5)
    head = DraftHead.__new__(DraftHead)
    head._cache, head._sees, head._passes = cache, None, {1: cast(Any, object())}

    def fail(self: KVCache, capacity: int) -> None:
        raise ResourceError("cannot hold context", "memory", "it is small")

    monkeypatch.setattr(KVCache, "_allocate", fail)
    cache.lengths[0] = cache.capacity
    head._waiting, head._waits = [(np.zeros((1, 4)), np.zeros((1, 4)))], 1
    with pytest.raises(ResourceError, match="small"):
        head._run()
    assert not head._passes
