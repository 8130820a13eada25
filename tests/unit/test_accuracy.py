"""The demonstration checkpoint's own tasks in `verify`: what is asked, and when."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_export.demo import abilities, checkpoint_folder, exam
from exaone_export.demo.exam import THINK, Asked, draw
from exaone_export.demo.tasks import LEVELS
from exaone_export.verifying import accuracy
from exaone_export.verifying.accuracy import Accuracy, measure_accuracy, of_demonstration, overall, wilson
from model.bundle import file_sha256
from model.progress import NullProgress
from tests.unit.test_card import make_manifest


def test_only_bundles_of_the_demonstration_checkpoint_are_asked() -> None:
    digest = file_sha256(checkpoint_folder() / "model.safetensors")
    for files, expected in (
        ({"model.safetensors": digest}, True),
        ({"model.safetensors": "0" * 64}, False),
        ({}, False),
    ):
        assert of_demonstration(make_manifest(source={"id": "x", "revision": None, "files": files})) is expected


@pytest.mark.parametrize(("right", "count"), [(0, 50), (50, 50), (49, 50), (1980, 2000)])
def test_intervals_hold_the_share_and_stay_within_bounds(right: int, count: int) -> None:
    low, high = wilson(right, count)
    assert 0 <= low <= right / count <= high + 1e-12 <= 1 + 1e-12
    assert high - low < 4 / count**0.5


def test_a_known_interval() -> None:
    assert list(wilson(1981, 2000)) == pytest.approx([0.98521, 0.99391], abs=1e-4)


def test_tasks_count_as_often_as_they_are_asked() -> None:
    assert overall([Accuracy("a", 10, 1.0, (0, 1)), Accuracy("b", 30, 0.5, (0, 1))]) == pytest.approx(0.625)


class Answer:
    """What an engine gives back."""

    def __init__(self, reasoning: str, text: str) -> None:
        self.reasoning, self.text = reasoning, text


def test_answers_count_if_they_are_right_to_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {
        (one.task, one.work.prompt, str(one.work.pages)): one.work
        for task in ("line", "receipt", THINK)
        for one in draw(task, 40, accuracy.SEED, ("line", "receipt"))
    }
    asked: list[str] = []

    class Engine:
        def __init__(self, graphs: object) -> None:
            pass

        def generate(self, prompts: list[str], images: list[list[Any]], **settings: Any) -> list[Answer]:
            assert all(len(own) == 1 for own in images)
            assert settings["do_sample"] is False
            answers = []
            for one in batch:
                asked.append(one.task)
                work = wanted[one.task, one.work.prompt, str(one.work.pages)]
                assert settings["enable_thinking"] is (one.task == THINK)
                reasoning = work.reasoning if settings["enable_thinking"] else ""
                # Of lines a quarter is wrong, of thoughts those that come after the tenth.
                spoilt = one.task == "line" and asked.count("line") % 4 == 0
                wrong_thought = one.task == THINK and asked.count(THINK) > 10
                answers.append(Answer(f"{reasoning}{'.' * wrong_thought}", f"{work.answer}{'?' * spoilt} \n"))
            return answers

    batch: list[Asked] = []

    def answers(engine: Any, part: list[Asked]) -> list[tuple[str, str]]:
        batch[:] = part
        return exam.answers(engine, part)

    monkeypatch.setattr(accuracy, "Engine", Engine)
    monkeypatch.setattr(accuracy, "answers", answers)
    monkeypatch.setattr(accuracy, "TASKS", ("line", "receipt"))
    graphs: Any = None
    found = {one.task: one for one in measure_accuracy(graphs, NullProgress(), samples=40)}
    assert len(asked) == sum(one.asked for one in found.values()) == 120
    assert {task: one.exact for task, one in found.items()} == {"line": 0.75, "receipt": 1.0, THINK: 0.25}
    assert found["line"].interval_95 == wilson(30, 40)


def test_batches_hold_every_exercise_once_and_never_mix_reasoning() -> None:
    work = [*draw("line", 21, 1), *draw(THINK, 13, 1)]
    parts = list(exam.batches(work, 8))
    assert sorted(i for part in parts for i in part) == list(range(34))
    assert all(len(part) <= 8 and len({work[i].thinking for i in part}) == 1 for part in parts)
    assert len(parts) == 3 + 2


def test_the_packaged_checkpoint_is_the_one_whose_tasks_are_listed() -> None:
    assert abilities().weights_sha256 == file_sha256(checkpoint_folder() / "model.safetensors")
    assert set(abilities().tasks) <= set(LEVELS)
    assert "line" in abilities().tasks
