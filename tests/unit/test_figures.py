"""The figures of `verify` in a bundle: in its card and manifest, and sound wherever the writing stops."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exaone_export.figures import keep_figures, settle_card
from exaone_export.integrity import check_files, extra_files
from exporter import disk
from model.bundle import CARD, MANIFEST, FileInfo, Manifest, check_contents, check_sizes, file_sha256, read_manifest
from model.progress import NullProgress
from tests import tiny
from tests.unit.test_card import FIGURES, make_manifest

OTHERS = FIGURES | {"quality": FIGURES["quality"] | {"mean_kld": 0.5}}


class Stopped(BaseException):
    """The process ends here."""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle without graphs, with a card without figures."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.make_config("vlm")))
    (folder / "LICENSE").write_text("EXAONE AI Model License Agreement 1.2 - NC")
    (folder / CARD).write_text("a card without figures\n")
    files = {path.name: FileInfo(path.stat().st_size, file_sha256(path)) for path in folder.iterdir()}
    make_manifest(graphs=(), files=files).write(folder)
    return folder


def sound(folder: Path) -> Manifest:
    """It loads as it is, and verify, which may finish what was begun, finds nothing wrong."""
    check_sizes(folder, read_manifest(folder))
    check_contents(folder, read_manifest(folder))
    manifest = settle_card(folder, read_manifest(folder))
    assert check_files(folder, manifest, NullProgress()) == {}
    assert read_manifest(folder) == manifest
    assert extra_files(folder, manifest) == []
    return manifest


def test_figures_go_into_the_card_and_the_manifest(bundle: Path) -> None:
    before = read_manifest(bundle)
    keep_figures(bundle, FIGURES)
    after = sound(bundle)
    assert "| positions scored | 12,345 |" in (bundle / CARD).read_text()
    assert json.loads((bundle / "verify.json").read_text())["quality"]["tokens"] == 12345
    assert {name for name in after.files if after.files[name] != before.files[name]} == {CARD}
    again = {path.name: path.read_bytes() for path in bundle.iterdir()}
    keep_figures(bundle, FIGURES)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == again


def changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What keeping figures does, step by step."""
    steps: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(disk, "about_to", lambda operation, path: steps.append(f"{operation} {path.name}"))
        keep_figures(folder, OTHERS)
    return steps


@pytest.mark.parametrize("measured", [False, True], ids=["first", "again"])
def test_a_bundle_is_sound_wherever_it_stops(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    if measured:
        keep_figures(bundle, FIGURES)
    whole = tmp_path / "whole"
    shutil.copytree(bundle, whole)
    steps = changes(whole, monkeypatch)
    assert [step for step in steps if step.startswith("replace")] == [
        "replace verify.json", f"replace {CARD}", f"replace {MANIFEST}",
    ]  # fmt: skip
    for stop in range(len(steps)):
        folder = tmp_path / str(stop)
        shutil.copytree(bundle, folder)
        with monkeypatch.context() as patch:
            patch.setattr(disk, "about_to", failing_at(stop, Stopped))
            with pytest.raises(Stopped):
                keep_figures(folder, OTHERS)
        sound(folder)
        keep_figures(folder, OTHERS)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def failing_at(stop: int, error: Callable[[], BaseException]) -> Callable[[str, Path], None]:
    count = iter(range(stop + 1))

    def about_to(operation: str, path: Path) -> None:
        if next(count, stop) == stop:
            raise error()

    return about_to


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_bundle_that_cannot_be_written_keeps_what_it_has(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    monkeypatch.setattr(disk, "about_to", failing_at(1, lambda: OSError(code, "no way")))
    keep_figures(bundle, FIGURES)
    assert "the figures are not kept in the bundle: no way" in caplog.text
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_a_card_that_nobody_vouches_for_is_damage(bundle: Path) -> None:
    keep_figures(bundle, FIGURES)
    (bundle / CARD).write_text("another text")
    manifest = settle_card(bundle, read_manifest(bundle))
    assert list(check_files(bundle, manifest, NullProgress())) == [CARD]
    (bundle / CARD).unlink()
    assert check_files(bundle, settle_card(bundle, read_manifest(bundle)), NullProgress()) == {
        CARD: "the file is missing"
    }


@pytest.mark.parametrize("content", ["", "[]", "{", '{"card": 1}', '{"card": {"size": "9", "sha256": 1}}'])
def test_a_damaged_verify_json_vouches_for_nothing(bundle: Path, content: str) -> None:
    (bundle / "verify.json").write_text(content)
    manifest = read_manifest(bundle)
    assert settle_card(bundle, manifest) == manifest


def test_a_stopped_verify_is_finished_on_read_only_media_in_memory_only(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"the card of these figures"
    (bundle / CARD).write_bytes(text)
    card = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (bundle / "verify.json").write_text(json.dumps({"card": card}))
    before = (bundle / MANIFEST).read_bytes()
    monkeypatch.setattr(disk, "about_to", failing_at(0, lambda: OSError(errno.EROFS, "read-only")))
    manifest = settle_card(bundle, read_manifest(bundle))
    assert check_files(bundle, manifest, NullProgress()) == {}
    assert (bundle / MANIFEST).read_bytes() == before
