"""Output folders: those that are there already, those that cannot be, and names of every kind."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exaone_export import cli
from exporter import disk
from exporter import export as export_room
from exporter.export import ExportOptions, export_checkpoint, rewrite_bundle
from model.bundle import MANIFEST, check_sizes, read_manifest
from model.errors import CheckpointError, UsageError
from model.progress import NullProgress
from quantize.apply import Quantizer
from tests.declared import declare_readers
from tests.faults import crash
from tests.faults.crash import beside, tree


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return crash.small_checkpoint(tmp_path / "source")


@pytest.fixture(autouse=True)
def quick_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_room, "_trace", declare_readers)


def refused(error: type[BaseException], match: str, source: Path, out: Path, *args: Any) -> None:
    """The export fails as said, and everything beside it stays as it was."""
    before = tree(out.parent)
    with pytest.raises(error, match=match):
        export_checkpoint(source, out, *args)
    assert tree(out.parent) == before
    assert beside(out) == []


def test_f13_an_existing_bundle_needs_force_and_is_swapped(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(source, out)
    refused(UsageError, "it exists already.*--force", source, out)
    (out / "stale").write_text("old")
    export_checkpoint(source, out, ExportOptions(force=True))
    assert not (out / "stale").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_f13_only_bundles_are_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused(UsageError, "not a bundle", source, out, ExportOptions(force=True))


def test_f13_a_failing_export_keeps_the_old_bundle(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(source, out)
    (source / "model.safetensors").write_bytes(b"damaged")
    refused(CheckpointError, "too short", source, out, ExportOptions(force=True))
    check_sizes(out, read_manifest(out))


def test_f13_the_old_bundle_is_there_until_the_new_one_is(source: Path, tmp_path: Path) -> None:
    """At every change of the disk, somebody who looks finds a whole bundle."""
    out = tmp_path / "out"
    export_checkpoint(crash.small_checkpoint(tmp_path / "old", seed=3), out)
    ids = set()

    def look(operation: str, path: Path) -> None:
        manifest = read_manifest(out)
        check_sizes(out, manifest)
        ids.add(manifest.source["id"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "about_to", look)
        export_checkpoint(source, out, ExportOptions(force=True))
    assert len(ids) == 2


class Appearing(NullProgress):
    """Makes the output folder while the export runs."""

    def __init__(self, make: Callable[[], object]) -> None:
        self.make = make

    def start(self, label: str, total: float, unit: str) -> None:
        if label == "writing decoder":
            self.make()


@pytest.mark.parametrize("force", [False, True])
def test_f14_an_output_that_appears_meanwhile_is_kept(source: Path, tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    (tmp_path / "mine").write_text("precious")

    for make in (lambda: out.symlink_to(tmp_path / "mine"), lambda: out.write_text("precious")):
        with pytest.raises(UsageError, match="it appeared while this export ran"):
            export_checkpoint(source, out, ExportOptions(force=force), progress=Appearing(make))
        assert out.read_text() == "precious"
        assert beside(out) == []
        out.unlink()


def test_f14_an_output_folder_that_appears_meanwhile_is_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in (["thesis.txt"], []):

        def make(names: list[str] = content) -> None:
            out.mkdir()
            for name in names:
                (out / name).write_text("years of work")

        with pytest.raises(UsageError, match="it appeared while this export ran"):
            export_checkpoint(source, out, progress=Appearing(make))
        assert [path.name for path in out.iterdir()] == content
        assert beside(out) == []
        disk.remove_tree(out)


def test_f14_an_output_that_cannot_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link to source").symlink_to(source)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(UsageError, "it is a file", source, tmp_path / "file")
    refused(UsageError, "symbolic link", source, tmp_path / "link")
    refused(UsageError, "source folder or inside it", source, source)
    refused(UsageError, "source folder or inside it", source, source / "out")
    refused(UsageError, "source folder or inside it", source, tmp_path / "link to source" / "out")
    with pytest.raises(UsageError, match="the source folder is inside it"):
        export_checkpoint(source, tmp_path, ExportOptions(force=True))
    refused(UsageError, "a link that leads back to itself", source, tmp_path / "loop")
    with pytest.raises(UsageError, match="'file' above it is a file"):
        export_checkpoint(source, tmp_path / "file" / "out")


@pytest.mark.parametrize("name", [".", "..", "/", "out/.."])
def test_f14_an_output_without_a_name(source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    export_checkpoint(source, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path / "bundle")
    before = tree(tmp_path)
    with pytest.raises(
        UsageError, match=r"it is not named\. Give the folder's own name|the source folder is inside it"
    ):
        export_checkpoint(source, Path(name), ExportOptions(force=True))
    assert tree(tmp_path) == before


def _open_to_all() -> str | None:
    """A place for temporary folders that everybody can go into; None for the usual one."""
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        path = Path(place).resolve()
        if path.is_dir() and all(folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents)):
            return place
    return None


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder that all may write in; the effective user is one without rights, where we can be one."""
    folder = Path(tempfile.mkdtemp(dir=_open_to_all()))
    folder.chmod(0o777)
    user = os.geteuid()
    warm = crash.small_checkpoint(folder / "warm")  # what is imported is imported now: nobody may not read it
    assert [cli.main(["export", str(warm), str(folder / "out"), "-q", *more]) for more in ([], ["--force"])] == [0, 0]
    for name in ("warm", "out"):
        disk.remove_tree(folder / name)
    try:
        if user == 0:
            os.seteuid(65534)
        yield folder
    finally:
        os.seteuid(user)
        for path in (folder, *folder.iterdir()):
            path.chmod(stat.S_IRWXU)
        disk.remove_tree(folder)


