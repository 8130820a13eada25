"""Bundles whose window layers keep their window only, run far beyond it, against transformers and full caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import exaone_export as ee
from model.bundle import DECODER, window_layers
from runtime import decode, forward
from runtime.engine import Engine
from runtime.options import GenerationOptions
from tests.e2e.conftest import Bundles

WINDOW, SLACK = 8, 64
GREEDY = GenerationOptions(do_sample=False)
CLOSE = 2e-4


def words(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(100, 500, length).tolist()


@pytest.fixture(scope="module")
def engine(bundles: Bundles) -> Engine:
    return Engine.load(bundles.bundle("hybrid"))


@pytest.fixture(scope="module")
def full(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same model with caches that grow, as bundles of earlier versions have them."""
    folder = tmp_path_factory.mktemp("full") / "bundle"
    ee.export(bundles.source("hybrid"), folder, kv_cache="full")
    return Engine.load(folder)


def test_layouts_are_read_off_the_graphs(engine: Engine, full: Engine) -> None:
    assert window_layers(engine.graphs.manifest.graph(DECODER)) == (0, 1, 2)
    assert window_layers(full.graphs.manifest.graph(DECODER)) == ()
    assert engine.graphs.forward(1).cache.buffer == WINDOW + SLACK
    assert full.graphs.forward(1).cache.buffer == 0


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW, WINDOW + SLACK, 200])
def test_as_many_ids_as_with_full_caches(engine: Engine, full: Engine, length: int) -> None:
    """Greedy ids over several evictions."""
    ids = words(length)
    results = [runner.generate_ids(ids, options=GREEDY, max_new_tokens=150).token_ids for runner in (engine, full)]
    assert results[0] == results[1]


def test_as_many_ids_as_transformers_gives(bundles: Bundles, engine: Engine) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bundles.source("hybrid"), dtype=torch.float32).eval()
    for length in (3, 90):
        given = torch.tensor([words(length)])
        for use_cache in (True, False):
            out = model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=90, use_cache=use_cache
            )
            result = engine.generate_ids(given[0].tolist(), options=GREEDY, max_new_tokens=90)
            assert result.token_ids == out[0, length:].tolist()


@pytest.mark.parametrize("chunk", [1, 7, WINDOW, WINDOW + 1, 100])
def test_prompts_in_chunks(engine: Engine, full: Engine, chunk: int) -> None:
    ids = np.array(words(5 * WINDOW + SLACK))
    wanted = full.logits(ids.tolist())[-1]
    logits = decode.prefill(engine.graphs.forward(1), [ids], chunk=chunk)
    np.testing.assert_allclose(logits[0, -1], wanted, atol=CLOSE)


