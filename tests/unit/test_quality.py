"""The figures of quality on distributions whose divergence is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from exaone_export.verifying.scores import Scores, compare, figures, summed_up

POSITION = np.zeros(1, np.int64)


def test_divergence_of_known_distributions() -> None:
    source, bundle = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    given, wanted = (np.log(p).astype(np.float32) + 7 for p in (bundle, source))
    scores = compare(given, wanted, np.array([0, 2]), POSITION)
    assert scores.divergence[0] == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2), rel=1e-6)
    assert not scores.agrees[0]
    assert (scores.found[0], scores.expected[0]) == (pytest.approx(np.log(0.5)), pytest.approx(np.log(0.25)))


def test_equal_distributions_do_not_diverge_and_shifts_do_not_matter() -> None:
    logits = np.random.default_rng(0).normal(0, 30, (150, 300)).astype(np.float32)
    scores = compare(logits + np.float32(4), logits, np.zeros(151, np.int64), np.arange(150))
    assert len(scores.divergence) == 150
    assert scores.divergence.min() >= 0
    assert scores.divergence.max() < 1e-8
    assert scores.agrees.all()


def test_not_a_number_is_kept() -> None:
    scores = compare(np.full((1, 4), np.nan, np.float32), np.zeros((1, 4), np.float32), np.array([1, 1]), POSITION)
    found = figures(scores)
    assert math.isnan(found.mean_kld)
    assert math.isnan(found.max_kld)


def random_scores(rng: np.random.Generator, count: int) -> Scores:
    expected = -rng.exponential(1.0, count)
    found = expected + rng.normal(0, 0.1, count)
    return Scores(rng.exponential(0.1, count), rng.random(count) < 0.9, np.minimum(found, -1e-3), expected)


def test_standard_errors_are_what_repeating_the_measurement_shows() -> None:
    rng = np.random.default_rng(3)
    repeats = [figures(random_scores(rng, 400)) for _ in range(300)]
    names = ("mean_kld", "p99_kld", "same_top", "ppl", "ppl_source", "ppl_ratio", "mean_dp", "rms_dp")
    for name in names:
        spread = np.std([getattr(one, name) for one in repeats])
        claimed = np.mean([one.standard_errors[name] for one in repeats])
        assert claimed == pytest.approx(spread, rel=0.35 if name == "p99_kld" else 0.15), name


def test_figures_of_the_true_tokens() -> None:
    found, expected = np.log(np.array([0.5, 0.25])), np.log(np.array([0.25, 0.25]))
    one = figures(Scores(np.array([0.1, 0.3]), np.array([True, False]), found, expected))
    assert one.ppl == pytest.approx(math.sqrt(8))
    assert one.ppl_source == pytest.approx(4)
    assert one.ppl_ratio == pytest.approx(math.sqrt(0.5))
    assert one.mean_dp == pytest.approx(0.125)
    assert one.rms_dp == pytest.approx(math.sqrt(0.25**2 / 2))
    assert one.mean_kld == pytest.approx(0.2)
    assert (one.max_kld, one.same_top) == (0.3, 0.5)


def test_one_position_has_no_standard_errors() -> None:
    assert figures(random_scores(np.random.default_rng(0), 1)).standard_errors == {}


def test_groups_are_parts_of_the_whole() -> None:
    rng = np.random.default_rng(1)
    texts = [
        ({"modality": "text", "language": "ko"}, random_scores(rng, 30)),
        ({"modality": "image", "language": "ko"}, random_scores(rng, 20)),
        ({"modality": "text", "language": ""}, random_scores(rng, 50)),
    ]
    found = summed_up(texts)
    assert found.tokens == 100
    assert {name: one.tokens for name, one in found.groups["modality"].items()} == {"text": 80, "image": 20}
    assert {name: one.tokens for name, one in found.groups["language"].items()} == {"ko": 50}
    parts = found.groups["modality"].values()
    assert sum(one.tokens * one.mean_kld for one in parts) == pytest.approx(100 * found.mean_kld)
    assert found.groups["modality"]["image"] == figures(texts[1][1])
