"""The soak in small: mixed requests through one engine, compared with another's, and nothing is left over."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.soak_answers import Outcome, difference, parts_at_a_tie, right_answers, spoiling
from benchmarks.soak_cases import BAD, ENGINE, NEVER_AGAIN, SCHEDULER, Case, Plan, Turn, distinct
from benchmarks.soak_figures import by_batches
from benchmarks.soak_pictures import Pictures
from benchmarks.soak_run import FEATURES, Soak
from model.errors import NumericalError
from runtime.engine import Engine
from runtime.options import GenerationOptions
from tests.e2e.conftest import Bundles

SMALL = Plan(seed=1, tenths=2, blocks=1, context=2048, most=8)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_answers_stay_right_and_nothing_is_left_over(bundles: Bundles, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    pytest.importorskip("av")
    blocks, pictures = list(SMALL.all_blocks())[:1], Pictures(tmp_path)
    with Engine.load(bundles.bundle("vlm")) as other:
        right = right_answers(lambda: nullcontext(other), distinct(blocks), pictures, tmp_path / "right")
    before, threads = open_files(), set(threading.enumerate())
    with Engine.load(bundles.bundle("vlm")) as engine:
        measured = Soak(engine, right, pictures).run(blocks, distinct(blocks))
    assert measured.wrong == []
    assert len(measured.parted) < 5  # random weights have ties
    assert not np.isnan(measured.wall).any()
    assert 0 < measured.kept_features <= FEATURES
    assert (open_files(), set(threading.enumerate())) == (before, threads)


def test_a_session_keeps_nothing_of_numbers_that_were_none(bundles: Bundles) -> None:
    settings = GenerationOptions(do_sample=False, max_new_tokens=10, enable_thinking=False)
    text = "What comes to nothing?"
    with Engine.load(bundles.bundle("vlm")) as engine:
        session = engine.session()
        wanted = engine.generate("What comes of it?", options=settings).token_ids
        with spoiling(engine, [Case("spoilt", 0, (Turn(text),))]), pytest.raises(NumericalError, match="NaN"):
            session.send(text, options=settings)
        assert (session.messages, session.tokens) == ([], 0)
        assert session.send("What comes of it?", options=settings).token_ids == wanted


def test_tenths_have_the_same_requests() -> None:
    first, second = SMALL.all_blocks()
    assert sum(len(block.engine) + len(block.scheduler) for block in (first, second)) == SMALL.requests
    for one, other, mix in ((first.engine, second.engine, ENGINE), (first.scheduler, second.scheduler, SCHEDULER)):
        repeated = [{case.name: case for case in block if case.kind not in NEVER_AGAIN} for block in (one, other)]
        assert repeated[0] == repeated[1]
        assert len(repeated[0]) + sum(mix.get(kind, 0) for kind in NEVER_AGAIN) == len(one)
        new = [{case.turns for case in block if case.kind in NEVER_AGAIN} for block in (one, other)]
        assert not new[0] & new[1]
    assert {case.kind for case in distinct([first])} == {*ENGINE, *SCHEDULER, "video file"} >= set(BAD)


@pytest.mark.parametrize(
    ("kind", "found", "fault"),
    [
        ("line", Outcome([[1, 2, 3]], ["abc"], ["stop"]), ""),
        ("line", Outcome([[1, 9, 3]], ["abc"], ["stop"]), "ids"),
        ("line", Outcome([[1, 2, 3]], ["abd"], ["stop"]), "texts"),
        ("line", Outcome([[1, 2, 3]], ["abc"], ["length"]), "ends"),
        ("line", Outcome(error="UsageError: no"), "error"),
        ("cancelled", Outcome([[1, 2, 3]], ["ab"], ["cancelled"]), ""),
        ("cancelled", Outcome([[1, 2]], ["ab"], ["cancelled"]), "begin"),
        ("cancelled", Outcome([[1, 9, 3]], ["ab"], ["cancelled"]), "begin"),
        ("spoilt", Outcome([[1, 2, 3]], ["abc"], ["stop"]), "fresh"),
    ],
)
def test_differences_are_seen(kind: str, found: Outcome, fault: str) -> None:
    right = Outcome([[1, 2, 3]], ["abc"], ["stop"], [[5.0, 0.1, 5.0]])
    told = difference(Case(kind, 0, (Turn("x"),)), right, found)
    assert fault in told
    assert bool(told) is bool(fault)


def test_ties_are_of_tokens_that_hardly_lead() -> None:
    right = Outcome([[1, 2], [3, 4]], ["a", "b"], ["stop", "stop"], [[5.0, 0.1], [5.0, 5.0]])
    assert parts_at_a_tie(right, Outcome([[1, 9], [8, 8]], ["c", "d"], ["stop", "stop"]))
    assert not parts_at_a_tie(right, Outcome([[9, 2], [3, 4]], ["c", "b"], ["stop", "stop"]))
    assert not parts_at_a_tie(right, Outcome([[1, 2], [3, 9]], ["a", "d"], ["stop", "stop"]))
    assert not parts_at_a_tie(right, Outcome(error="UsageError: no"))


def test_intervals_hold_for_what_hangs_together() -> None:
    """Of series that stay where they are for a while: few intervals miss the slope, and a large one is found."""
    requests, missed = np.arange(90) * 50.0, 0
    for seed in range(200):
        noise, series = np.random.default_rng(seed).normal(0, 1e6, 90), np.zeros(90)
        for i in range(1, 90):
            series[i] = 0.7 * series[i - 1] + noise[i]
        slope = by_batches(requests.tolist(), (series + 500 * requests).tolist())
        missed += not slope.low <= 500 <= slope.high
        assert not by_batches(requests.tolist(), (series + 20_000 * requests).tolist()).level
    assert missed <= 20


def test_the_report_says_what_was_measured(bundles: Bundles) -> None:
    assert soak.plan_of(bundles.bundle("vlm"), 5000, 1).requests == 5020
    assert soak.plan_of(bundles.bundle("vlm"), 1, 1).requests == 520