def test_f15_a_folder_that_cannot_be_written(as_nobody: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = crash.small_checkpoint(as_nobody / "source")
    shut = as_nobody / "shut"
    shut.mkdir(mode=0o555)
    for out in (shut / "out", shut / "deep" / "out"):
        assert cli.main(["export", str(source), str(out)]) == 2
        assert capsys.readouterr().err == (
            "error: cannot write bundle: out: Permission denied. Choose another folder.\n"
        )
    assert list(shut.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE"])
def test_f15_a_source_file_that_cannot_be_read(as_nobody: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = crash.small_checkpoint(as_nobody / "source")
    (source / name).chmod(0)
    assert cli.main(["export", str(source), str(as_nobody / "out")]) == 3
    error = capsys.readouterr().err
    assert name in error
    assert "Permission denied" in error
    assert error.count("\n") == 1
    assert beside(as_nobody / "out") == []


def test_f15_a_folder_that_becomes_read_only(as_nobody: Path) -> None:
    source = crash.small_checkpoint(as_nobody / "source")
    above = as_nobody / "above"
    above.mkdir()
    with pytest.raises(UsageError, match="out: Permission denied"):
        export_checkpoint(source, above / "out", progress=Appearing(lambda: above.chmod(0o555)))
    assert not (above / "out").exists()


NAMES = {
    "korean": "한국어 이름",
    "dash": "-rf",
    "newline": "new\nline",
    "255 bytes": "x" * 255,
    "255 bytes of korean": "가" * 85,
    "not utf-8": os.fsdecode(b"not utf-8 \xff"),
    "hidden": ".hidden",
    "pattern": "[a-z]*?",
    "brace": "{0}%s",
    "partial": f"out.partial-{'0' * 32}",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_f16_names(source: Path, tmp_path: Path, name: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    out = tmp_path / name
    assert cli.main(["export", str(source), "--quiet", "--", str(out)]) == 0
    check_sizes(out, read_manifest(out))
    assert cli.main(["export", str(source), "--quiet", "--", str(out)]) == 2
    error = capsysbinary.readouterr().err
    assert error.startswith(b"error: cannot write bundle: ")
    assert error.rstrip().endswith(b"it exists already. Choose another folder, or replace it with --force.")
    assert {path.name for path in tmp_path.iterdir()} == {"source", name}


@pytest.mark.parametrize("name", ["x" * 255, "가" * 85, os.fsdecode(b"not utf-8 \xff"), "new\nline"])
def test_f16_names_when_killed(source: Path, tmp_path: Path, name: str) -> None:
    """Long ones do not fit into the staging folder's name, and still each export finds its own."""
    out, notes = tmp_path / name, tmp_path / "notes"
    other = tmp_path / (name[:-1] + "y")
    crash.child(crash.export(source, out), notes, crash.kill_at(70))
    crash.child(crash.export(source, other), notes, crash.kill_at(70))
    for folder in (out, other):
        _, seen = crash.child(crash.export(source, folder, resume=True), notes)
        assert seen.outcome == "done"
        assert seen.resumed > 2
    assert tree(out) == tree(other)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "notes", name, other.name}


def test_f16_a_name_that_is_too_long(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        export_checkpoint(source, tmp_path / ("x" * 256))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_f16_a_source_whose_name_is_not_utf8(tmp_path: Path) -> None:
    source = crash.small_checkpoint(tmp_path / os.fsdecode(b"\xff\xfe"))
    export_checkpoint(source, tmp_path / "out")
    assert "\udcff" not in (tmp_path / "out" / MANIFEST).read_text(encoding="utf-8")


def test_f17_nothing_passes_through_the_temporary_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on another device, where nothing can be renamed from, or too small for a model."""

    def used(*_: object, **__: object) -> str:
        raise AssertionError("the temporary folder was used")

    for name in ("mkdtemp", "mkstemp", "gettempdir", "_get_default_tempdir"):
        monkeypatch.setattr(tempfile, name, used)
    devices: set[int] = set()

    def note(operation: str, path: Path) -> None:
        if path.parent.exists():
            devices.add(path.parent.stat().st_dev)

    monkeypatch.setattr(disk, "about_to", note)
    export_checkpoint(source, tmp_path / "float")
    rewrite_bundle(tmp_path / "float", tmp_path / "out", Quantizer(crash.RECIPE))
    assert devices == {tmp_path.stat().st_dev}
