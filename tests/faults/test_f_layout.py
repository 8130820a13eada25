"""A bundle in folders of its own, as transformers.js wants it, is made as surely as ours: whole or not at all."""

from __future__ import annotations

import pytest

from tests.faults import crash
from tests.faults.crash import child, kill_at
from tests.faults.trial import Trial


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("layout")
    source = crash.small_checkpoint(folder / "source", "vlm")
    return Trial(folder, lambda out: crash.export(source, out, layout="transformersjs"))


def test_f04_kill_at_boundaries(trial: Trial) -> None:
    resumed = 0
    for point in range(1, len(trial.calm.operations) + 1, 7):
        done = trial.kill(f"point{point}", kill_at(point))
        trial.end(f"point{point}", done)
        resumed += len(done)
    assert resumed > 20
    names = [name for name in trial.wanted if name.startswith("onnx/")]
    assert sum(name.endswith(".onnx") for name in names) == sum(name.endswith("_data") for name in names) == 3


def test_f04_strays_of_another_layout_go(trial: Trial) -> None:
    """A table that our own layout stores once is stored for each graph here: nothing of an earlier run fits."""
    out = trial.folder / "other"
    source = trial.folder / "source"
    child(crash.export(source, out), trial.notes, kill_at(60))
    status, seen = child(trial.make(out), trial.notes)
    assert (status, seen.outcome, seen.resumed) == (0, "done", 0)
    assert crash.tree(out) == trial.wanted
    assert crash.beside(out) == []
