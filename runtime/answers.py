"""What the heads' logits mean: labels with scores, and the span of a text that answers a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.labels import MULTI_LABEL, REGRESSION, LabelConfig

Scores = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LabelScore:
    """One label. `score` is a probability, but in a regression the output as it is."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """What a text is.

    Attributes:
        label, score: of the highest score.
        scores: of every label, the highest first.
    """

    label: str
    score: float
    scores: tuple[LabelScore, ...]


@dataclass(frozen=True)
class TokenLabel:
    """What a token is.

    Attributes:
        label, score: the likeliest label and its probability.
        text: what the token stands for.
        start, end: of its characters in the text; tokens that share the bytes of a character share it.
    """

    label: str
    score: float
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """The part of a context that answers a question.

    Attributes:
        text: that part.
        score: its probability among all parts, long ones included.
        start, end: of its characters in the context.
    """

    text: str
    score: float
    start: int
    end: int


def classification(logits: Logits, labels: LabelConfig) -> Classification:
    """The labels of one text, by transformers' rules.

    Regression leaves logits [labels] as they are; several labels that may hold together, or one alone, take the
    logistic function; else softmax.
    """
    wide = logits.astype(np.float64)
    if labels.problem_type == REGRESSION:
        scores = wide
    elif labels.problem_type == MULTI_LABEL or len(labels.names) == 1:
        scores = np.exp(-np.logaddexp(0.0, -wide))
    else:
        scores = softmax(wide)
    order = np.argsort(-scores, kind="stable")
    ranked = tuple(LabelScore(labels.names[i], float(scores[i])) for i in order)
    return Classification(ranked[0].label, ranked[0].score, ranked)


def token_labels(
    logits: Logits, labels: LabelConfig, text: str, spans: Sequence[tuple[int, int] | None]
) -> tuple[TokenLabel, ...]:
    """The likeliest label of every token of a text: logits [tokens, labels]; tokens whose span is None are left out."""
    scores = softmax(logits.astype(np.float64))
    best = scores.argmax(-1)
    return tuple(
        TokenLabel(labels.names[i], float(row[i]), text[span[0] : span[1]], *span)
        for i, row, span in zip(best, scores, spans, strict=True)
        if span is not None
    )


def best_span(start: Logits, end: Logits, longest: int) -> tuple[int, int, float]:
    """First and last token of the likeliest answer, and its probability.

    A span's probability is that of its start times that of its end, each a softmax over all tokens; among equal ones
    the first and then the shortest is taken.

    Args:
        start, end: logits [tokens] of the context's tokens alone.
        longest: tokens that an answer may have.
    """
    starts, ends = softmax(start.astype(np.float64)), softmax(end.astype(np.float64))
    best = (-1.0, 0, 0)
    for more in range(min(longest, len(starts))):
        products = starts[: len(starts) - more] * ends[more:]
        first = int(products.argmax())
        best = max(best, (float(products[first]), -first, -(first + more)))
    return -best[1], -best[2], best[0]


def trimmed(context: str, start: int, end: int, score: float) -> Answer:
    """The answer context[start:end] without white space at its ends."""
    found = context[start:end]
    text = found.strip()
    start += len(found) - len(found.lstrip()) if text else 0
    return Answer(text, score, start, start + len(text))


def softmax(logits: Scores) -> Scores:
    """Probabilities over the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    shares: Scores = powers / powers.sum(-1, keepdims=True)
    return shares
