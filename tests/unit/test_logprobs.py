from __future__ import annotations

import math

import numpy as np
import pytest

from runtime.choosing import make_choosers
from runtime.logprobs import token_logprob
from runtime.options import GenerationOptions


class Bytes:
    hidden_ids: tuple[int, ...] = ()

    def token_bytes(self, token_id: int) -> bytes:
        return "가".encode()[token_id : token_id + 1] if token_id < 3 else b"x" * token_id


def test_they_are_the_models_own() -> None:
    logits = np.log(np.array([0.5, 0.125, 0.25, 0.125], np.float32)) + 100
    found = token_logprob(logits, 1, 3, Bytes())
    assert found.logprob == pytest.approx(math.log(0.125), abs=1e-5)
    assert [item.token_id for item in found.top_logprobs] == [0, 2, 1]  # of equal ones the first
    assert [item.logprob for item in found.top_logprobs] == pytest.approx(
        [math.log(0.5), math.log(0.25), math.log(0.125)], abs=1e-5
    )
    assert bytes(found.top_logprobs[0].bytes + found.bytes + found.top_logprobs[1].bytes).decode() == "가"
    assert found.token == "\ufffd"
    assert token_logprob(logits, 3, 0, None).top_logprobs == []
    assert len(token_logprob(logits, 3, 20, None).top_logprobs) == 4


def test_every_token_of_every_row_is_told_whatever_draws_it() -> None:
    random = np.random.default_rng(0)
    options = GenerationOptions(
        temperature=0.5, top_k=2, presence_penalty=1.0, repetition_penalty=1.2, seed=1, logprobs=2
    )
    rows = make_choosers(options, [None, None], Bytes())
    for chooser in rows:
        said: list[int] = []
        for _ in range(5):
            logits = random.standard_normal(50).astype(np.float32)
            said.append(chooser(logits, [1], said))
            assert chooser.last_told is not None
            plain = logits.astype(np.float64)
            assert chooser.last_told.logprob == pytest.approx(plain[said[-1]] - np.log(np.exp(plain).sum()), abs=1e-5)
        told = chooser.told(5)
        assert told is not None
        assert [item.token_id for item in told] == said
        assert not chooser.complete


def test_nothing_is_told_unasked() -> None:
    chooser = make_choosers(GenerationOptions(), [None], None)[0]
    assert chooser(np.zeros(4, np.float32), [1], []) == 0
    assert (chooser.told(1), chooser.last_told) == (None, None)
