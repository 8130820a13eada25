from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from model.errors import NumericalError, UsageError
from runtime import decode, speculation
from runtime.cache import CacheLayout, KVCache
from runtime.decode import Ids, Logits, Token
from runtime.options import GenerationOptions
from runtime.sampling import Sampler, make_sampler
from runtime.speculation import Drafts
from runtime.speculation_drafts import Lookup
from runtime.speculation_pace import Pace
from runtime.speculation_said import LONGEST_MATCH

VOCAB = 50
EOS = {7}


class Chain:
    """A model whose next token depends on the last one alone; holds its text, and checks how it is called."""

    def __init__(self, logits: npt.NDArray[np.float32], room: int = 1 << 20) -> None:
        self.logits = logits
        self.text: list[int] = []
        self.passes: list[int] = []
        self.cache = cast(KVCache, SimpleNamespace(forgettable=lambda tokens: min(tokens, room)))

    def __call__(self, ids: Ids, lengths: Ids, keep: int = 1) -> Logits:
        assert ids.dtype == np.int64
        assert lengths[0] == len(self.text) + ids.shape[1]
        self.text += ids[0].tolist()
        self.passes.append(ids.shape[1])
        return self.logits[ids[:, -keep:] if keep else ids]

    def rewind(self, length: int) -> None:
        assert length < len(self.text)
        del self.text[length:]


def counting(room: int = 1 << 20) -> Chain:
    """Says last token + 1."""
    return Chain(np.roll(np.eye(VOCAB, dtype=np.float32), 1, axis=1), room)


class Given(Drafts):
    """Drafts what a function says."""

    def __init__(self, tell: Any) -> None:
        super().__init__()
        self.tell = tell
        self.rooms: list[int] = []

    def propose(self, text: Ids, room: int) -> list[int]:
        self.rooms.append(room)
        drafts: list[int] = self.tell(text)[: max(room, 0)]
        self._source = "given"
        return drafts


def likeliest(logits: Logits, prompt: Any, generated: Any) -> int:
    return int(logits.argmax())


def run(model: Chain, drafts: Drafts, sampler: Sampler = likeliest, limit: int = 10, start: int = 30) -> list[Token]:
    return [step[0] for step in speculation.generate(model, [20, start], sampler, limit, EOS, drafts)]


