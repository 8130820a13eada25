from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from model.errors import NumericalError
from runtime.options import PRESETS, GenerationOptions
from runtime.sampling import (
    Logits,
    apply_min_p,
    apply_presence_penalty,
    apply_repetition_penalty,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    make_sampler,
    make_samplers,
)

NO_IDS: list[int] = []


def random_logits(size: int, seed: int = 0) -> Logits:
    return np.random.default_rng(seed).normal(0, 4, size).astype(np.float32)


def hugging_face(name: str, logits: Logits, ids: list[int], *args: Any, **kwargs: Any) -> npt.NDArray[np.float32]:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    result = getattr(process, name)(*args, **kwargs)(torch.tensor([ids]), torch.from_numpy(logits.copy())[None])
    array: npt.NDArray[np.float32] = result[0].numpy()
    return array


@pytest.mark.parametrize("size", [5, 1000, 5000])
@pytest.mark.parametrize("value", [0.05, 0.5, 0.95, 0.999])
def test_top_p_and_min_p_keep_what_transformers_keeps(size: int, value: float) -> None:
    logits = random_logits(size, seed=size)
    expected = hugging_face("TopPLogitsWarper", logits, [0], top_p=value)
    np.testing.assert_array_equal(apply_top_p(logits, value), expected)
    np.testing.assert_array_equal(
        apply_min_p(logits, value), hugging_face("MinPLogitsWarper", logits, [0], min_p=value)
    )


@pytest.mark.parametrize("k", [1, 3, 20, 999, 1000, 4000])
def test_top_k_keeps_what_transformers_keeps(k: int) -> None:
    logits = random_logits(1000)
    logits[::7] = logits[7]  # ties
    np.testing.assert_array_equal(apply_top_k(logits, k), hugging_face("TopKLogitsWarper", logits, [0], top_k=k))


def test_temperature_and_repetition_penalty_equal_transformers() -> None:
    logits, ids = random_logits(1000), [3, 3, 17, 999, 0]
    np.testing.assert_array_equal(
        apply_temperature(logits, 0.6), hugging_face("TemperatureLogitsWarper", logits, [0], 0.6)
    )
    expected = hugging_face("RepetitionPenaltyLogitsProcessor", logits, ids, 1.3)
    np.testing.assert_allclose(apply_repetition_penalty(logits, ids, 1.3), expected, rtol=1e-6)


def test_a_flat_distribution_needs_more_than_the_first_nucleus() -> None:
    logits = np.zeros(50_000, np.float32)
    assert np.isfinite(apply_top_p(logits, 0.5)).sum() == 25_000


def test_presence_penalty_counts_generated_tokens_once() -> None:
    logits = np.zeros(4, np.float32)
    np.testing.assert_array_equal(apply_presence_penalty(logits, [1, 1, 3], 1.5), [0, -1.5, 0, -1.5])
    sampler = make_sampler(GenerationOptions(presence_penalty=1.5))
    assert sampler(np.array([1, 0], np.float32), [0, 0], NO_IDS) == 0  # the prompt does not count
    assert sampler(np.array([1, 0], np.float32), [0, 0], [0]) == 1


def test_repetition_penalty_counts_prompt_and_generated() -> None:
    sampler = make_sampler(GenerationOptions(repetition_penalty=4.0))
    logits = np.array([2, 1, 0.3], np.float32)
    assert sampler(logits, NO_IDS, NO_IDS) == 0
    assert sampler(logits, [0], NO_IDS) == 1
    assert sampler(logits, [0], np.array([1, 0])) == 0


def test_greedy_is_argmax_and_leaves_logits_alone() -> None:
    logits = random_logits(153_600)
    kept = logits.copy()
    assert make_sampler(GenerationOptions())(logits, NO_IDS, NO_IDS) == int(logits.argmax())
    make_sampler(PRESETS["document"])(logits, [1, 2], [3])
    np.testing.assert_array_equal(logits, kept)


def test_drawing_follows_the_distribution() -> None:
    logits = np.array([0.0, 1.0, 2.0, -np.inf, 0.5], np.float32)
    sampler = make_sampler(GenerationOptions(temperature=0.7, seed=11))
    counts = np.bincount([sampler(logits, NO_IDS, NO_IDS) for _ in range(20_000)], minlength=5)
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    assert counts[3] == 0
    np.testing.assert_allclose(counts / 20_000, expected, atol=0.015)


def test_seeds_reproduce_and_rows_are_independent_of_the_batch() -> None:
    logits = random_logits(500)
    options = GenerationOptions(temperature=2.0, seed=2**64 - 1)

    def draws(row: int, rows: int) -> list[int]:
        sampler = make_samplers(options, rows)[row]
        return [sampler(logits, NO_IDS, NO_IDS) for _ in range(30)]

    assert draws(0, 1) == draws(0, 3)
    assert draws(1, 2) == draws(1, 3)
    assert draws(0, 2) != draws(1, 2)
    assert draws(0, 1) != [make_sampler(options.merged(seed=5))(logits, NO_IDS, NO_IDS) for _ in range(30)]


@pytest.mark.parametrize("options", [GenerationOptions(), GenerationOptions(temperature=0.5, top_p=0.9)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unusable_logits_are_numerical_errors(options: GenerationOptions, bad: float) -> None:
    logits = random_logits(10)
    logits[4] = bad
    with pytest.raises(NumericalError, match="token 4"):
        make_sampler(options)(logits, NO_IDS, NO_IDS)
    with pytest.raises(NumericalError, match="everywhere"):
        make_sampler(options)(np.full(10, -np.inf, np.float32), NO_IDS, NO_IDS)


def test_extreme_but_allowed_values_stay_finite() -> None:
    logits = random_logits(100) * np.float32(1e3)
    for options in (
        GenerationOptions(temperature=1e-300, seed=0),
        GenerationOptions(temperature=1e-5, top_p=1e-9, seed=0),
        GenerationOptions(temperature=100.0, top_p=1.0, min_p=1.0, seed=0),
    ):
        assert make_sampler(options)(logits, NO_IDS, NO_IDS) == int(logits.argmax())


def test_a_large_vocabulary_is_sampled_in_milliseconds() -> None:
    logits = random_logits(153_600)
    sampler = make_sampler(PRESETS["general"].merged(seed=1, repetition_penalty=1.1))
    ids = np.arange(4096)
    times = []
    for _ in range(20):
        start = time.process_time()
        sampler(logits, ids, ids)
        times.append(time.process_time() - start)
    assert min(times) < 0.1  # about 0.01; sorting the vocabulary in Python would take ten times as long
