"""The figures of quality on distributions whose divergence is known."""

from __future__ import annotations

import numpy as np
import pytest

from exaone_export.quality import _compare


def test_divergence_of_known_distributions() -> None:
    source, bundle = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    given, wanted = (np.log(p).astype(np.float32) + 7 for p in (bundle, source))
    divergence, agrees, found, expected = _compare(given, wanted, np.array([2]))
    assert divergence[0] == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2), rel=1e-6)
    assert not agrees[0]
    assert (found[0], expected[0]) == (pytest.approx(np.log(0.5)), pytest.approx(np.log(0.25)))


def test_equal_distributions_do_not_diverge_and_shifts_do_not_matter() -> None:
    logits = np.random.default_rng(0).normal(0, 30, (50, 1000)).astype(np.float32)
    divergence, agrees, _, _ = _compare(logits + np.float32(4), logits, np.zeros(50, np.int64))
    assert divergence.min() >= 0
    assert divergence.max() < 1e-8
    assert agrees.all()


def test_not_a_number_is_kept() -> None:
    bad = np.full((1, 4), np.nan, np.float32)
    divergence, *_ = _compare(bad, np.zeros((1, 4), np.float32), np.array([1]))
    assert np.isnan(divergence).all()
