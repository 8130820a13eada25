"""Which files make up a checkpoint: the index, links, and what is no safetensors file."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from model.config import load_config
from model.errors import BundleError, CheckpointError
from model.weights import Checkpoint, check_complete
from tests import tiny


def reindex(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.make_checkpoint(tmp_path / "sharded", "hybrid", sharded=2)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/../../x", "a\\b.safetensors", "https://host/x", "a\0b", ""]
)
def test_index_may_not_lead_outside(sharded: Path, name: str) -> None:
    reindex(sharded, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(BundleError, match="leads outside") as caught:
        Checkpoint.open(sharded)
    assert caught.value.exit_code == 4


def test_shard_may_not_be_a_link_to_outside(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(BundleError, match="a link that leads outside"):
        Checkpoint.open(sharded)


def test_links_of_the_hub_cache_work(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    made = tiny.make_checkpoint(tmp_path / "made", "hybrid", sharded=2)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(made.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    check_complete(Checkpoint.open(snapshot), load_config(snapshot))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "not an ordinary file"),
        (lambda path: os.mkfifo(path), "not an ordinary file"),
        (lambda path: path.symlink_to(path), "cannot be opened|does not exist"),
    ],
)
def test_shard_that_is_no_file(sharded: Path, make: Any, why: str) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.unlink()
    make(shard)
    with pytest.raises((CheckpointError, BundleError), match=why):
        Checkpoint.open(sharded)


def test_device_as_model_file(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "c", "hybrid")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="a link that leads outside"):
        Checkpoint.open(folder)


def test_wrong_total_size_is_a_warning(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    reindex(sharded, lambda index: index["metadata"].update(total_size=5))
    with caplog.at_level(logging.WARNING, "exaone_export.model"):
        Checkpoint.open(sharded)
    assert "says 5 bytes" in caplog.text


def test_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    other = "model-00002-of-00002.safetensors"

    def swap(index: dict[str, Any]) -> None:
        name = next(name for name, shard in index["weight_map"].items() if shard != other)
        index["weight_map"][name] = other

    reindex(sharded, swap)
    with pytest.raises(CheckpointError, match="puts it in .* but it is in"):
        Checkpoint.open(sharded)


def test_tensor_that_only_the_index_knows(sharded: Path) -> None:
    reindex(sharded, lambda index: index["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}))
    with pytest.raises(CheckpointError, match="ghost: .* where it is not"):
        Checkpoint.open(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    tensors = tiny.make_tensors(tiny.make_config("hybrid"))
    save_file(tensors, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"it is in .*00001.* and in .*00002"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "", "{"])
def test_unusable_index(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json"):
        Checkpoint.open(sharded)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "c", "hybrid")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled weights can run code"):
        Checkpoint.open(folder)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint.open(tmp_path / "nothing")
