"""Two exports to one folder at one time, with locks that work and with locks that do not."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter import lock
from exporter.export import ExportOptions, export_checkpoint
from exporter.lock import Owner, lock_path, output_lock, refuse_if_locked
from exporter.staging import Policy, check_place, reserve
from model.errors import LockedError, UsageError
from tests.faults import crash
from tests.faults.crash import beside, child, tree


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return crash.small_checkpoint(tmp_path / "source", assets=False)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that says yes to every lock."""
    monkeypatch.setattr(fcntl, "flock", lambda handle, operation: None)


@contextmanager
def paused(action: Callable[[], Any], folder: Path, point: int) -> Iterator[Callable[[], tuple[int, dict[str, Any]]]]:
    """An export in a child that stands still before its change number `point`; gives what lets it go on."""
    reached, proceed, notes = folder / "reached", folder / "proceed", folder / "paused.json"

    def fault(count: int, operation: str, path: Path) -> None:
        if count == point:
            reached.touch()
            wait_for(proceed)

    pid = os.fork()
    if pid == 0:
        os._exit(crash._run(action, notes, fault))
    wait_for(reached)
    status: list[int] = []

    def go_on() -> tuple[int, dict[str, Any]]:
        proceed.touch()
        status.append(os.waitpid(pid, 0)[1])
        return status[0], json.loads(notes.read_text())

    try:
        yield go_on
    finally:
        if not status:
            go_on()


def wait_for(path: Path) -> None:
    until = time.monotonic() + crash.LONGEST
    while not path.exists():
        assert time.monotonic() < until, path.name
        time.sleep(0.002)


def test_f10_the_second_export_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with paused(crash.export(source, out), tmp_path, 50) as go_on:
        owner = Owner.parse(lock_path(out).read_bytes())
        assert owner is not None
        before = tree(tmp_path)
        for force in (False, True):
            with pytest.raises(LockedError, match=f"out: process {owner.pid} exports to it right now") as refusal:
                export_checkpoint(source, out, ExportOptions(force=force))
            assert refusal.value.exit_code == 8
        with pytest.raises(LockedError, match=f"process {owner.pid}"):
            check_place(out, source, force=False)
        assert tree(tmp_path) == before
        status, seen = go_on()
    assert (status, seen["outcome"]) == (0, "done")
    assert beside(out) == []
    check_place(tmp_path / "other", source, force=False)


def test_f10_two_threads_of_one_process(source: Path, tmp_path: Path) -> None:
    with output_lock(tmp_path / "out"):
        refused: list[Exception] = []

        def other() -> None:
            try:
                with output_lock(tmp_path / "out"):
                    pass
            except LockedError as failure:
                refused.append(failure)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert str(os.getpid()) in str(refused[0])
        assert lock_path(tmp_path / "out").exists()
    assert not lock_path(tmp_path / "out").exists()


def test_f10_other_folders_have_other_locks(tmp_path: Path) -> None:
    long = "x" * 255
    names = {lock_path(tmp_path / name).name for name in ("a", "b", ".a", "a.export-lock", long, "y" + long[1:])}
    assert len(names) == 6
    assert all(len(os.fsencode(name)) <= 255 for name in names)


@pytest.mark.parametrize("start", ["1", ""])
def test_f11_the_lock_of_a_dead_process_is_taken_over(source: Path, tmp_path: Path, start: str) -> None:
    """Even if another process has got its number since: then the start time differs."""
    dead = replace(Owner.current(), start=start)
    lock_path(tmp_path / "out").write_bytes(dead.dump())
    status, seen = child(crash.export(source, tmp_path / "out"), tmp_path / "notes")
    assert (status, seen.outcome) == (0, "done")
    assert beside(tmp_path / "out") == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"pid": "1"}', b"\xff" * 5000, b"[" * 5000])
def test_f11_a_lock_file_with_anything_in_it(tmp_path: Path, content: bytes) -> None:
    lock_path(tmp_path / "out").write_bytes(content)
    refuse_if_locked(tmp_path / "out")
    with output_lock(tmp_path / "out") as locks_hold:
        assert locks_hold
        assert Owner.parse(lock_path(tmp_path / "out").read_bytes()) == Owner.current()
    assert not lock_path(tmp_path / "out").exists()


