"""The source's files: hashed once, trusted while untouched, released when nothing reads them any more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from exporter import export as export_room
from exporter.export import ExportOptions, Feed, export_checkpoint
from exporter.origin import SourceFiles, source_id
from model.bundle import file_sha256
from model.errors import CheckpointError
from model.progress import NullProgress
from quantize.apply import Quantizer
from tests.declared import declare_readers
from tests.faults import crash
from tests.faults.crash import child, kill_at, tree


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return crash.small_checkpoint(tmp_path / "source", assets=False)


@pytest.fixture(autouse=True)
def quick_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_room, "_trace", declare_readers)


class Hashes:
    """Source files of which it counts how often each is hashed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = {path.name: path for path in folder.iterdir()}
        self.hashed: list[str] = []
        hash_file = SourceFiles._hash

        def counted(files: SourceFiles, name: str, path: Path) -> str:
            self.hashed.append(name)
            return hash_file(files, name, path)

        monkeypatch.setattr(SourceFiles, "_hash", counted)


def test_untouched_files_are_not_hashed_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Hashes(source, monkeypatch)
    first = SourceFiles(counting.files)
    with first.hashing():
        digests = first.digests(NullProgress())
        first.confirm()
    assert digests == {name: file_sha256(path) for name, path in counting.files.items()}
    assert sorted(counting.hashed) == sorted(counting.files)
    remembered = {name: (first.stamps[name], digests[name]) for name in digests}
    os.utime(source / "config.json", ns=(7, 7))
    counting.hashed.clear()
    second = SourceFiles(counting.files, remembered=remembered)
    with second.hashing():
        assert second.digests(NullProgress()) == digests
        os.utime(source / "model.safetensors", ns=(8, 8))
        second.confirm()
        second.confirm()
    assert counting.hashed == ["config.json", "model.safetensors"]


def test_known_hashes_are_believed_and_their_files_left_alone(tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"1")
    files = SourceFiles({"here": tmp_path / "here", "away": tmp_path / "away"}, {"away": "ab" * 32})
    with files.hashing():
        assert files.digests(NullProgress()) == {"away": "ab" * 32, "here": file_sha256(tmp_path / "here")}
        files.confirm()
    assert set(files.stamps) == {"here"}


def test_a_source_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read source: gone: No such file"):
        SourceFiles({"gone": tmp_path / "gone"})


def test_files_are_released_when_nothing_reads_them_any_more(tmp_path: Path) -> None:
    """Also in a resumed export, which does not read what is done."""
    source = crash.small_checkpoint(tmp_path / "source", "vlm", sharded=3)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    hashes = {name: file_sha256(source / name) for name in shards}
    released: list[str] = []

    def export(out: Path) -> Any:
        feed = Feed(hashes, release=lambda path: released.append(path.name))
        return export_checkpoint(source, out, ExportOptions(), Quantizer(crash.RECIPE), None, feed)

    export(tmp_path / "calm")
    assert sorted(released) == shards
    child(lambda: export(tmp_path / "out"), tmp_path / "notes", kill_at(120))
    released.clear()
    assert export(tmp_path / "out").resumed_parts > 2
    assert sorted(released) == shards
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def test_a_released_file_may_go(tmp_path: Path) -> None:
    """Nothing opens it afterwards."""
    source = crash.small_checkpoint(tmp_path / "source", "vlm", sharded=3)
    hashes = {path.name: file_sha256(path) for path in source.glob("*.safetensors")}
    export_checkpoint(source, tmp_path / "calm", ExportOptions(), Quantizer(crash.RECIPE))
    feed = Feed(hashes, release=lambda path: path.unlink())
    export_checkpoint(source, tmp_path / "out", ExportOptions(), Quantizer(crash.RECIPE), None, feed)
    assert not list(source.glob("*.safetensors"))
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def test_what_a_source_is_called() -> None:
    digests = {"b": "22" * 32, "a": "11" * 32}
    assert source_id({"_name_or_path": "owner/name", "model_type": "exaone4"}, digests) == "owner/name"
    plain = source_id({"model_type": "exaone4"}, digests)
    assert plain == source_id({"_name_or_path": "/home/me/owner/name", "model_type": "exaone4"}, digests)
    assert plain.startswith("exaone4-")
    assert plain != source_id({"model_type": "exaone4"}, digests | {"a": "12" * 32})
