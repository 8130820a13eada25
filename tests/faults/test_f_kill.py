"""SIGKILL at every change of the disk, and at random times: the same command goes on and ends in the same bytes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from exporter import disk, journal
from exporter.export import export_checkpoint
from exporter.journal import Journal
from tests.faults import crash
from tests.faults.crash import beside, child, kill_at, tree
from tests.faults.trial import Trial, finished_parts


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("kills")
    source = crash.small_checkpoint(folder / "source", assets=False)
    return Trial(folder, lambda out: crash.export(source, out))


def test_f04_kill_at_every_boundary(trial: Trial) -> None:
    points = len(trial.calm.operations)
    resumed = 0
    for point in range(1, points + 1):
        done = trial.kill(f"point{point}", kill_at(point))
        trial.end(f"point{point}", done)
        resumed += len(done)
    assert points > 70
    assert resumed > points  # most of them had something to go on with


def test_f04_kill_in_the_middle_of_writes(trial: Trial) -> None:
    for number in range(1, trial.calm.operations.count("write") + 1, 2):
        done = trial.kill(f"torn{number}", before=crash.tear(number))
        trial.end(f"torn{number}", done)


@pytest.mark.parametrize("kind", ["vlm", "dense"])
def test_f04_kill_where_weights_are_shared(tmp_path: Path, kind: str) -> None:
    """By graphs, or by the table and the head of one graph."""
    source = crash.small_checkpoint(tmp_path / "source", kind)
    trial = Trial(tmp_path, lambda out: crash.export(source, out))
    for point in range(1, len(trial.calm.operations) + 1, 13):
        trial.end(f"point{point}", trial.kill(f"point{point}", kill_at(point)))


def test_f04_kill_again_and_again(trial: Trial) -> None:
    """Each run is killed a few changes after it went on, and still all parts get done."""
    done: set[str] = set()
    runs = 0
    while len(done) < len(trial.calm.made):
        now = trial.kill("often", kill_at(36))
        assert done < now, "a run came no further"
        done, runs = now, runs + 1
    assert runs > 2
    trial.end("often", done)


def test_f04_kill_while_quantizing_a_bundle(tmp_path: Path) -> None:
    source = crash.small_checkpoint(tmp_path / "source")
    status, _ = child(lambda: export_checkpoint(source, tmp_path / "float"), tmp_path / "notes")
    assert status == 0
    trial = Trial(tmp_path, lambda out: crash.rewrite(tmp_path / "float", out))
    for point in range(2, len(trial.calm.operations) + 1, 9):
        trial.end(f"point{point}", trial.kill(f"point{point}", kill_at(point)))


def test_f05_kill_at_random_times(trial: Trial) -> None:
    draw = random.Random(5)
    for number in range(10):
        trial.end(f"random{number}", trial.strike(f"random{number}", draw.uniform(0, 0.12)))


@pytest.mark.parametrize("atomic", [True, False], ids=["one step", "two steps"])
def test_f13_kill_while_replacing(tmp_path: Path, atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --force the old bundle stays valid until the new one is there."""
    if not atomic:
        monkeypatch.setattr(disk, "_rename_at", lambda *_: False)
    notes, out = tmp_path / "notes", tmp_path / "out"
    child(crash.export(crash.small_checkpoint(tmp_path / "a", seed=1, assets=False), tmp_path / "old"), notes)
    replace = crash.export(crash.small_checkpoint(tmp_path / "b", seed=2, assets=False), out, force=True)
    shutil.copytree(tmp_path / "old", out)
    status, seen = child(replace, notes)
    assert (status, seen.outcome) == (0, "done")
    old, new = tree(tmp_path / "old"), tree(out)
    states = []
    for point in range(seen.operations.index("exchange") - 2, len(seen.operations) + 1):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out)
        child(replace, notes, kill_at(point))
        found = tree(out) if out.exists() else {}
        states.append("old" if found == old else "new" if found == new else "absent" if not found else "mixed")
        status, seen = child(replace, notes)
        assert (status, seen.outcome) == (0, "done")
        assert tree(out) == new
        assert beside(out) == []
    assert set(states) == ({"old", "new"} if atomic else {"old", "new", "absent"})


@pytest.fixture
def journal_of_three(tmp_path: Path) -> Path:
    made = Journal.create(tmp_path / "journal", journal.Header({}, {}, {}, "x"))
    for part in "abc":
        made.append(journal.Entry(part, (), {"bias": part.encode()}))
    made.close()
    return tmp_path / "journal"


def test_f21_the_last_line_cut_at_every_byte(journal_of_three: Path) -> None:
    whole = journal_of_three.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for length in range(last, len(whole)):
        journal_of_three.write_bytes(whole[:length])
        opened = Journal.reopen(journal_of_three)
        assert opened is not None
        assert [opened.take(part) is not None for part in "abc"] == [True, True, False]
        opened.append(journal.Entry("c", (), {"bias": b"c"}))
        opened.close()
        assert journal_of_three.read_bytes() == whole


def test_f21_resume_with_a_truncated_last_line(trial: Trial) -> None:
    out = trial.folder / "truncated"
    done = trial.kill("truncated", kill_at(60))
    (folder,) = trial.folder.glob("truncated.partial-*")
    path = folder / journal.FILE
    path.write_bytes(path.read_bytes()[:-7])
    assert len(finished_parts(out)) == len(done) - 1
    trial.end("truncated", finished_parts(out))


def test_the_fault_points_are_those_of_an_export(trial: Trial) -> None:
    kinds = set(trial.calm.operations)
    assert kinds == {
        "make folder", "open", "write", "truncate", "sync", "sync folder", "rename", "remove", "remove folder",
    }  # fmt: skip
