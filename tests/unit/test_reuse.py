"""What prompts have in common, and what is kept of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from model.config import load_config
from model.progress import NullProgress
from runtime.feature_cache import FeatureCache
from runtime.graphs import Graphs
from runtime.media import MediaReader
from runtime.reuse import common_prefix, media_runs, prompt_keys
from tests.tiny import make_checkpoint

PAD = 7
ONE = 6 * 64 * 4  # bytes of features of a picture


def test_tokens_of_images_have_keys_of_what_they_show() -> None:
    ids = [1, PAD, PAD, 2, PAD, PAD, PAD, 3]
    keys = prompt_keys(ids, [("a", 2), ("b", 3)], {PAD})
    assert keys == [1, ("a", 0), ("a", 1), 2, ("b", 0), ("b", 1), ("b", 2), 3]
    assert list(media_runs(ids, [2, 3], {PAD})) == [(1, 3), (4, 7)]
    # Two images side by side are two.
    assert prompt_keys([PAD] * 3, [("a", 2), ("b", 1)], {PAD}) == [("a", 0), ("a", 1), ("b", 0)]
    # A placeholder that no image stands for is a token.
    assert prompt_keys([PAD, 1], [], {PAD}) == [PAD, 1]


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [
        ([], [1], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 9], [1, 2, 3, 4], 2),
        ([1, ("a", 0), ("a", 1), 2], [1, ("a", 0), ("a", 1), 2], 4),
        ([1, ("a", 0), ("a", 1), 2], [1, ("b", 0), ("b", 1), 2], 1),
        ([PAD], [("a", 0)], 0),
    ],
)
def test_what_prompts_have_in_common(first: list[Any], second: list[Any], length: int) -> None:
    assert common_prefix(first, second) == common_prefix(second, first) == length


class Encoder:
    """Stands for `Graphs`: features that say which picture was encoded."""

    def __init__(self, folder: Path) -> None:
        self.config = load_config(folder)
        self.runs: list[int] = []

    def encode(self, values: Any, grids: Any, tokens: int) -> Any:
        self.runs.append(len(grids))
        return np.full((tokens, 64), float(values.mean()), np.float32)


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return Encoder(make_checkpoint(tmp_path / "vlm", "vlm"))


def cache_of(encoder: Encoder, tmp_path: Path, budget: int) -> FeatureCache:
    reader = MediaReader(tmp_path / "vlm", encoder.config)
    return FeatureCache(cast(Graphs, encoder), reader, NullProgress(), budget)


def picture(grey: int) -> Image.Image:
    return Image.new("RGB", (84, 56), (grey, grey, grey))


def test_what_was_used_last_is_kept_within_the_budget(encoder: Encoder, tmp_path: Path) -> None:
    cache = cache_of(encoder, tmp_path, 2 * ONE)
    for name in ("a", "b", "a", "c", "a", "b"):
        (features,) = cache.of([(name, picture(ord(name)))])
        assert features.shape == (6, 64)
        assert cache.bytes <= 2 * ONE
    # "b" had to go for "c", and came again.
    assert cache.encoded == 4
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, True, False)


def test_one_picture_twice_in_a_prompt_is_encoded_once(encoder: Encoder, tmp_path: Path) -> None:
    cache = cache_of(encoder, tmp_path, 10 * ONE)
    found = cache.of([("a", picture(1)), ("b", picture(2)), ("a", picture(1))])
    assert cache.encoded == sum(encoder.runs) == 2
    assert found[0] is found[2]
    assert len(found) == 3


def test_what_is_larger_than_the_budget_is_not_kept(encoder: Encoder, tmp_path: Path) -> None:
    cache = cache_of(encoder, tmp_path, ONE - 1)
    for _ in range(2):
        cache.of([("a", picture(1))])
    assert (cache.encoded, cache.bytes) == (2, 0)


def test_an_encoding_that_is_stopped_keeps_nothing(encoder: Encoder, tmp_path: Path) -> None:
    cache = cache_of(encoder, tmp_path, 10 * ONE)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.of([("a", picture(1))], stop)
    assert (cache.encoded, "a" in cache, encoder.runs) == (0, False, [])
