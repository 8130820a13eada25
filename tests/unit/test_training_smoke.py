"""Training for a few steps: it runs, saves, goes on where it stopped, and exports."""

import json
import sys
from pathlib import Path

import pytest

from model.load import load_exaone
from training import export_demo, train_demo


@pytest.mark.slow
def test_training_saves_resumes_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        train_demo.main() if arguments[0] == "--batch" else export_demo.main()

    for steps in ("2", "3"):
        run("--batch", "2", "--stage", "4", "--minutes", "1", "--steps", steps, str(tmp_path))
        assert json.loads((tmp_path / "state.json").read_text())["step"] == int(steps)
    (tmp_path / "checkpoint").mkdir()
    run(str(tmp_path / "state.safetensors"), str(tmp_path / "checkpoint"))
    assert load_exaone(tmp_path / "checkpoint").mtp is not None
