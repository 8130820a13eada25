"""S40: a source that changes while it is exported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exaone_export import cli
from exporter import export as export_room
from exporter.origin import SourceChanged, SourceFiles
from model.progress import NullProgress
from model.shards import INDEX
from tests.faults.harness import Case, Outcome, check_refusal, run_here, snapshot
from tests.faults.quick_graphs import quick_trace
from tests.faults.spoil import FIRST

Change = Callable[[Path], object]


def same_size(path: Path) -> None:
    """Another byte at the end; size and times are what they were."""
    status = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    with path.open("r+b") as stream:
        stream.write(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def other_file(path: Path) -> None:
    """Another file of the same name, as a download puts it there."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    fresh = path.with_name("fresh")
    fresh.write_bytes(raw)
    fresh.replace(path)


def appended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def exported(root: Path, change: Callable[[], object] | None, at: str, *options: str) -> Outcome:
    """An export during which something happens: when it traces, or when it begins to write weights."""
    case = Case("", lambda folder: None, 0, (), shards=2, options=options)
    arguments = case.prepare(root)
    done: list[bool] = []

    def act() -> None:
        if change is not None and not done:
            done.append(True)
            change()

    def trace(*given: Any) -> Any:
        if at == "tracing":
            act()
        return quick_trace(*given)

    class Watching(NullProgress):
        def start(self, label: str, total: float, unit: str) -> None:
            if at == label:
                act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_room, "_trace", trace)
        patch.setattr("exaone_export.commands.export.choose_progress", lambda **_: Watching())
        outcome = run_here(arguments)
    assert change is None or done
    return outcome


@pytest.mark.parametrize("options", [(), ("--quantize", "int4")], ids=["float", "int4"])
@pytest.mark.parametrize("at", ["tracing", "writing decoder"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        (FIRST, same_size),
        (FIRST, other_file),
        (FIRST, appended),
        (FIRST, cut),
        (FIRST, Path.unlink),
        (INDEX, appended),
        ("config.json", appended),
        ("tokenizer.json", appended),
        ("LICENSE", Path.unlink),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_s40_source_that_changes(tmp_path: Path, name: str, change: Change, at: str, options: tuple[str, ...]) -> None:
    path = tmp_path / "source" / name
    outcome = exported(tmp_path, lambda: change(path), at, *options)
    check_refusal(outcome, 3, (name,), tmp_path)
    assert {entry.split("/")[0] for entry in snapshot(tmp_path)} == {"source"}


@pytest.mark.parametrize("at", ["tracing", "writing decoder"])
def test_s40_source_that_is_only_read_meanwhile(tmp_path: Path, at: str) -> None:
    def read() -> None:
        for path in (tmp_path / "source").iterdir():
            path.read_bytes()

    assert exported(tmp_path, read, at).code == 0


def test_s40_old_bundle_stays(tmp_path: Path) -> None:
    assert exported(tmp_path / "first", None, "").code == 0
    bundle = tmp_path / "first" / "out"
    before = snapshot(bundle)
    path = tmp_path / "first" / "source" / FIRST
    outcome = exported(tmp_path / "first", lambda: cut(path), "writing decoder", "--force")
    check_refusal(outcome, 3, (FIRST,), tmp_path)
    assert snapshot(bundle) == before
    assert cli.main(["verify", str(bundle), "-q"]) == 0


def test_s40_change_before_the_hash_is_one_too(tmp_path: Path) -> None:
    """What was read of the file by then may be older than what is hashed."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": 1}))
    files = SourceFiles({path.name: path})
    path.write_text(json.dumps({"a": 2}))
    with files.hashing(), pytest.raises(SourceChanged, match=r"config\.json: the file changed"):
        files.digests(NullProgress())
