"""A list of prompts: each gets what it would get alone, however many are answered at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from model.errors import NumericalError
from runtime import many
from runtime.engine import Engine
from runtime.execution import Execution
from runtime.options import GenerationOptions
from runtime.rows import RowPasses
from tests.e2e.conftest import Bundles
from tests.e2e.test_scheduler import prompts, shapes_of_passes, spoilt

GREEDY = GenerationOptions(do_sample=False, max_new_tokens=20)


@pytest.fixture(scope="module")
def engine(bundles: Bundles) -> Iterator[Engine]:
    with Engine.load(bundles.bundle("vlm")) as engine:
        yield engine


@pytest.mark.parametrize("most", [1, 3, 32])
def test_same_ids_in_the_same_order(engine: Engine, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(many, "MOST_ROWS", most)
    noise, choose = np.random.default_rng(5), random.Random(6)
    texts = [*prompts(6, 30), *prompts(2, 300, seed=1)]
    pictures = [
        [Image.fromarray(noise.integers(0, 255, (28 * choose.randint(1, 4), 56, 3), np.uint8)) for _ in range(count)]
        for count in (0, 1, 2, 0, 0, 1, 0, 1)
    ]
    alone = [engine.generate(*pair, options=GREEDY).token_ids for pair in zip(texts, pictures, strict=True)]
    assert [result.token_ids for result in engine.generate(texts, pictures, options=GREEDY)] == alone


def test_a_row_that_is_done_is_taken_by_the_next(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is spent on one that has ended, and none waits for the longest of a group."""
    monkeypatch.setattr(many, "MOST_ROWS", 2)
    shapes = shapes_of_passes(monkeypatch)
    results = engine.generate(prompts(7, 20), options=GREEDY)
    steps = [rows for rows, tokens in shapes if tokens == 1]
    assert max(steps) == 2
    assert sum(steps) == sum(len(result.token_ids) - 1 for result in results)


def test_draws_depend_on_the_place_in_the_list(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    options = GenerationOptions(temperature=1.0, seed=4, max_new_tokens=12)
    first, again, longer = (
        [result.token_ids for result in engine.generate(["same"] * count, options=options)] for count in (4, 4, 6)
    )
    monkeypatch.setattr(many, "MOST_ROWS", 2)
    narrow = [result.token_ids for result in engine.generate(["same"] * 4, options=options)]
    assert first == again == narrow == longer[:4]
    assert len(set(map(tuple, longer))) == 6
    assert first[0] == engine.generate("same", options=options).token_ids


def test_one_that_fails_fails_the_list(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a", "b", "z" * 300, "c"]
    mark = len(engine.prompt(texts[2]).token_ids)
    assert mark > 300
    with monkeypatch.context() as patch:
        spoilt(engine, patch, lambda _, now: now == mark)
        with pytest.raises(NumericalError, match="NaN"):
            engine.generate(texts, options=GREEDY)
    alone = [engine.generate(text, options=GREEDY).token_ids for text in texts]
    assert [result.token_ids for result in engine.generate(texts, options=GREEDY)] == alone


def test_fixed_buffers_read_a_list_as_ever(bundles: Bundles, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nothing moves rows there, so all are answered in step."""
    texts = prompts(3, 30)
    alone = [engine.generate(text, options=GREEDY).token_ids for text in texts]
    monkeypatch.delattr(RowPasses, "append")
    with Engine.load(bundles.bundle("vlm"), execution=Execution(fixed_buffers=True)) as fixed:
        assert [result.token_ids for result in fixed.generate(texts, options=GREEDY)] == alone


def test_rows_are_as_many_as_there_is_memory_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = engine.graphs
    cache = graphs.forward(1).cache
    each = cache.layout.size(cache.buffer).of(1000)
    for there, rows in ((None, 9), (7 * each, 3), (each, 1), (0, 1), (100 * each, 9)):
        monkeypatch.setattr(many, "available_bytes", lambda there=there: there)
        assert many.rows_that_fit(graphs, 1000, 9) == rows
