"""Requests that share the rows of one cache: each gets what it would get alone, whatever happens to the others."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.errors import NumericalError, ResourceError, UsageError
from runtime.cache import KVCache
from runtime.engine import Engine
from runtime.execution import Execution
from runtime.options import GenerationOptions
from runtime.rows import RowPasses
from runtime.scheduler import Scheduler
from runtime.ticket import Ticket
from tests.e2e.conftest import Bundles

GREEDY = GenerationOptions(do_sample=False)
WAIT = 120.0
BAD = "z" * 290


@pytest.fixture(scope="module", params=["hybrid", "dense", "vlm"])
def engine(request: pytest.FixtureRequest, bundles: Bundles) -> Iterator[Engine]:
    with Engine.load(bundles.bundle(request.param)) as engine:
        yield engine


@pytest.fixture(scope="module")
def hybrid(bundles: Bundles) -> Iterator[Engine]:
    with Engine.load(bundles.bundle("hybrid")) as engine:
        yield engine


def prompts(count: int, longest: int, seed: int = 0) -> list[str]:
    choose = random.Random(seed)
    return ["".join(choose.choices("abcdefghij 가나다", k=choose.randint(1, longest))) for _ in range(count)]


def alone(engine: Engine, prompt: str, **settings: Any) -> list[int]:
    return engine.generate(prompt, **settings).token_ids


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("pieces", [1, None])
def test_same_ids_as_one_by_one(engine: Engine, rows: int, pieces: int | None) -> None:
    """Prompts on both sides of the window, of its buffer and of a piece; answers that end at different times."""
    texts = [*prompts(9, 40), *prompts(2, 400, seed=1)]
    limits = [5 + 13 * (i % 7) for i in range(len(texts))]
    wanted = [alone(engine, text, options=GREEDY, max_new_tokens=n) for text, n in zip(texts, limits, strict=True)]
    with Scheduler(engine, rows, pieces=pieces, shortest_first=pieces is None) as scheduler:
        tickets = [
            scheduler.submit(text, options=GREEDY, max_new_tokens=n) for text, n in zip(texts, limits, strict=True)
        ]
        results = [ticket.result(WAIT) for ticket in tickets]
    assert [result.token_ids for result in results] == wanted
    assert {result.finish_reason for result in results} <= {"length", "stop"}


def test_images_of_different_sizes(bundles: Bundles) -> None:
    noise = np.random.default_rng(3)
    sizes = [(28, 28), (140, 84), (56, 56), (300, 200), (84, 140)]
    pictures = [[Image.fromarray(noise.integers(0, 255, (h, w, 3), np.uint8))] for w, h in sizes]
    pictures += [[], [pictures[0][0], pictures[2][0]]]
    with Engine.load(bundles.bundle("vlm")) as engine:
        settings: dict[str, Any] = {"options": GREEDY, "max_new_tokens": 25}
        wanted = [engine.generate("What is it?", group, **settings).token_ids for group in pictures]
        with Scheduler(engine, 3) as scheduler:
            tickets = [scheduler.submit("What is it?", group, **settings) for group in pictures]
            assert [ticket.result(WAIT).token_ids for ticket in tickets] == wanted


@pytest.mark.parametrize("recipe", ["int8", "int4", "int8-dynamic"])
def test_quantized_bundles_give_the_ids_of_one_by_one(bundles: Bundles, recipe: str) -> None:
    """Kernels for one row and for several add in other orders; on these weights no choice hangs on that."""
    texts = prompts(6, 60, seed=2)
    with Engine.load(bundles.bundle("hybrid", recipe)) as engine:
        wanted = [alone(engine, text, options=GREEDY, max_new_tokens=12) for text in texts]
        with Scheduler(engine, 4) as scheduler:
            tickets = [scheduler.submit(text, options=GREEDY, max_new_tokens=12) for text in texts]
            found = [ticket.result(WAIT).token_ids for ticket in tickets]
    assert found == wanted


def test_fixed_buffers_answer_one_after_the_other(bundles: Bundles) -> None:
    """As on a GPU: requests wait for one another, and are answered all the same."""
    pictures = [[Image.new("RGB", size, "blue")] for size in ((56, 84), (140, 56))]
    settings: dict[str, Any] = {"options": GREEDY, "max_new_tokens": 15}
    with Engine.load(bundles.bundle("vlm")) as engine:
        wanted = [engine.generate("Read it.", group, **settings).token_ids for group in [*pictures, []]]
    with (
        Engine.load(bundles.bundle("vlm"), execution=Execution(fixed_buffers=True)) as engine,
        Scheduler(engine, 3) as scheduler,
    ):
        tickets = [scheduler.submit("Read it.", group, **settings) for group in [*pictures, []]]
        assert [ticket.result(WAIT).token_ids for ticket in tickets] == wanted
        assert scheduler.rows == 1


def test_drawn_answers_depend_on_their_own_seed(hybrid: Engine) -> None:
    settings: list[dict[str, Any]] = [{"temperature": 0.7, "seed": seed, "max_new_tokens": 30} for seed in range(5)]
    wanted = [alone(hybrid, "hello", **one) for one in settings]
    with Scheduler(hybrid, 2) as scheduler:
        tickets = [scheduler.submit("hello", **one) for one in settings]
        assert [ticket.result(WAIT).token_ids for ticket in tickets] == wanted
    assert len(set(map(tuple, wanted))) == 5


def test_streams_say_what_results_say(hybrid: Engine) -> None:
    with Scheduler(hybrid, 2) as scheduler:
        tickets = [scheduler.submit(text, options=GREEDY, max_new_tokens=20) for text in prompts(4, 20)]
        for ticket in tickets:
            chunks = list(ticket)
            assert chunks[-1].result is ticket.result()
            assert sum((chunk.token_ids for chunk in chunks), ()) == tuple(ticket.result().token_ids)
            assert "".join(chunk.text for chunk in chunks if chunk.kind == "text") == ticket.result().text


def shapes_of_passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and tokens of every pass from now on."""
    shapes: list[tuple[int, ...]] = []
    append = RowPasses.append

    def spy(self: RowPasses, row: int, ids: Any) -> Any:
        shapes.append(ids.shape)
        return append(self, row, ids)

    monkeypatch.setattr(RowPasses, "append", spy)
    return shapes