@pytest.mark.parametrize("wrong", range(5))
def test_drafts_up_to_the_first_wrong_one_are_taken(wrong: int) -> None:
    def tell(text: Ids) -> list[int]:
        right = [(int(text[-1]) + 1 + place) % VOCAB for place in range(4)]
        return [token if place < wrong else 0 for place, token in enumerate(right)]

    model, drafts = counting(), Given(tell)
    tokens = run(model, drafts, limit=11)
    assert [token.id for token in tokens] == list(range(31, 42))
    assert [token.finish for token in tokens] == [None] * 10 + ["length"]
    assert model.passes[1:] == [5] * (10 // (wrong + 1)) + ([10 % (wrong + 1)] if 10 % (wrong + 1) else []) or wrong < 4
    account = drafts.account()
    assert account.passes == len(model.passes) - 1
    assert account.accepted == 10 - account.passes
    assert model.text == [20, 30, *range(31, 41)]


def test_the_row_ends_inside_drafts() -> None:
    def tell(text: Ids) -> list[int]:
        return [(int(text[-1]) + 1 + place) % VOCAB for place in range(6)]

    model = counting()
    tokens = run(model, Given(tell), limit=40, start=3)
    assert [(token.id, token.finish) for token in tokens] == [(4, None), (5, None), (6, None), (7, "stop")]
    assert model.text == [20, 3, 4, 5, 6, 7]  # nothing behind the end
    model, drafts = counting(), Given(tell)
    ended: set[int] = set()
    found = []
    for step in speculation.generate(model, [30], likeliest, 20, EOS, drafts, ended):
        found.append(step[0].id)
        if found[-1] == 34:
            ended.add(0)
    assert found == [31, 32, 33, 34]
    assert model.text == [30, 31, 32, 33, 34]
    assert drafts.account().accepted == 3


def test_a_stream_that_is_given_up_leaves_what_was_given_out() -> None:
    model = counting()
    steps = speculation.generate(
        model, [30], likeliest, 20, EOS, Given(lambda text: [int(text[-1]) + 1, int(text[-1]) + 2, 0])
    )
    assert [next(steps)[0].id for _ in range(2)] == [31, 32]
    cast(Any, steps).close()
    assert model.text == [30, 31, 32]


def test_drafts_have_no_more_room_than_limit_and_cache() -> None:
    drafts = Given(lambda text: [0] * 9)
    model = counting(room=4)
    run(model, drafts, limit=6)
    assert drafts.rooms == [3, 3, 2, 1, 0]
    assert model.passes == [2, 4, 4, 3, 2, 1]
    assert max(counting(room=0).passes, default=0) == 0


def test_logits_that_are_not_finite() -> None:
    model = counting()
    model.logits[33] = np.nan
    with pytest.raises(NumericalError):
        run(model, Given(lambda text: [int(text[-1]) + 1, int(text[-1]) + 2, 0]))


# A chain whose rows are far apart: a draft is nearly certain, or hopeless, or one of many.
_RNG = np.random.default_rng(11)
TRUE = _RNG.dirichlet(np.full(6, 0.7), 6)
DRAWS = 40_000


def transitions(tokens: Sequence[int]) -> npt.NDArray[np.int64]:
    counts = np.zeros((6, 6), np.int64)
    np.add.at(counts, (np.array(tokens[:-1]), np.array(tokens[1:])), 1)
    return counts


def bias(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    """The largest deviation of a probability, in standard deviations."""
    rows = counts.sum(1, keepdims=True)
    deviations = counts - rows * expected
    return float(np.abs(deviations / np.sqrt(rows * expected * (1 - expected) + 1)).max())


def favour(counts: npt.NDArray[np.int64] | npt.NDArray[np.float64], order: npt.NDArray[np.int64]) -> float:
    """How far the share of each row's token in `order` is from what it should be, in standard deviations."""
    expected = np.take_along_axis(TRUE, order[:, None], 1)[:, 0]
    rows = counts.sum(1)
    got = np.take_along_axis(counts, order[:, None], 1)[:, 0]
    return float((got - rows * expected).sum() / np.sqrt((rows * expected * (1 - expected)).sum()))


@pytest.mark.parametrize("kind", ["likeliest", "unlikeliest", "round"])
def test_drawn_answers_are_distributed_as_without_drafts(kind: str) -> None:
    """The statistic catches a bias of 1 %, as the test below says; and the draws are even the same ones."""
    order = np.argsort(-TRUE, axis=1)

    def tell(text: Ids) -> list[int]:
        drafts = []
        last = int(text[-1])
        for place in range(3):
            last = int(order[last, {"likeliest": 0, "unlikeliest": 5, "round": (len(text) + place) % 6}[kind]])
            drafts.append(last)
        return drafts

    logits = np.log(TRUE).astype(np.float32)
    options = GenerationOptions(do_sample=True, temperature=1.0, seed=5)
    model = Chain(logits)
    drafts = Given(tell)
    steps = speculation.generate(model, [0], make_sampler(options), DRAWS, (), drafts)
    tokens = [step[0].id for step in steps]
    assert drafts.account().accepted > 100
    counts = transitions(tokens)
    assert bias(counts, TRUE) < 4
    assert all(abs(favour(counts, order[:, place])) < 3 for place in range(6))
    plain = decode.generate(Chain(logits), [[0]], [make_sampler(options)], [DRAWS // 4], ())
    assert tokens[: DRAWS // 4] == [step[0].id for step in plain]


@pytest.mark.parametrize("place", range(6))
def test_a_bias_of_one_percent_would_be_seen(place: int) -> None:
    """Where every row's likeliest token, or second, and so on, came one time in a hundred too often."""
    order = np.argsort(-TRUE, axis=1)[:, place : place + 1]
    skewed = TRUE * 0.99
    np.put_along_axis(skewed, order, np.take_along_axis(skewed, order, 1) + 0.01, 1)
    share = np.take_along_axis(skewed - TRUE, order, 1).mean()
    assert 0 < share < 0.01
    assert favour(DRAWS / 6 * (TRUE * (1 - 0.01 / share) + skewed * (0.01 / share)), order[:, 0]) > 3


def test_lookup_takes_what_followed_the_longest_match_that_is_latest() -> None:
    find = Lookup().find
    text = np.array([1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3])
    assert find(text, 2) == ([4, 9], 3)
    text = np.array([7, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3])
    assert find(text, 2) == ([5, 8], 2)
    assert find(np.array([1, 2, 3]), 4) == ([], 0)
    assert find(np.array([1]), 4) == ([], 0)


def test_lookup_goes_round_where_what_is_repeated_is_short() -> None:
    text = np.array([1, 2, 3] * 6)
    drafts, matched = Lookup().find(text, 7)
    assert drafts == [1, 2, 3, 1, 2, 3, 1]
    assert matched == LONGEST_MATCH
    assert Lookup().find(np.array([5, 5]), 3) == ([5, 5, 5], 1)


def offers(most: int = 7) -> list[tuple[str, str, int]]:
    return [("lookup", "lookup 3", most)]


def learned(costs: dict[int, float], right: int, drafted: int = 7) -> Pace:
    pace = Pace()
    for tokens, seconds in costs.items():
        for _ in range(5):
            pace.passed(tokens, seconds)
    for _ in range(60):
        pace.judged("lookup 3", drafted, right)
    return pace


def test_as_many_drafts_as_pay() -> None:
    flat, steep = {1: 1.0, 2: 1.05, 4: 1.2, 8: 1.5}, {1: 1.0, 2: 1.7, 4: 3.8, 8: 8.0}
    assert learned(flat, right=7).best(offers()) == (0, 7)
    assert learned(flat, right=2).best(offers()) == (0, 2)
    assert learned(flat, right=0).best(offers()) == (0, 0)
    assert learned(steep, right=2).best(offers()) == (0, 1)
    assert learned(steep, right=1)._best_count("lookup", "lookup 3", 7)[0] == 1
    assert learned({1: 1.0, 2: 2.1, 4: 4.2, 8: 8.0}, right=7).best(offers(1)) == (0, 0)
    pace = learned(flat, right=2)
    for _ in range(9):
        pace.drafted("lookup", 1.0)
    assert pace.best(offers()) == (0, 0)


def test_the_better_of_two_offers() -> None:
    pace = learned({1: 1.0, 4: 1.2, 8: 1.5}, right=5)
    for _ in range(60):
        pace.judged("mtp", 3, 3)
        pace.drafted("mtp", 0.3)
    both = [*offers(), ("mtp", "mtp", 3)]
    assert pace.best(both) == (0, 5)
    for _ in range(60):
        pace.judged("lookup 3", 5, 0)
    assert pace.best(both) == (1, 3)


def test_what_does_not_pay_is_tried_again_ever_more_seldom() -> None:
    pace = learned({1: 1.0, 2: 1.1, 8: 1.5}, right=0)
    tried = []
    for token in range(400):
        if pace.best(offers())[1]:
            tried.append(token)
            pace.judged("lookup 3", 7, 0)
    gaps = np.diff([-1, *tried]).tolist()
    assert gaps == [32, 64, 128]


def test_plain_passes_come_first_and_head_drafts_must_be_likely_enough() -> None:
    pace = Pace()
    assert pace.best(offers()) == (0, 0)
    assert pace.worth("mtp", 2) == 0
    pace.passed(1, 1.0)
    assert pace.best(offers()) == (0, 0)
    pace.passed(1, 1.0)
    assert pace.best(offers())[1] > 0
    pace.passed(2, 1.25)
    pace.passed(3, 1.5)
    pace.drafted("mtp", 0.25)
    assert pace.worth("mtp", 2) == pytest.approx(0.5)


def test_slow_passes_now_and_then_change_little() -> None:
    pace = Pace()
    for seconds in [9.0, *([1.0] * 20), 500.0]:
        pace.passed(1, seconds)
    assert pace.plain_seconds() == pytest.approx(1.2)


@pytest.mark.parametrize("wrong", [{"speculate": "yes"}, {"speculate": ["mtp"]}, {"draft_tokens": 0}])
def test_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        GenerationOptions(**wrong)
    assert GenerationOptions(speculate="mtp", draft_tokens=2).draft_tokens == 2


def test_speed_up_counts_what_passes_gave() -> None:
    def steps() -> Iterator[None]:
        drafts.passed(1, 2.0)
        yield
        drafts.passed(4, 3.0)
        yield

    drafts = Drafts()
    drafts.judged(0, 0, 1, True)  # the prompt's
    taken = steps()
    next(taken)
    drafts.judged(0, 0, 1, True)
    assert drafts.propose(np.array([1, 2, 1, 2, 1, 2]), 3) == [1, 2, 1]
    next(taken)
    drafts.judged(3, 2, 3, True)
    account = drafts.account()
    assert (account.passes, account.drafted, account.accepted) == (2, 3, 2)
    assert account.by_source == {"lookup": (3, 2)}
    assert account.speed_up == pytest.approx(4 * 2.0 / 5.0, rel=1e-3)


def test_lookup_looks_into_earlier_answers() -> None:
    said = np.array([4, 5, 6, 7, -1, 9, 8, -1], np.int64)
    assert Lookup(said).find(np.array([1, 4, 5]), 4) == ([6, 7], 2)
    assert Lookup(said).find(np.array([1, 8]), 4) == ([], 0)
    assert Lookup(said).find(np.array([4, 5, 3, 4, 5]), 2) == ([3, 4], 2)


def test_a_source_that_stops_by_itself_is_judged_by_what_it_gains() -> None:
    pace = learned({1: 1.0, 2: 1.1, 8: 1.5}, right=0)
    offer = [("mtp", "mtp", 5)]
    pace.drafted("mtp", 0.2)
    pace.drafted("mtp", 0.1, further=True)
    assert pace.worth("mtp", 2) == pytest.approx(0.4 / 6 + 0.1)
    for _ in range(80):
        pace.gained("mtp", 3, 1)
    assert pace.best(offer) == (0, 5)
    assert pace.worth("mtp", 2) == pytest.approx(3 / 1.3 * (0.4 / 6 + 0.1), rel=0.01)
    for _ in range(80):
        pace.gained("mtp", 1, 1)
    assert pace.best(offer) == (0, 0)
    assert not pace.likely("mtp")
    assert pace.best(offer, least=1) == (0, 5)


def test_plain_passes_are_measured_again_now_and_then() -> None:
    pace = learned({1: 1.0, 2: 1.05, 8: 1.5}, right=7)
    taken = []
    for _ in range(200):
        count = pace.best(offers())[1]
        pace.passed(count + 1, 1.5 if count else 1.0)
        taken.append(count)
    assert [place for place, count in enumerate(taken) if not count] == [54, 119, 184]
    assert set(taken) == {0, 7}


def test_what_is_of_no_use_is_not_looked_for_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def find(lookup: Lookup, text: Ids, most: int) -> tuple[list[int], int]:
        looked.append(len(text))
        return [1], 3

    monkeypatch.setattr(Lookup, "find", find)
    pace = learned({1: 1.0, 2: 1.1, 8: 1.5}, right=0)
    drafts = Drafts(pace)
    for length in range(1, 21):
        assert drafts.propose(np.arange(length), 5) == []
    assert looked == [1, 5, 9, 13, 17]


@pytest.mark.parametrize(("window", "slack"), [(8, 64), (32, 64), (5, 3), (0, 0)])
def test_one_row_is_rewound_as_many_are(window: int, slack: int) -> None:
    layout = CacheLayout(2, 1, 4, np.float32, frozenset({0}) if window else frozenset(), window)
    one, two = (KVCache(layout, rows, 1000, slack=slack) for rows in (1, 2))
    for length in range(0, 300, 7):
        one.lengths, two.lengths = np.array([length]), np.array([length] * 2)
        assert one.forgettable(40) == two.forgettable(40)
        for wanted in range(length + 1):
            one.lengths = np.array([length])
            if two.can_rewind([wanted] * 2):
                one.rewind([wanted])
                assert one.lengths.tolist() == [wanted]
            else:
                with pytest.raises(ValueError, match="cannot rewind"):
                    one.rewind([wanted])
