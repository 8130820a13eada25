"""A calibration that is killed goes on behind its last finished layer, and ends in the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.export import ExportOptions, export_checkpoint
from exporter.partials import staging_folders
from model.config import load_config
from quantize.apply import Quantizer
from quantize.calibration.job import Calibration
from quantize.recipe import Recipe, Rule
from quantize.scheme import Scheme
from tests import calibrating
from tests.faults import crash
from tests.faults.crash import Seen, beside, child, kill_at, tree

RECIPE = Recipe(
    "calibrated",
    (
        Rule("*.embed_tokens", Scheme(4, 32)),
        Rule("*.gate_proj", Scheme(4, 32, method="rtn")),
        Rule("*", Scheme(4, 32, symmetric=False, method="gptq")),
    ),
)


def export(source: Path, out: Path, seed: int = 0, **options: Any) -> Callable[[], Any]:
    def action() -> Any:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        prompts = calibrating.random_prompts(load_config(source), (5, 7), seed)
        return export_checkpoint(source, out, ExportOptions(**options), Quantizer(RECIPE, 1, Calibration(prompts)))

    return action


class Calibrated:
    """An export with calibration, and what it made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, folder / "notes.json"
        changes: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3}
        self.source = crash.small_checkpoint(folder / "source", assets=False, **changes)
        status, self.calm = child(export(self.source, folder / "calm"), self.notes)
        assert (status, self.calm.outcome) == (0, "done")
        self.wanted = tree(folder / "calm")

    def killed(self, name: str, point: int) -> list[str]:
        """Kills an export at a change of the disk; names of the layers that are done."""
        out = self.folder / name
        status, _ = child(export(self.source, out), self.notes, kill_at(point))
        assert os.WIFSIGNALED(status)
        folders = [folder / "work" for folder in staging_folders(out)]
        return sorted(path.name for folder in folders for path in folder.glob("*.safetensors"))

    def again(self, name: str, seed: int = 0, **options: Any) -> Seen:
        status, seen = child(export(self.source, self.folder / name, seed, **options), self.notes)
        assert (status, seen.outcome) == (0, "done")
        return seen


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return Calibrated(tmp_path_factory.mktemp("calibrated"))


def test_f30_kill_while_calibrating(trial: Calibrated) -> None:
    counts = set()
    for point in range(8, len(trial.calm.operations), 11):
        name = f"point{point}"
        done = trial.killed(name, point)
        counts.add(len(done))
        if (trial.folder / name).exists():
            continue  # behind its last step
        seen = trial.again(name)
        assert tree(trial.folder / name) == trial.wanted, point
        assert beside(trial.folder / name) == []
        layers = {read.split(".")[2] for _, read in seen.read if "q_proj" in read}
        assert layers == {str(i) for i in range(max(0, len(done) - 1), 3)}, "a finished layer was calibrated again"
    assert len(counts) > 3


def test_f30_other_prompts_do_not_go_on(trial: Calibrated) -> None:
    point = len(trial.calm.operations) // 2
    trial.killed("other", point)
    assert trial.again("other", seed=1).resumed == 0
    assert tree(trial.folder / "other") != trial.wanted
    trial.killed("refused", point)
    status, seen = child(export(trial.source, trial.folder / "refused", 1, resume=True), trial.notes)
    assert status != 0
    assert "cannot resume: refused: it was begun with --quantize calibrated" in seen.outcome


@pytest.mark.parametrize("kind", ["safetensors", "states"])
def test_f30_a_spoiled_file_is_made_again(trial: Calibrated, kind: str) -> None:
    # A layer counts once its file has got its name; nothing else is renamed before the bundle is complete.
    third = [number for number, operation in enumerate(trial.calm.operations, 1) if operation == "rename"][2]
    name = f"spoiled-{kind}"
    assert len(trial.killed(name, third + 2)) == 3
    (folder,) = staging_folders(trial.folder / name)
    spoiled = max((folder / "work").glob(f"*.{kind}"))
    content = bytearray(spoiled.read_bytes())
    content[-1] ^= 1
    spoiled.write_bytes(content)
    trial.again(name)
    assert tree(trial.folder / name) == trial.wanted


def test_f30_bytes_do_not_depend_on_threads_that_quantize(trial: Calibrated, tmp_path: Path) -> None:
    prompts = calibrating.random_prompts(load_config(trial.source), (5, 7))

    def action() -> Any:
        torch.set_num_threads(1)
        return export_checkpoint(
            trial.source, tmp_path / "out", ExportOptions(), Quantizer(RECIPE, 4, Calibration(prompts))
        )

    status, seen = child(action, trial.notes)
    assert (status, seen.outcome) == (0, "done")
    assert tree(tmp_path / "out") == trial.wanted