def test_a_pass_takes_the_rows_that_answer_and_no_others(hybrid: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = shapes_of_passes(monkeypatch)
    with Scheduler(hybrid, 4, pieces=None) as scheduler:
        limits = (2, 9, 9, 30, 5)
        tickets = [scheduler.submit("x" * 300, options=GREEDY, max_new_tokens=n) for n in limits]
        lengths = [len(ticket.result(WAIT).token_ids) for ticket in tickets]
    steps = [rows for rows, tokens in shapes if tokens == 1]
    assert sum(steps) == sum(lengths) - len(lengths)  # the first token of each is the prompt's
    assert sum(tokens for rows, tokens in shapes if tokens > 1) == sum(t.result().prompt_tokens for t in tickets)
    assert max(steps) <= 4


def test_prompts_are_read_between_steps(hybrid: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt takes pieces, and those that answer go on between them."""
    shapes = shapes_of_passes(monkeypatch)
    with Scheduler(hybrid, 2, pieces=1) as scheduler:
        first = scheduler.submit("x", options=GREEDY, max_new_tokens=200)
        next(iter(first))
        scheduler.submit("y" * 1200, options=GREEDY, max_new_tokens=2).result(WAIT)
    pieces = [place for place, (_, tokens) in enumerate(shapes) if tokens > 1]
    assert len(pieces) >= 5
    assert all(b - a > 1 for a, b in pairwise(pieces))


def spoilt(engine: Engine, monkeypatch: pytest.MonkeyPatch, when: Any) -> None:
    """Logits of a row are NaN, and so is what it puts into the cache, where `when` says so of its token."""
    append = RowPasses.append

    def run(self: RowPasses, row: int, ids: Any) -> Any:
        logits = append(self, row, ids).copy()
        for place in range(len(ids)):
            if when(ids[place], int(self.cache.lengths[row + place])):
                logits[place] = np.nan
                for array in self.cache._arrays:
                    array[row + place] = np.nan
        return logits

    monkeypatch.setattr(RowPasses, "append", run)


@pytest.mark.parametrize("late", [False, True])
def test_nan_in_a_row_is_that_rows_alone(hybrid: Engine, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    texts = [*prompts(5, 30), BAD, *prompts(5, 30, seed=5)]
    wanted = [alone(hybrid, text, options=GREEDY, max_new_tokens=20) for text in texts]
    length = len(hybrid.prompt(BAD).token_ids)
    others = [len(hybrid.prompt(text).token_ids) for text in texts if text != BAD]
    mark = length + 4 if late else length
    assert all(mark not in range(n, n + 21) for n in others)
    spoilt(hybrid, monkeypatch, lambda ids, now: now == mark)
    with Scheduler(hybrid, 3) as scheduler:
        tickets = [scheduler.submit(text, options=GREEDY, max_new_tokens=20) for text in texts]
        for text, ticket, ids in zip(texts, tickets, wanted, strict=True):
            if text == BAD:
                with pytest.raises(NumericalError, match="NaN"):
                    ticket.result(WAIT)
            else:
                assert ticket.result(WAIT).token_ids == ids


def test_what_cannot_be_used_is_refused_at_once(hybrid: Engine) -> None:
    with Scheduler(hybrid, 2, most_waiting=3) as scheduler:
        with pytest.raises(UsageError, match="empty"):
            scheduler.submit(" ")
        with pytest.raises(UsageError, match="tokens"):
            scheduler.submit("x" * 5000)
        with pytest.raises(UsageError):
            scheduler.submit("x", ["missing.png"])
        with pytest.raises(UsageError):
            scheduler.submit("x", temperature="hot")
        assert scheduler.submit("x", options=GREEDY, max_new_tokens=2).result(WAIT).token_ids
    with pytest.raises(UsageError, match="closed"):
        scheduler.submit("x")
    with pytest.raises(UsageError, match="rows"):
        Scheduler(hybrid, 0)


def test_a_full_queue_says_so(hybrid: Engine) -> None:
    def flood() -> None:
        for _ in range(50):
            scheduler.submit("x", options=GREEDY, max_new_tokens=500)

    with Scheduler(hybrid, 1, most_waiting=2) as scheduler:
        with pytest.raises(ResourceError, match="wait already"):
            flood()
        assert scheduler.waiting <= 2


def test_no_room_for_the_longest(hybrid: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache cannot grow: the row that needs it ends with an error, the others go on."""
    room = KVCache._allocate

    def small(self: KVCache, capacity: int) -> None:
        if capacity > 1100:
            raise ResourceError("cannot hold context", "memory", "it is small")
        room(self, capacity)

    monkeypatch.setattr(KVCache, "_allocate", small)
    monkeypatch.setattr(hybrid, "eos_ids", frozenset())
    with Scheduler(hybrid, 3) as scheduler:
        answered = scheduler.submit("x" * 560, options=GREEDY, max_new_tokens=1200)
        other = scheduler.submit("y", options=GREEDY, max_new_tokens=700)
        read = scheduler.submit("z" * 1150, options=GREEDY, max_new_tokens=5)
        for ticket in (answered, read):
            with pytest.raises(ResourceError, match="small"):
                ticket.result(WAIT)
        ids = other.result(WAIT).token_ids
    assert len(list(answered_ids(answered))) > 100
    wanted = alone(hybrid, "y", options=GREEDY, max_new_tokens=700)
    assert ids[: len(wanted)] == wanted


def answered_ids(ticket: Ticket) -> Iterator[int]:
    """What came before the error."""
    with contextlib.suppress(ResourceError):
        for chunk in ticket:
            yield from chunk.token_ids


def test_cancelling(hybrid: Engine) -> None:
    with Scheduler(hybrid, 2) as scheduler:
        kept = scheduler.submit("kept", options=GREEDY, max_new_tokens=60)
        running = scheduler.submit("running", options=GREEDY, max_new_tokens=1900)
        waiting = scheduler.submit("waiting", options=GREEDY, max_new_tokens=1900)
        waiting.cancel()
        assert next(iter(running)).token_ids
        running.cancel()
        assert waiting.result(WAIT).finish_reason == "cancelled"
        result = running.result(WAIT)
        assert result.finish_reason == "cancelled"
        assert 0 < len(result.token_ids) < 1900
        running.cancel()  # of what has ended
        wanted = kept.result(WAIT).token_ids
    assert wanted == alone(hybrid, "kept", options=GREEDY, max_new_tokens=60)


@pytest.mark.parametrize("held", [True, False], ids=["held back", "given out"])
def test_a_cancelled_stream_says_what_its_result_says(
    hybrid: Engine, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """Text that was held back for a stop string is no longer, and no token is left out."""
    said = hybrid.generate("kept", options=GREEDY, max_new_tokens=60).text
    append, passes = RowPasses.append, [0]
    tickets: list[Ticket] = []

    def cancelling(self: RowPasses, row: int, ids: Any) -> Any:
        passes[0] += 1
        if passes[0] == 20:
            tickets[0].cancel()
        return append(self, row, ids)

    monkeypatch.setattr(RowPasses, "append", cancelling)
    with Scheduler(hybrid, 2) as scheduler:
        stop = (said + "!",) if held else ()
        tickets.append(scheduler.submit("kept", options=GREEDY, max_new_tokens=1900, logprobs=0, stop=stop))
        chunks = list(tickets[0])
        result = tickets[0].result(WAIT)
    assert (result.finish_reason, chunks[-1].result) == ("cancelled", result)
    assert 0 < len(result.token_ids) < 60
    assert sum((chunk.token_ids for chunk in chunks), ()) == tuple(result.token_ids)
    assert [one for chunk in chunks for one in chunk.logprobs or ()] == result.logprobs
    assert "".join(chunk.text for chunk in chunks if chunk.kind == "text") == result.text != ""


def test_closing_ends_what_is_not_done(hybrid: Engine) -> None:
    scheduler = Scheduler(hybrid, 1)
    tickets = [scheduler.submit("x", options=GREEDY, max_new_tokens=1900) for _ in range(3)]
    next(iter(tickets[0]))
    scheduler.close()
    assert [ticket.result(0).finish_reason for ticket in tickets] == ["cancelled"] * 3
    assert list(tickets[0])[-1].finished


def test_many_threads_submit_and_cancel(hybrid: Engine) -> None:
    texts = prompts(6, 30, seed=9)
    wanted = {text: alone(hybrid, text, options=GREEDY, max_new_tokens=25) for text in texts}
    faults: list[str] = []

    def client(number: int, scheduler: Scheduler) -> None:
        choose = random.Random(number)
        for _ in range(6):
            text = choose.choice(texts)
            ticket = scheduler.submit(text, options=GREEDY, max_new_tokens=25)
            if choose.random() < 0.4:
                time.sleep(choose.random() * 0.02)
                ticket.cancel()
            ids = ticket.result(WAIT).token_ids
            whole = ticket.result().finish_reason != "cancelled"
            if ids != wanted[text][: len(ids)] or (whole and len(ids) != len(wanted[text])):
                faults.append(f"{text!r}: {ids}")

    with Scheduler(hybrid, 3) as scheduler:
        threads = [threading.Thread(target=client, args=(number, scheduler)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert not any(thread.is_alive() for thread in threads)
        assert (scheduler.waiting, scheduler.answering) == (0, 0)
    assert faults == []


def test_a_callback_comes_once(hybrid: Engine) -> None:
    ended: list[int] = []
    with Scheduler(hybrid, 2) as scheduler:
        tickets = [scheduler.submit(text, options=GREEDY, max_new_tokens=3) for text in prompts(5, 9)]
        for ticket in tickets:
            ticket.when_done(lambda one: ended.append(one.number))
        for ticket in tickets:
            ticket.result(WAIT)
        deadline = time.monotonic() + WAIT
        while len(ended) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert sorted(ended) == [0, 1, 2, 3, 4]


def test_a_callback_that_fails_is_its_own_affair(hybrid: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def failing(ticket: Ticket) -> None:
        raise ValueError("of the caller")

    with Scheduler(hybrid, 1) as scheduler:
        first = scheduler.submit("x", options=GREEDY, max_new_tokens=1900)
        others = [scheduler.submit("x", options=GREEDY, max_new_tokens=20) for _ in range(3)]
        first.when_done(failing)
        first.cancel()
        assert {len(ticket.result(WAIT).token_ids) for ticket in others} == {20}
        last = scheduler.submit("x", options=GREEDY, max_new_tokens=1900)
        last.when_done(failing)
    assert last.result(0).finish_reason == "cancelled"  # by closing, which nothing keeps from its end
    assert len(caplog.records) == 2
