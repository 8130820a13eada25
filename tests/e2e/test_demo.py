"""The demonstration: every answer of every bundle, what is told of them, and the exit code of a wrong one."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from exaone_export import cli, demo
from exaone_export.demo import Sample, abilities
from exaone_export.demo import run as demonstration
from exaone_export.demo.run import DemoBundle, DemoReport
from exaone_export.demo.tasks import TASKS


@pytest.mark.slow
def test_all_answers_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [bundle["quantize"] for bundle in report["bundles"]] == list(demonstration.RECIPES)
    assert report["correct"] == report["total"] == 3 * len(demonstration.shown())
    for bundle in report["bundles"]:
        assert {reading["task"] for reading in bundle["readings"]} == set(abilities().tasks)
        assert all(reading["text"] == reading["expected"] for reading in bundle["readings"])


class Engine:
    """Says the same to everyone."""

    def __init__(self, text: str, reasoning: str) -> None:
        self.text, self.reasoning = text, reasoning
        self.thinking: list[bool] = []

    def generate(self, prompt: str, images: Any, **settings: Any) -> SimpleNamespace:
        self.thinking.append(settings["enable_thinking"])
        return SimpleNamespace(text=self.text, reasoning=self.reasoning if self.thinking[-1] else "")


def told(sample: Sample, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> tuple[int, str]:
    """Exit code and output of a demonstration of one answer."""
    reading = demonstration._read(engine, sample)  # type: ignore[arg-type]
    bundle = DemoBundle("none", None, 1_000_000, 32.0, 1.0, (reading,))

    def run_demo(out: object, progress: object, tell: Any) -> DemoReport:
        tell(bundle)
        return DemoReport("x", (bundle,), int(reading.correct), 1)

    monkeypatch.setattr(demonstration, "run_demo", run_demo)
    code = cli.main(["demo", "--quiet"])
    return code, capsys.readouterr().out


def test_a_wrong_answer_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sample, engine = demonstration.shown()[0], Engine("12.50\n", "One word.")
    name = sample.paths[0].name
    right = replace(sample, text="12.50")
    code, text = told(right, engine, capsys, monkeypatch)
    assert (code, f"{name}: {sample.prompt} -> '12.50', right" in text) == (0, True)
    code, text = told(replace(sample, text="12.60"), engine, capsys, monkeypatch)
    assert (code, "'12.50', WRONG, expected '12.60'" in text, "0 of 1 answers" in text) == (7, True, True)
    code, text = told(replace(right, reasoning="One word."), engine, capsys, monkeypatch)
    assert (code, "-> (thinks 'One word.') '12.50', right" in text) == (0, True)
    code, text = told(replace(right, reasoning="Two words."), engine, capsys, monkeypatch)
    assert (code, "WRONG, expected (thinks 'Two words.') '12.50'" in text) == (7, True)
    assert engine.thinking == [False, False, True, True]
    code, text = told(replace(right, paths=(), prompt="a=1\nb=2\nWhat is b?"), engine, capsys, monkeypatch)
    assert "  2 lines of text: What is b? -> '12.50'" in text


def test_all_that_can_be_done_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in (("line",), ("line", "receipt", "question", "two", "find")):
        monkeypatch.setattr(demo, "abilities", lambda known=known: replace(abilities(), tasks=known))
        shown = demonstration.shown()
        assert {sample.task for sample in shown} == set(known)
        assert len(shown) <= 8
        assert all(path.is_file() for sample in shown for path in sample.paths)
    assert any(sample.reasoning for sample in shown)
    assert set(known) == set(TASKS) - {"copy"}
