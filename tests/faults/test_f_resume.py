"""What a resume goes on with, what it refuses, and what the bytes do not depend on."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter import export as export_room
from exporter import journal, package
from exporter.export import ExportOptions, export_checkpoint
from exporter.journal import Header
from exporter.origin import SourceChanged
from exporter.partials import staging_folders
from model.errors import UsageError
from model.progress import NullProgress
from quantize.apply import Quantizer
from quantize.recipe import Recipe
from tests.declared import declare_readers
from tests.faults import crash
from tests.faults.crash import PLAIN_LOCALE, beside, child, kill_at, tree
from tests.faults.harness import no_trace


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return crash.small_checkpoint(tmp_path / "source", assets=False)


@pytest.fixture(autouse=True)
def quick_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_room, "_trace", declare_readers)


def killed(source: Path, out: Path, point: int = 70, **options: Any) -> Path:
    """An interrupted export; returns its staging folder."""
    child(crash.export(source, out, **options), out.parent / "notes", kill_at(point))
    (folder,) = staging_folders(out)
    return folder


def resume(source: Path, out: Path, **options: Any) -> Any:
    return crash.export(source, out, resume=True, **options)()


def test_f20_nothing_to_resume(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot resume: out: there is no interrupted export of it\. Leave --resume"):
        resume(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": "fp16"}, "it was begun with --dtype fp32, now it is fp16"),
        ({"target": "cuda"}, "it was begun with --target cpu, now it is cuda"),
        ({"ignore_extra": True}, "it was begun with --ignore-extra off, now it is on"),
        ({"kv_cache": "full"}, "it was begun with --kv-cache window, now it is full"),
    ],
)
def test_f20_other_options(source: Path, tmp_path: Path, options: dict[str, Any], why: str) -> None:
    folder = killed(source, tmp_path / "out")
    before = tree(folder)
    with pytest.raises(UsageError, match=why):
        resume(source, tmp_path / "out", **options)
    assert tree(folder) == before
    assert resume(source, tmp_path / "out").resumed_parts > 2


def test_f20_another_recipe(source: Path, tmp_path: Path) -> None:
    killed(source, tmp_path / "out")
    other = Recipe("crash", crash.RECIPE.rules[1:])
    with pytest.raises(UsageError, match=r"begun with --quantize crash \(\w{12}\), now it is crash \(\w{12}\)"):
        export_checkpoint(source, tmp_path / "out", ExportOptions(resume=True), Quantizer(other))
    with pytest.raises(UsageError, match=r"begun with --quantize crash \(\w{12}\), now it is none"):
        export_checkpoint(source, tmp_path / "out", ExportOptions(resume=True))
    report = export_checkpoint(source, tmp_path / "out", ExportOptions(resume=True), Quantizer(crash.RECIPE, threads=2))
    assert report.resumed_parts > 2


def test_f20_other_versions(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(source, tmp_path / "out")
    versions = package.versions() | {"numpy": "0.1"}
    monkeypatch.setattr("exporter.job.versions", lambda: versions)
    with pytest.raises(UsageError, match=r"it was begun with numpy \d[\w.]+, now it is 0\.1"):
        resume(source, tmp_path / "out")


def test_f20_another_source(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed(source, tmp_path / "out")
    before = tree(folder)
    monkeypatch.setattr(export_room, "_trace", no_trace)  # it is found before any work
    other = crash.small_checkpoint(tmp_path / "elsewhere", seed=8, assets=False)
    with pytest.raises(UsageError, match=r"it was begun with another model\.safetensors in the source"):
        resume(other, tmp_path / "out")
    assert tree(folder) == before
    config = other / "config.json"
    shutil.copy(source / "model.safetensors", other / "model.safetensors")
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UsageError, match=r"it was begun with another config\.json in the source"):
        resume(other, tmp_path / "out")
    assert tree(folder) == before


def test_f20_without_resume_another_export_begins_anew(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(source, tmp_path / "out")
    with caplog.at_level(logging.WARNING, "exaone_export"):
        report = crash.export(source, tmp_path / "out", dtype="fp16")()
    assert report.resumed_parts == 0
    assert "an interrupted export to out is removed: it was begun with --dtype fp32, now it is fp16" in caplog.text
    assert beside(tmp_path / "out") == []
    crash.export(source, tmp_path / "calm", dtype="fp16")()
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def test_f20_of_several_the_fitting_one_is_taken(source: Path, tmp_path: Path) -> None:
    fitting = killed(source, tmp_path / "out").rename(tmp_path / "aside")
    killed(source, tmp_path / "out", dtype="fp16")
    fitting.rename(tmp_path / f"out.partial-{'0' * 32}")
    assert resume(source, tmp_path / "out").resumed_parts > 2
    assert beside(tmp_path / "out") == []


def test_f20_a_transform_that_does_not_say_what_it_does(source: Path, tmp_path: Path) -> None:
    """It may do something else next time, so what it did is not gone on with."""
    quantizer = Quantizer(crash.RECIPE)

    def export(resume: bool = False) -> Any:
        options = ExportOptions(resume=resume)
        return export_checkpoint(source, tmp_path / "out", options, lambda models: quantizer(models))

    child(export, tmp_path / "notes", kill_at(70))
    with pytest.raises(UsageError, match="it was begun with --quantize unknown"):
        export(resume=True)
    assert export().resumed_parts == 0


def spoil(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / journal.FILE
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "resumed"),
    [
        (lambda content: content[:-20], True),
        (lambda content: content + b"\0" * 4096, True),
        (lambda content: content + b"nonsense\n", True),
        (lambda content: content.replace(b'"offset": 0', b'"offset": 1'), False),
        (lambda content: content[: content.index(b"\n")], False),
        (lambda content: content[5:], False),
        (lambda content: b"", False),
        (lambda content: b"\xff" * 100, False),
    ],
)
def test_f21_a_damaged_journal(source: Path, tmp_path: Path, change: Callable[[bytes], bytes], resumed: bool) -> None:
    crash.export(source, tmp_path / "calm")()
    spoil(killed(source, tmp_path / "out"), change)
    report = crash.export(source, tmp_path / "out")()
    assert bool(report.resumed_parts) == resumed
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")
    assert beside(tmp_path / "out") == []


def forged(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes each entry of a journal that has tensors, and signs it anew."""
    content = (folder / journal.FILE).read_bytes()
    value, offset = journal._parse(content, 0)
    lines = [content[:offset]]
    while (parsed := journal._parse(content, offset))[0] is not None:
        value, offset = parsed
        assert value is not None
        if value["tensors"]:
            change(value)
        lines.append(journal._line(value))
    (folder / journal.FILE).write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["tensors"][0].update(offset=entry["tensors"][0]["offset"] + 4096),
        lambda entry: entry["tensors"][0].update(offset=-1),
        lambda entry: entry["tensors"][0].update(file="../../source/model.safetensors"),
        lambda entry: entry["tensors"][0].update(length=1),
        lambda entry: entry["tensors"][0].update(sha256="0" * 64),
        lambda entry: entry["tensors"].pop(),
        lambda entry: entry["tensors"].append(entry["tensors"][0]),
        lambda entry: entry["small"].update(more="AAAA"),
        lambda entry: entry.update(part="decoder/another"),
    ],
)
def test_f21_a_journal_that_says_something_else(
    source: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    """An entry that does not fit the graphs or the data is worth nothing."""
    crash.export(source, tmp_path / "calm")()
    forged(killed(source, tmp_path / "out"), change)
    crash.export(source, tmp_path / "out")()
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def test_f22_nothing_depends_on_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source files of 1970, a clock that runs backwards, a copied source: the same bytes, and a resume goes on."""
    crash.export(source, tmp_path / "calm")()
    wanted = tree(tmp_path / "calm")
    killed(source, tmp_path / "out")
    for path in source.iterdir():
        os.utime(path, ns=(0, 0))
    ticks = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    monkeypatch.setattr(time, "time_ns", lambda: next(ticks))
    shutil.copytree(source, tmp_path / "copied source")
    assert resume(tmp_path / "copied source", tmp_path / "out").resumed_parts > 2
    assert tree(tmp_path / "out") == wanted
    crash.export(source, tmp_path / "한국어")()
    assert tree(tmp_path / "한국어") == wanted


SCRIPT = """
import os, sys
from pathlib import Path
os.umask(int(sys.argv[3], 8))
from exporter import export as room
from exporter.export import ExportOptions, export_checkpoint
from quantize.apply import Quantizer
from quantize.recipe import Recipe
from tests.declared import declare_readers
from tests.faults.crash import RECIPE
room._trace = declare_readers
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), ExportOptions(), Quantizer(RECIPE, int(sys.argv[4])))
"""


def test_f22_the_same_bytes_everywhere(tmp_path: Path) -> None:
    """Other processes with other seeds of hashes, time zones, locales, umasks, threads, and names of both folders."""
    trees = []
    for number, (seed, zone, locale, umask, threads) in enumerate(
        [("0", "UTC", PLAIN_LOCALE, "022", "1"), ("1234", "Asia/Seoul", "C.UTF-8", "077", "2")]
    ):
        source = crash.small_checkpoint(tmp_path / f"source {number}", "vlm", sharded=3)
        out = tmp_path / f"out {number}" / ("bundle", "번들")[number]
        out.parent.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": locale, "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(source), str(out), umask, threads],
            check=True, env=environment, cwd=Path(__file__).parents[2], timeout=120,
        )  # fmt: skip
        trees.append(tree(out))
    assert trees[0] == trees[1]


def test_s40_a_source_that_changes_between_two_parts_is_noticed_there(source: Path, tmp_path: Path) -> None:
    """Nothing made of other bytes gets into the journal, where a resume would believe it."""
    weights = source / "model.safetensors"
    original = weights.read_bytes()
    made = 0

    class Changing(NullProgress):
        def advance(self, amount: float) -> None:
            nonlocal made
            made += 1
            if made == 12:
                weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))

    with pytest.raises(SourceChanged, match=r"model\.safetensors: the file changed during the export") as refusal:
        export_checkpoint(
            source, tmp_path / "out", ExportOptions(keep_partial=True), Quantizer(crash.RECIPE), Changing()
        )
    assert refusal.value.exit_code == 3
    assert beside(tmp_path / "out") == []


def test_progress_shows_what_was_done_before(source: Path, tmp_path: Path) -> None:
    class Summing(NullProgress):
        def __init__(self) -> None:
            self.label = ""
            self.total: dict[str, float] = {}
            self.done: dict[str, float] = {}

        def start(self, label: str, total: float, unit: str) -> None:
            self.label, self.total[label], self.done[label] = label, total, 0.0

        def advance(self, amount: float) -> None:
            self.done[self.label] += amount

    killed(source, tmp_path / "out")
    progress = Summing()
    export_checkpoint(source, tmp_path / "out", ExportOptions(resume=True), Quantizer(crash.RECIPE), progress)
    assert progress.done["writing decoder"] == progress.total["writing decoder"] > 0


def test_the_first_difference_is_named() -> None:
    old = Header({"--a": "1"}, {"numpy": "2"}, {"x": "aa", "y": "bb"}, "g")
    assert old.difference(old) == ""
    assert old.difference(Header({"--a": "1", "--b": "2"}, {}, {}, "")) == "it was begun with --b absent, now it is 2"
    assert old.difference(Header({"--a": "1"}, {"numpy": "2"}, {"x": "aa"}, "g")).endswith("another y in the source")
    assert (
        old.difference(Header({"--a": "1"}, {"numpy": "2"}, dict(old.source), "h")) == "it was begun with other graphs"
    )