@pytest.mark.parametrize(
    "lengths",
    [(3, 40, 1, 9), (6, 7, 7), (40, 37, 40, 38), (72, 70, 71), (73, 72, 70), (90, 90), (300, 300), (2, 600, 71)],
    ids=["apart", "window", "padded", "buffer", "beyond", "equal", "large", "chunks"],
)
def test_rows_of_different_lengths(engine: Engine, full: Engine, lengths: tuple[int, ...]) -> None:
    """Rows that end at different times give what each gives alone, whether or not they were read together."""
    rows = [words(length, seed) for seed, length in enumerate(lengths)]
    limits = [30, 90, 7, 60][: len(rows)]
    wanted = [full.generate_ids(row, options=GREEDY, max_new_tokens=90).token_ids for row in rows]
    together = engine.generate_ids(rows, options=GREEDY, max_new_tokens=90)
    assert [result.token_ids for result in together] == wanted
    steps = decode.generate(
        engine.graphs.forward(len(rows)), rows, [lambda logits, *_: int(logits.argmax())] * len(rows), limits, ()
    )
    found: list[list[int]] = [[] for _ in rows]
    for token in (token for step in steps for token in step):
        found[token.row].append(token.id)
    for ids, expected, limit in zip(found, wanted, limits, strict=True):
        assert len(ids) == limit
        assert ids[: len(expected)] == expected[:limit]


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_logits_of_prompts_read_one_by_one(engine: Engine, full: Engine, keep: int) -> None:
    lengths = np.array([80, 2, 75])
    ids = np.zeros((3, 80), np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = words(length, row)
    one, other = (runner.graphs.forward(3)(ids, lengths, keep) for runner in (engine, full))
    assert one.shape == other.shape
    for row, length in enumerate(lengths):
        given = slice(0, length) if keep == 0 else slice(-min(keep, length), None)
        np.testing.assert_allclose(one[row, given], other[row, given], atol=CLOSE)


def test_images_in_rows_read_one_by_one(bundles: Bundles) -> None:
    """Each row gets its own image's features."""
    pictures = [np.full((56, 84, 3), shade, np.uint8) for shade in (30, 220)]
    with Engine.load(bundles.bundle("vlm")) as engine:
        count = engine.requests.image_processor.token_count(engine.requests.scaled(pictures)[0])
        rows = [[*words(80, i), *[67] * count, *words(3, i)] for i in range(2)] + [words(4)]
        images = [[pictures[0]], [pictures[1]], []]
        together = engine.generate_ids(rows, images, options=GREEDY, max_new_tokens=20)
        for row, group, result in zip(rows, images, together, strict=True):
            assert engine.generate_ids(row, group, options=GREEDY, max_new_tokens=20).token_ids == result.token_ids


def test_going_back_a_few_tokens(engine: Engine, full: Engine) -> None:
    """Where the cache says that it can be rewound, going on from there is as if nothing had come after."""
    ids = np.array(words(400))
    wanted = full.logits(ids.tolist())
    run = engine.graphs.forward(1)
    done, refused = 0, 0
    while done < 300:
        run(ids[None, done : done + 10], np.array([done + 10]))
        done += 10
        if not run.cache.can_rewind([done - 4]):
            refused += 1
            continue
        run.cache.rewind([done - 4])
        logits = run(ids[None, done - 4 : done], np.array([done]), keep=0)
        np.testing.assert_allclose(logits[0], wanted[done - 4 : done], atol=CLOSE)
    assert 0 < refused < 10


def test_the_cache_takes_what_is_reckoned(engine: Engine) -> None:
    run = engine.graphs.forward(2)
    run(np.array([words(500), words(500, 1)]), np.array([500, 500]))
    cache = run.cache
    held = sum(array.nbytes for array in cache._arrays)
    assert held == 2 * cache.layout.size(cache.buffer).of(cache.capacity)
    assert held < 2 * cache.capacity * 4 * 256 * 0.6  # 4 layers of 2 heads of 16, keys and values


def test_pieces_are_as_small_as_they_say(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, ...]] = []
    run = engine.graphs.forward(2)
    inner = forward.TextForward._inputs
    monkeypatch.setattr(
        forward.TextForward,
        "_inputs",
        lambda self, ids: passes.append(ids.shape) or inner(self, ids),  # type: ignore[func-returns-value]
    )
    decode.prefill(run, [np.array(words(700)), np.array(words(3))])
    assert passes == [(1, 256), (1, 256), (1, 188), (1, 3)]


def test_old_bundles_still_quantize(bundles: Bundles, full: Engine, tmp_path: Path) -> None:
    ee.quantize(full.graphs.folder, tmp_path / "int4", recipe="int4")
    with Engine.load(tmp_path / "int4") as one, Engine.load(bundles.bundle("hybrid", "int4")) as other:
        ids = words(30)
        assert window_layers(one.graphs.manifest.graph(DECODER)) == ()
        assert "sliding_window" not in (tmp_path / "int4" / "genai_config.json").read_text()
        assert (
            one.generate_ids(ids, options=GREEDY, max_new_tokens=90).token_ids
            == other.generate_ids(ids, options=GREEDY, max_new_tokens=90).token_ids
        )
