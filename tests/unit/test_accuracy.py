"""The demonstration checkpoint's own tasks in `verify`: what is asked, and when."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_export.demo import checkpoint_folder
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

    def __init__(self, text: str) -> None:
        self.text = text


def test_answers_count_if_they_are_right_to_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    wanted = {one.prompt + str(one.pages): one.answer for batch in accuracy._batches("line", 40) for one in batch}
    answers = iter(one.answer for batch in accuracy._batches("line", 40) for one in batch)

    class Engine:
        def __init__(self, graphs: object) -> None:
            pass

        def generate(self, prompts: list[str], images: list[list[Any]], **_: object) -> list[Answer]:
            asked.extend(prompts)
            assert all(len(own) == 1 for own in images)
            right = [next(answers) for _ in prompts]
            return [Answer(f"{text} \n" if len(asked) <= 16 else f"{text}?") for text in right]

    monkeypatch.setattr(accuracy, "Engine", Engine)
    monkeypatch.setattr(accuracy, "TASKS", ("line",))
    graphs: Any = None
    (found,) = measure_accuracy(graphs, NullProgress(), samples=40)
    assert len(wanted) > 30
    assert len(asked) == found.asked == 40
    assert found.exact == pytest.approx(16 / 40)
    assert found.interval_95 == wilson(16, 40)
