"""Scores, labels and spans out of logits."""

from __future__ import annotations

import numpy as np
import pytest

from model.labels import LabelConfig
from runtime.answers import best_span, classification, softmax, token_labels, trimmed

LABELS = ("bad", "fair", "good")


def row(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_one_of_several_labels() -> None:
    found = classification(row(0.0, 2.0, 1.0), LabelConfig(LABELS))
    assert [score.label for score in found.scores] == ["fair", "good", "bad"]
    assert sum(score.score for score in found.scores) == pytest.approx(1)
    assert found.score == pytest.approx(np.exp(2) / (1 + np.e + np.exp(2)))


@pytest.mark.parametrize("labels", [LabelConfig(("only",)), LabelConfig(LABELS, "multi_label_classification")])
def test_labels_that_do_not_exclude_one_another(labels: LabelConfig) -> None:
    logits = row(*[-3.0, 0.0, 800.0][-len(labels.names) :])
    scores = {score.label: score.score for score in classification(logits, labels).scores}
    assert scores[labels.names[-1]] == 1
    assert scores.get("fair", 0.5) == 0.5
    assert scores.get("bad", 0.0474) == pytest.approx(1 / (1 + np.exp(3)), abs=1e-4)


def test_regression_leaves_values_alone() -> None:
    found = classification(row(-7.25, -100.0), LabelConfig(("price", "rent"), "regression"))
    assert (found.label, found.score) == ("price", -7.25)
    assert found.scores[1].score == -100


def test_equal_scores_keep_the_labels_order() -> None:
    assert [s.label for s in classification(row(1, 1, 1), LabelConfig(LABELS)).scores] == list(LABELS)


def test_tokens_that_the_tokenizer_added_have_no_label() -> None:
    logits = np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9]], np.float32)
    found = token_labels(logits, LabelConfig(LABELS), "rye bread", [None, (0, 3), (3, 9)])
    assert [(t.label, t.text, t.start, t.end) for t in found] == [("fair", "rye", 0, 3), ("good", " bread", 3, 9)]
    assert found[0].score == pytest.approx(float(softmax(np.array([0.0, 9.0, 0.0]))[1]))


def test_spans_against_all_pairs() -> None:
    random = np.random.default_rng(0)
    for length in (1, 2, 7, 30):
        start, end = random.normal(0, 2, (2, length)).astype(np.float32)
        p, q = (softmax(logits.astype(np.float64)) for logits in (start, end))
        for longest in (1, 3, length, length + 5):
            first, last, score = best_span(start, end, longest)
            pairs = {(i, j): p[i] * q[j] for i in range(length) for j in range(i, min(length, i + longest))}
            assert (first, last) in pairs
            assert score == pairs[first, last] == max(pairs.values())


def test_of_equal_spans_the_first_and_shortest_wins() -> None:
    zeros = np.zeros(5, np.float32)
    assert best_span(zeros, zeros, 4)[:2] == (0, 0)


@pytest.mark.parametrize(
    ("start", "end", "text", "offsets"), [(3, 8, "rye", (4, 7)), (4, 7, "rye", (4, 7)), (7, 8, "", (7, 7))]
)
def test_answers_have_no_white_space_at_their_ends(start: int, end: int, text: str, offsets: tuple[int, int]) -> None:
    found = trimmed("the rye loaf", start, end, 0.5)
    assert (found.text, (found.start, found.end)) == (text, offsets)
