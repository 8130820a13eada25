from __future__ import annotations

import numpy as np
import pytest

from model.errors import NumericalError
from runtime.decode import Ids, Logits, Token, generate
from runtime.options import GenerationOptions
from runtime.sampling import make_samplers

VOCAB = 50
EOS = {7}


class Counting:
    """A model that says last token + 1, and checks how it is called."""

    def __init__(self, rows: int) -> None:
        self.text: list[list[int]] = [[] for _ in range(rows)]
        self.passes: list[tuple[int, ...]] = []

    def __call__(self, ids: Ids, lengths: Ids) -> Logits:
        assert ids.dtype == np.int64
        self.passes.append(ids.shape)
        first = not any(self.text)
        logits = np.zeros((len(self.text), 1, VOCAB), np.float32)
        for row, text in enumerate(self.text):
            new = int(lengths[row]) - len(text)
            assert first or ids.shape[1] == 1 or len(self.text) == 1
            text += ids[row, :new].tolist()
            logits[row, 0, (text[-1] + 1) % VOCAB] = 9
        return logits


def run(prompts: list[list[int]], limits: list[int], **settings: object) -> tuple[list[list[Token]], Counting]:
    model = Counting(len(prompts))
    samplers = make_samplers(GenerationOptions(do_sample=False), len(prompts))
    steps = list(generate(model, prompts, samplers, limits, EOS, **settings))  # type: ignore[arg-type]
    return steps, model


def ids(steps: list[list[Token]], row: int) -> list[int]:
    return [token.id for step in steps for token in step if token.row == row]


def test_until_the_end_of_turn_or_the_limit() -> None:
    steps, model = run([[1, 2, 3]], [10])
    assert ids(steps, 0) == [4, 5, 6, 7]
    assert [step[0].finish for step in steps] == [None, None, None, "stop"]
    assert model.text == [[1, 2, 3, 4, 5, 6]]
    steps, _ = run([[1, 2, 3]], [2])
    assert [step[0].finish for step in steps] == [None, "length"]
    steps, _ = run([[6]], [1])
    assert steps[0][0] == Token(0, 7, "stop")


def test_a_single_prompt_is_read_in_chunks() -> None:
    steps, model = run([list(range(20, 31))], [3], chunk=4)
    assert model.passes == [(1, 4), (1, 4), (1, 3), (1, 1), (1, 1)]
    assert ids(steps, 0) == [31, 32, 33]


def test_rows_of_a_batch_go_their_own_ways() -> None:
    prompts = [[1, 2, 3, 4, 5], [20], [30, 31]]
    steps, model = run(prompts, [9, 3, 5], pad_id=49)
    assert ids(steps, 0) == [6, 7]
    assert ids(steps, 1) == [21, 22, 23]
    assert ids(steps, 2) == [32, 33, 34, 35, 36]
    assert model.passes[0] == (3, 5)
    for row, prompt in enumerate(prompts):
        assert model.text[row] == prompt + ids(steps, row)[:-1]


def test_the_caller_can_end_a_row() -> None:
    ended: set[int] = set()
    model = Counting(2)
    samplers = make_samplers(GenerationOptions(do_sample=False), 2)
    counts = [0, 0]
    for step in generate(model, [[20], [30]], samplers, [9, 4], EOS, ended=ended):
        for token in step:
            counts[token.row] += 1
            if token.id == 22:
                ended.add(token.row)
    assert counts == [2, 4]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_stops_at_once(bad: float) -> None:
    def broken(ids: Ids, lengths: Ids) -> Logits:
        logits = np.zeros((1, 1, VOCAB), np.float32)
        logits[0, 0, 3] = bad if lengths[0] > 3 else 0
        return logits

    steps = generate(broken, [[1, 2]], [lambda logits, prompt, new: 5], [9], EOS)
    next(steps)
    next(steps)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        next(steps)


def test_samplers_see_prompt_and_answer() -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def sampler(logits: Logits, prompt: object, new: object) -> int:
        seen.append((np.asarray(prompt).tolist(), np.asarray(new).tolist()))
        return 11

    list(generate(Counting(1), [[1, 2]], [sampler], [3], EOS))
    assert seen == [([1, 2], []), ([1, 2], [11]), ([1, 2], [11, 11])]


def test_impossible_rows() -> None:
    for prompts, limits in (([], []), ([[]], [3]), ([[1]], [0])):
        with pytest.raises(ValueError, match="room"):
            run(prompts, limits)  # type: ignore[arg-type]
