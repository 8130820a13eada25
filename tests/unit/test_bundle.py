"""Reading a manifest that may be damaged or hostile."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    FileInfo,
    GraphInfo,
    Manifest,
    TensorInfo,
    WeightInfo,
    bundle_path,
    check_contents,
    check_sizes,
    file_sha256,
    read_manifest,
)
from model.errors import BundleError, EnvironmentFault

GRAPH = GraphInfo(
    "decoder",
    "decoder.onnx",
    ("decoder.onnx.data",),
    (TensorInfo("input_ids", "int64", ("batch", "sequence")), TensorInfo("logits_to_keep", "int64", (1,), True)),
    (TensorInfo("logits", "float32", ("batch", "kept", 160)),),
)
CONTENT = {"decoder.onnx": b"graph", "decoder.onnx.data": b"weights", "config.json": b"{}"}


def manifest(**changes: Any) -> Manifest:
    parts: dict[str, Any] = {
        "tool": "0.1.0",
        "libraries": {"torch": "2.9"},
        "source": {"id": "x", "revision": None, "files": {"model.safetensors": "0" * 64}},
        "model_type": "exaone4",
        "task": "text-generation",
        "dtype": "fp32",
        "target": "cpu",
        "recipe": "int4",
        "graphs": (GRAPH,),
        "weights": {"decoder.lm_head": WeightInfo(4, 32, True, "rtn", 640)},
        "files": {k: FileInfo(len(v), hashlib.sha256(v).hexdigest()) for k, v in CONTENT.items()},
        "notes": ("one",),
    }
    return Manifest(**(parts | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    manifest().write(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))


def test_what_is_written_is_read_back(folder: Path) -> None:
    read = read_manifest(folder)
    assert read == manifest()
    assert read.graph("decoder") == GRAPH
    assert read.graph("mtp") is None
    check_sizes(folder, read)


def test_equal_manifests_have_equal_bytes(folder: Path, tmp_path: Path) -> None:
    manifest(files=dict(reversed(list(manifest().files.items())))).write(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_hash_of_a_file(folder: Path) -> None:
    assert file_sha256(folder / "config.json") == hashlib.sha256(b"{}").hexdigest()


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no version": lambda raw: raw.pop("schema_version"),
    "version 0": lambda raw: raw.update(schema_version=0),
    "version as text": lambda raw: raw.update(schema_version="1"),
    "no graphs": lambda raw: raw.pop("graphs"),
    "graphs null": lambda raw: raw.update(graphs=None),
    "graphs a number": lambda raw: raw.update(graphs=[1]),
    "shape null": lambda raw: raw["graphs"][0]["inputs"][0].update(shape=None),
    "files a list": lambda raw: raw.update(files=[]),
    "file entry null": lambda raw: raw["files"].update({"config.json": None}),
    "hash too short": lambda raw: raw["files"]["config.json"].update(sha256="ab"),
    "hash not hexadecimal": lambda raw: raw["files"]["config.json"].update(sha256="g" * 64),
    "hash a list": lambda raw: raw["files"]["config.json"].update(sha256=["a"] * 64),
    "hash with another name": lambda raw: raw["files"].update({"config.json": {"size": 2, "md5": "a" * 32}}),
    "size negative": lambda raw: raw["files"]["config.json"].update(size=-1),
    "size as text": lambda raw: raw["files"]["config.json"].update(size="2"),
    "size true": lambda raw: raw["files"]["config.json"].update(size=True),
    "size a fraction": lambda raw: raw["files"]["config.json"].update(size=1.5),
    "weight with an unknown key": lambda raw: raw["weights"]["decoder.lm_head"].update(colour=1),
    "weight bits as text": lambda raw: raw["weights"]["decoder.lm_head"].update(bits="4"),
    "weight of minus one parameter": lambda raw: raw["weights"]["decoder.lm_head"].update(parameters=-1),
    "weights null": lambda raw: raw.update(weights=None),
    "graph file unlisted": lambda raw: raw["files"].pop("decoder.onnx"),
    "data file unlisted": lambda raw: raw["files"].pop("decoder.onnx.data"),
    "source null": lambda raw: raw.update(source=None),
    "shape of objects": lambda raw: raw["graphs"][0]["inputs"][0].update(shape=[{}]),
    "notes a number": lambda raw: raw.update(notes=5),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_manifest(folder: Path, name: str) -> None:
    edit(folder, DAMAGE[name])
    with pytest.raises(BundleError, match=r"exaone_export\.json") as caught:
        read_manifest(folder)
    assert len(str(caught.value)) < 300


FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "not JSON": lambda path: path.write_text("{"),
    "a list": lambda path: path.write_text("[]"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "a file named twice": lambda path: path.write_text('{"files": {"a": 1, "a": 2}}'),
}


@pytest.mark.parametrize("name", FILES)
def test_no_manifest_to_speak_of(folder: Path, name: str) -> None:
    FILES[name](folder / MANIFEST)
    with pytest.raises(BundleError):
        read_manifest(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a folder"):
        read_manifest(tmp_path / "nothing")


def test_made_by_a_newer_version(folder: Path) -> None:
    edit(folder, lambda raw: raw.update(schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(EnvironmentFault, match="newer"):
        read_manifest(folder)


OUTSIDE = ["../config.json", "/etc/passwd", "a/../../b", "a\\b", "C:x", "x\0y", "", "..", "."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_outside(folder: Path, name: str) -> None:
    edit(folder, lambda raw: raw["files"].update({name: raw["files"]["config.json"]}))
    with pytest.raises(BundleError):
        read_manifest(folder)
    with pytest.raises(BundleError):
        bundle_path(folder, name)


@pytest.mark.parametrize("side", ["file", "data"])
def test_a_graph_may_not_read_outside(folder: Path, side: str) -> None:
    edit(folder, lambda raw: raw["graphs"][0].update({side: "../x" if side == "file" else ["../x"]}))
    with pytest.raises(BundleError, match="outside"):
        read_manifest(folder)


def test_a_link_is_refused_wherever_it_leads(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"{}")
    for target in (secret, folder / "decoder.onnx"):
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(target)
        with pytest.raises(BundleError, match="link"):
            read_manifest(folder)


def test_a_pipe_does_not_block(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(BundleError):
        check_sizes(folder, read_manifest(folder))


@pytest.mark.parametrize("change", ["shorter", "longer", "missing", "folder"])
def test_sizes(folder: Path, change: str) -> None:
    path = folder / "decoder.onnx.data"
    if change in ("shorter", "longer"):
        path.write_bytes(b"x" if change == "shorter" else b"x" * 100)
    else:
        path.unlink()
        if change == "folder":
            path.mkdir()
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data"):
        check_sizes(folder, read_manifest(folder))


@pytest.mark.parametrize("name", ["decoder.onnx", "config.json"])
def test_a_flipped_bit_is_noticed_on_load(folder: Path, name: str) -> None:
    check_contents(folder, read_manifest(folder))
    path = folder / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    check_sizes(folder, read_manifest(folder))
    with pytest.raises(BundleError, match=f"{name}: its sha256 differs"):
        check_contents(folder, read_manifest(folder))
    check_contents(folder, read_manifest(folder), largest=0)  # what is larger than the limit is left to verify


def test_a_bundle_behind_a_linked_folder(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    check_sizes(link, read_manifest(link))