def test_f11_a_lock_file_that_is_no_file(tmp_path: Path, source: Path) -> None:
    os.mkfifo(lock_path(tmp_path / "out"))
    with pytest.raises(UsageError, match="not an ordinary file"), reserve(tmp_path / "out", source, Policy()):
        pass
    lock_path(tmp_path / "out").unlink()
    (tmp_path / "mine").write_text("precious")
    lock_path(tmp_path / "out").symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError), reserve(tmp_path / "out", source, Policy()):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_f12_without_locks_the_file_tells(source: Path, tmp_path: Path, no_locks: None) -> None:
    out = tmp_path / "out"
    with paused(crash.export(source, out), tmp_path, 50) as go_on:
        with pytest.raises(LockedError, match="exports to it right now"):
            export_checkpoint(source, out)
        assert go_on()[1]["outcome"] == "done"
    assert beside(out) == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("point", [30, 50, 70])
def test_f12_two_at_once_never_mix(source: Path, tmp_path: Path, no_locks: None, force: bool, point: int) -> None:
    """Without locks and without the lock file: each writes in its own folder, one comes first, none is mixed."""
    out, notes = tmp_path / "out", tmp_path / "notes"
    other = crash.small_checkpoint(tmp_path / "other", seed=5, assets=False)
    child(crash.export(source, tmp_path / "first"), notes)
    child(crash.export(other, tmp_path / "second"), notes)
    with paused(crash.export(source, out, force=force), tmp_path, point) as go_on:
        lock_path(out).unlink()
        status, seen = child(crash.export(other, out), notes)
        assert (status, seen.outcome, seen.resumed) == (0, "done", 0)
        assert tree(out) == tree(tmp_path / "second")
        status, late = go_on()
    if force:
        assert late["outcome"] == "done"
        assert tree(out) == tree(tmp_path / "first")
    else:
        assert "it appeared while this export ran" in late["outcome"]
        assert late["code"] == 2
        assert tree(out) == tree(tmp_path / "second")
    assert beside(out) == []


def test_f12_the_partial_of_a_living_process_is_left_alone(source: Path, tmp_path: Path, no_locks: None) -> None:
    """The same checkpoint and options, so that only its owner keeps it from being taken over."""
    out = tmp_path / "out"
    with paused(crash.export(source, out, force=True), tmp_path, 70) as go_on:
        lock_path(out).unlink()
        _, seen = child(crash.export(source, out), tmp_path / "notes")
        assert (seen.outcome, seen.resumed) == ("done", 0)
        wanted = tree(out)
        assert go_on()[1]["outcome"] == "done"
    assert tree(out) == wanted
    assert beside(out) == []


def test_f12_of_two_that_take_over_one_partial_one_gets_it(source: Path, tmp_path: Path, no_locks: None) -> None:
    """The first stands still in the middle of taking it over, wherever that is."""
    wanted: dict[str, str] = {}
    for point in range(5, 22, 2):
        folder = tmp_path / str(point)
        folder.mkdir()
        out = folder / "out"
        child(crash.export(source, out), folder / "notes", crash.kill_at(70))
        with paused(crash.export(source, out, force=True), folder, point) as go_on:
            lock_path(out).unlink(missing_ok=True)
            status, seen = child(crash.export(source, out), folder / "notes")
            assert (status, seen.outcome) == (0, "done")
            wanted = wanted or tree(out)
            assert tree(out) == wanted
            status, late = go_on()
        assert late["outcome"] == "done", late["outcome"]
        assert not (seen.resumed and late["resumed"])
        assert tree(out) == wanted
        assert beside(out) == []


def test_who_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    me = Owner.current()
    assert me.runs()
    assert replace(me, start="1").runs() is False
    assert replace(me, boot="another", start="1").runs() is False
    assert replace(me, host="another", boot="another").runs() is None
    assert replace(me, space="another").runs() is None
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    born = lock._start_of(ended)
    os.waitpid(ended, 0)
    assert replace(me, pid=ended, start=born or "1").runs() is False
    monkeypatch.setattr(lock, "_text", lambda path: "")  # no /proc
    blind = Owner.current()
    assert blind.start == ""
    assert blind.runs()
    assert replace(blind, pid=ended).runs() is False


def test_f11_the_lock_of_a_killed_export_holds_nobody_up(source: Path, tmp_path: Path) -> None:
    child(crash.export(source, tmp_path / "out"), tmp_path / "notes", crash.kill_at(40))
    assert lock_path(tmp_path / "out").exists()
    refuse_if_locked(tmp_path / "out")
