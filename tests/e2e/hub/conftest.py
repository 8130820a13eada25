"""A checkpoint of many shards on the hub's stand-in, and what an export of it must be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

import exaone_export as ee
from exporter import export as export_room
from exporter import transfer
from model.bundle import file_sha256
from tests import tiny
from tests.declared import declare_readers
from tests.hub_server import Hub, point_at, serve

ID = "LGAI-EXAONE/EXAONE-Tiny"
SHARDS = 12
STORED = "^/[0-9a-f]{64}"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def split_in_order(folder: Path, tensors: Mapping[str, Any], shards: int) -> None:
    """Shards of about equal size, the tensors in the order in which published checkpoints have them."""
    limit = math.ceil(sum(tensor.nbytes for tensor in tensors.values()) / shards)
    files: list[dict[str, Any]] = [{}]
    for name, tensor in tensors.items():
        if files[-1] and sum(t.nbytes for t in files[-1].values()) + tensor.nbytes / 2 > limit and len(files) < shards:
            files.append({})
        files[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for index, part in enumerate(files, 1):
        file = f"model-{index:05}-of-{len(files):05}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def make_source(folder: Path, *, change: Any = None) -> Path:
    tiny.make_checkpoint(folder, "hybrid", num_hidden_layers=8, layer_types=(["sliding_attention"] * 3
        + ["full_attention"]) * 2, intermediate_size=256)  # fmt: skip
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    tensors = tiny.make_tensors(config)
    if change is not None:
        change(tensors)
    split_in_order(folder, tensors, SHARDS)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("hub") / "source")


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr(export_room, "_trace", declare_readers)
    with serve() as hub:
        hub.add(ID, files_of(folder) | {"pytorch_model.bin": b"pickle", "modeling.py": b"evil()"})
        point_at(hub, monkeypatch, tmp_path / "cache")
        yield hub


@pytest.fixture(scope="session")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Recipe → the bytes of an export from the folder, under the hub's name."""
    root = tmp_path_factory.mktemp("expected")
    made = {}
    with pytest.MonkeyPatch.context() as patch, serve() as hub:
        commit = hub.add(ID, files_of(folder) | {"pytorch_model.bin": b"pickle", "modeling.py": b"evil()"}).refs["main"]
        patch.setattr(export_room, "_trace", declare_readers)
        patch.setattr("exporter.source.describe_source", lambda _: (ID, commit))
        for recipe in ("none", "int4"):
            ee.export(folder, root / recipe, quantize=recipe)
            made[recipe] = tree(root / recipe)
    return made


def fetched(hub: Hub) -> dict[str, int]:
    """How often each shard was fetched as a whole."""
    names = {}
    for name, content in hub.models[ID].commits[hub.models[ID].refs["main"]].items():
        names[sha256(content).hexdigest()] = name
    counts: dict[str, int] = {}
    for request in hub.asked(STORED):
        if request.range.startswith("bytes=0-"):
            continue
        name = names[request.path.strip("/")]
        counts[name] = counts.get(name, 0) + 1
    return counts


def digest_of(hub: Hub, number: int) -> str:
    """The name under which the storage has a shard."""
    files = hub.models[ID].commits[hub.models[ID].refs["main"]]
    return sha256(files[f"model-{number:05}-of-{SHARDS:05}.safetensors"]).hexdigest()


def left_beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()} - {"cache", out.name}
