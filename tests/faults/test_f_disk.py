"""Disks that are full, limited, cut off from power, or wrong."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from exaone_export import cli
from exporter import disk
from exporter import export as export_room
from exporter.export import ExportOptions, export_checkpoint
from exporter.lock import Owner
from model.bundle import MANIFEST
from model.errors import ResourceError
from model.progress import NullProgress
from tests.declared import declare_readers
from tests.faults import crash, power
from tests.faults.crash import beside, child, fail_at, tree


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return crash.small_checkpoint(tmp_path / "source")


@pytest.fixture(autouse=True)
def quick_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_room, "_trace", declare_readers)


class Filling(NullProgress):
    """Fills the disk when a share of the weights is written."""

    def __init__(self, folder: Path, share: float) -> None:
        self.folder, self.share = folder, share

    def start(self, label: str, total: float, unit: str) -> None:
        self.left = total * self.share if label == "writing decoder" else float("inf")

    def advance(self, amount: float) -> None:
        self.left -= amount
        if self.left <= 0:
            self.left = float("inf")
            free = shutil.disk_usage(self.folder).free
            with (self.folder / "filler").open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, free)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, where the system lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_f01_a_disk_that_gets_full(source: Path, small_disk: Path, share: float) -> None:
    out = small_disk / "out"
    with pytest.raises(ResourceError, match=r"No space left .*[kMG]B are needed in all, .*[kMG]B are free") as refusal:
        export_checkpoint(source, out, progress=Filling(small_disk, share))
    assert refusal.value.exit_code == 6
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_f01_a_full_disk_and_keep_partial(source: Path, small_disk: Path, tmp_path: Path) -> None:
    out, keep = small_disk / "out", ExportOptions(keep_partial=True)
    with pytest.raises(ResourceError):
        export_checkpoint(source, out, keep, progress=Filling(small_disk, 0.5))
    (small_disk / "filler").unlink()
    report = export_checkpoint(source, out, ExportOptions(resume=True))
    assert report.resumed_parts > 1
    export_checkpoint(source, tmp_path / "calm")
    assert tree(out) == tree(tmp_path / "calm")
    assert [path.name for path in small_disk.iterdir()] == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_f01_no_room_from_any_point_on(source: Path, tmp_path: Path, code: int) -> None:
    _, calm = child(crash.export(source, tmp_path / "calm"), tmp_path / "notes")
    for point in range(1 + code % 7, len(calm.operations), 11):
        status, seen = child(crash.export(source, tmp_path / "out"), tmp_path / "notes", fail_at(point, code))
        if status == 0:  # it failed where nothing was lost any more: cleaning up
            assert tree(tmp_path / "out") == tree(tmp_path / "calm")
            shutil.rmtree(tmp_path / "out")
        else:
            assert (seen.code, os.strerror(code) in seen.outcome) == (6, True), seen.outcome
            assert not (tmp_path / "out").exists()
        assert beside(tmp_path / "out") == []


def test_f02_too_little_room_is_known_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object) -> None:
        raise AssertionError("it was traced")

    monkeypatch.setattr(export_room, "_trace", no_work)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ResourceError, match=r"not enough disk space: .* needed, [\d.]+ kB are free") as refusal:
        export_checkpoint(source, tmp_path / "out")
    assert refusal.value.exit_code == 6
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_f02_what_is_written_already_needs_no_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(crash.export(source, tmp_path / "calm"), tmp_path / "notes")
    child(crash.export(source, tmp_path / "out"), tmp_path / "notes", crash.kill_at(80))
    (partial,) = tmp_path.glob("out.partial-*")
    written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    usage = shutil.disk_usage(tmp_path)
    whole = sum(path.stat().st_size for path in (tmp_path / "calm").iterdir())
    room = usage._replace(free=whole - written + 200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    status, seen = child(crash.export(source, tmp_path / "out"), tmp_path / "notes")
    assert (status, seen.outcome) == (0, "done")
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def limited(source: Path, out: Path, size: int, point: int) -> Callable[[], int]:
    """The command line, for which files get a limit of size before its change number `point`."""

    def run() -> int:
        count = 0

        def about_to(operation: str, path: Path) -> None:
            nonlocal count
            count += 1
            if count == point:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        disk.about_to = about_to
        os._exit(cli.main(["export", str(source), str(out)]))

    return run


@pytest.mark.parametrize(
    ("point", "why"),
    [
        (1, r"cannot export: out: its largest file takes [\d.]+ [kM]B, a file may hold [\d.]+ kB\. Raise the limit"),
        (40, r"cannot write bundle: out: File too large \(.* needed in all, one file may hold [\d.]+ kB\)\. "),
    ],
)
def test_f03_a_limit_of_file_sizes(
    source: Path, tmp_path: Path, point: int, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status, _ = child(limited(source, tmp_path / "out", 60_000, point), tmp_path / "notes")
    assert os.WIFEXITED(status), "SIGXFSZ ended it"
    assert os.WEXITSTATUS(status) == 6
    error = capfd.readouterr().err
    assert re.match(f"error: {why}", error), error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert beside(tmp_path / "out") == []


def test_f09_the_power_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any moment: what has its final name is whole, and the rest is gone on with to the same end."""
    source = crash.small_checkpoint(tmp_path / "source", assets=False)
    root, notes = tmp_path / "root", tmp_path / "notes"
    root.mkdir()
    recorder = power.Recorder(root)
    gone = replace(Owner.current(), start="1")
    with monkeypatch.context() as patch:
        recorder.install(patch)
        patch.setattr(Owner, "current", lambda: gone)  # after the cut, this process is no more
        crash.export(source, root / "out")()
    wanted = tree(root / "out")
    shutil.rmtree(root)
    draw = random.Random(9)
    outcomes: dict[str, int] = {}
    for number in range(40):
        root.mkdir()
        left = tmp_path / f"left{number}"
        left.mkdir()
        cut = draw.randint(1, len(recorder.steps)) if number < 34 else len(recorder.steps) - draw.randint(0, 9)
        power.after_power_cut(recorder.steps[:cut], root, left, draw)
        root.rmdir()
        if (left / "out").exists():
            assert tree(left / "out") == wanted
            kind = "whole"
        else:
            status, seen = child(crash.export(source, left / "out"), notes)
            assert (status, seen.outcome) == (0, "done")
            assert tree(left / "out") == wanted
            assert beside(left / "out") == []
            kind = "resumed" if seen.resumed else "anew"
        outcomes[kind] = outcomes.get(kind, 0) + 1
    assert min(outcomes[kind] for kind in ("whole", "resumed", "anew")) > 2, outcomes


def test_f09_a_bundle_that_lost_data_is_called_damaged(source: Path, tmp_path: Path) -> None:
    """Whatever a disk forgets of a bundle later, `verify` says so."""
    export_checkpoint(source, tmp_path / "out")
    draw = random.Random(3)
    for path in sorted((tmp_path / "out").iterdir()):
        content = path.read_bytes()
        start = draw.randrange(len(content))
        for lost in (content[:start], content[:start] + bytes(len(content) - start)):
            if lost == content:
                continue
            path.write_bytes(lost)
            assert cli.main(["verify", str(tmp_path / "out"), "--quiet"]) == 4, path.name
        path.write_bytes(content)
    assert cli.main(["verify", str(tmp_path / "out"), "--quiet"]) == 0


@pytest.mark.parametrize("which", ["weights", "padding"])
def test_f19_a_bit_that_flips_on_the_way_to_the_disk(
    source: Path, tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at = disk.write_at
    flipped: list[Path] = []

    def flipping(handle: int, data: memoryview, offset: int, path: Path) -> None:
        write_at(handle, data, offset, path)
        is_padding = not any(data)
        if path.suffix == ".data" and is_padding == (which == "padding") and not flipped:
            flipped.append(path)
            os.pwrite(handle, bytes([data[data.nbytes // 2] ^ 8]), offset + data.nbytes // 2)

    monkeypatch.setattr(disk, "write_at", flipping)
    with pytest.raises(ResourceError, match=r"decoder\.onnx\.data: what is read back is not what was written"):
        crash.export(source, tmp_path / "out")()
    assert flipped
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_f19_a_bit_that_flips_after_a_kill(source: Path, tmp_path: Path) -> None:
    """A finished part that is not what it was is made again, and those before it are not."""
    out, notes = tmp_path / "out", tmp_path / "notes"
    child(crash.export(source, tmp_path / "calm"), notes)
    child(crash.export(source, out), notes, crash.kill_at(85))
    (data,) = tmp_path.glob("out.partial-*/bundle/decoder.onnx.data")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    status, seen = child(crash.export(source, out), notes)
    assert (status, seen.outcome) == (0, "done")
    assert tree(out) == tree(tmp_path / "calm")
    assert 0 < seen.resumed < len(seen.made) + seen.resumed


def test_f09_the_manifest_is_the_last_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(disk, "about_to", lambda operation, path: order.append((operation, path.name)))
    export_checkpoint(source, tmp_path / "out")
    opened = [name for operation, name in order if operation == "open"]
    assert opened[-1] == MANIFEST
    assert order.index(("rename", "out")) > order.index(("sync", MANIFEST))
