"""S23 and S29 to S33: the index of the shards, and the files that it names."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.config import load_config
from model.shards import INDEX, SINGLE
from model.weights import Checkpoint
from tests import tiny
from tests.faults.harness import Case, bad, check_case, refuses
from tests.faults.spoil import FIRST, SECOND, Spoil, both, content, index, replaced, sparse

NORM = "model.norm.weight"


def elsewhere(folder: Path) -> Path:
    """A path beside the checkpoint."""
    return folder.parent / "outside.safetensors"


def outside(name: str) -> Spoil:
    """A file that lies outside, with a link in its place."""

    def spoil(folder: Path) -> None:
        (folder / name).rename(elsewhere(folder))
        (folder / name).symlink_to(elsewhere(folder))

    return spoil


def pointed(target: str, name: str = FIRST) -> Spoil:
    """A link in a file's place."""
    return replaced(name, lambda path: path.symlink_to(target))


def sharded(name: str, spoil: Spoil, *words: str, **more: Any) -> Case:
    return bad(name, spoil, *words, shards=2, **more)


def other_norm(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """The last norm in the first shard too."""

    def spoil(folder: Path) -> None:
        tensors = tiny.make_tensors(tiny.make_config("hybrid"))
        names = sorted(tensors)
        first, second = ({name: tensors[name] for name in names[i::2]} for i in range(2))
        extra, place = (first, second) if NORM in second else (second, first)
        extra[NORM] = change(place[NORM])
        for name, part in ((FIRST, first), (SECOND, second)):
            save_file(part, folder / name, {"format": "pt"})

    return spoil


test_s23_tensor_in_two_shards = refuses(
    sharded("s23 other bytes", other_norm(lambda norm: norm + 1), NORM, f"it is in {FIRST} and in {SECOND}"),
    sharded("s23 the same bytes", other_norm(lambda norm: norm), NORM, FIRST, SECOND),
    sharded("s23 another shape", other_norm(lambda norm: norm[:3]), NORM, FIRST, SECOND),
    sharded("s23 a shard twice", lambda folder: (folder / SECOND).write_bytes((folder / FIRST).read_bytes()), SECOND),
)


def named(shard: str) -> Case:
    return sharded(f"s29 {shard}", index(lambda i: i["weight_map"].update({NORM: shard})), "outside the folder", code=4)


test_s29_index_that_leads_outside = refuses(
    *map(named, ("../x", "..", "/etc/passwd", "sub/../../x", "./../x", "a\\b", "\\\\host\\share", "C:x", "a\0b", "")),
    *map(named, ("https://host/x.safetensors", "file:///etc/passwd", "//host/x")),
    sharded("s29 a folder", index(lambda i: i["weight_map"].update({NORM: "sub/x.safetensors"})), "own folder"),
)
test_s30_link_to_outside = refuses(
    sharded("s30 a shard", outside(FIRST), FIRST, "a link that leads outside", code=4),
    sharded("s30 the index", outside(INDEX), INDEX, "a link that leads outside", code=4),
    bad("s30 the only file", outside(SINGLE), SINGLE, "a link that leads outside", code=4),
    bad("s30 the configuration", outside("config.json"), "config.json", "outside", code=4),
    bad("s30 the tokenizer", outside("tokenizer.json"), "tokenizer.json", "outside", code=4),
    sharded("s30 /etc/passwd", pointed("/etc/passwd"), FIRST, "outside", code=4),
    sharded("s30 a file of the system", pointed("/proc/self/mem"), FIRST, code=4),
    sharded("s30 over a folder", both(pointed("up/x"), lambda f: (f / "up").symlink_to("..")), FIRST, code=4),
    sharded("s30 another folder's blobs", pointed("../blobs/x"), FIRST, code=4),
)
test_s31_shard_that_is_no_file = refuses(
    sharded("s31 missing", replaced(FIRST), FIRST, "the file does not exist"),
    sharded("s31 a folder", replaced(FIRST, lambda path: path.mkdir()), FIRST, "not an ordinary file"),
    sharded("s31 a pipe", replaced(FIRST, os.mkfifo), FIRST, "not an ordinary file", apart=True),
    sharded("s31 a device behind a link", pointed("/dev/zero"), FIRST, "outside", code=4),
    sharded("s31 a terminal behind a link", pointed("/dev/tty"), FIRST, code=4),
    sharded("s31 a link to itself", pointed(FIRST), FIRST),
    sharded("s31 a link to nothing", pointed("nothing"), FIRST, "the file does not exist"),
    sharded("s31 in other letters", index(lambda i: upper(i)), FIRST.upper(), "the file does not exist"),
    sharded("s31 a name of 300 letters", index(lambda i: i["weight_map"].update({NORM: "x" * 300})), "xxx"),
    sharded("s31 a name no file has", index(lambda i: i["weight_map"].update({NORM: "\ud800"})), r"\ud800"),
    sharded("s31 a name with a newline", index(lambda i: i["weight_map"].update({NORM: "a\nb"})), r"a\nb"),
    sharded("s31 the index itself", index(lambda i: i["weight_map"].update({NORM: INDEX})), INDEX),
    sharded("s31 the configuration", index(lambda i: i["weight_map"].update({NORM: "config.json"})), "config.json"),
    sharded("s31 zeros", replaced(FIRST, sparse(5 << 30)), FIRST),
    bad("s31 the only file missing", replaced(SINGLE), "neither model.safetensors nor"),
    bad("s31 the only file a pipe", replaced(SINGLE, os.mkfifo), SINGLE, "not an ordinary file"),
    bad("s31 the only file a folder", replaced(SINGLE, lambda path: path.mkdir()), SINGLE, "not an ordinary file"),
)


def upper(raw: dict[str, Any]) -> None:
    raw["weight_map"] = {name: shard.upper() for name, shard in raw["weight_map"].items()}


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="only root makes devices")
@pytest.mark.parametrize("name", [FIRST, INDEX])
def test_s31_device(tmp_path: Path, name: str) -> None:
    def device(path: Path) -> None:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("devices cannot be made here")

    check_case(sharded("s31 a device", replaced(name, device), name, "not an ordinary file", apart=True), tmp_path)


def first_of(other: str) -> Callable[[dict[str, Any]], None]:
    """Moves the first tensor of one shard to the other, in the index alone."""

    def change(raw: dict[str, Any]) -> None:
        name = next(name for name, shard in raw["weight_map"].items() if shard != other)
        raw["weight_map"][name] = other

    return change


def swap(raw: dict[str, Any]) -> None:
    """Every tensor in the other shard."""
    others = {FIRST: SECOND, SECOND: FIRST}
    raw["weight_map"] = {name: others[shard] for name, shard in raw["weight_map"].items()}


def many(folder: Path) -> None:
    """A million tensors; written as text, because the writer would take longer than the reader."""
    entries = ",".join(f'"t{i}":"{FIRST}"' for i in range(1_000_000))
    (folder / INDEX).write_text(f'{{"weight_map":{{{entries}}}}}')


def some(folder: Path) -> None:
    """As many as the file's size allows."""
    entries = ",".join(f'"{i:x}":"a"' for i in range(300_000))
    (folder / INDEX).write_text(f'{{"weight_map":{{{entries}}}}}')


test_s33_index_that_contradicts_the_files = refuses(
    sharded("s33 a tensor in the other shard", index(first_of(SECOND)), f"puts it in {SECOND}, but it is in {FIRST}"),
    sharded("s33 all in the other shard", index(swap), "puts it in", "but it is in"),
    sharded(
        "s33 a tensor that no file has", index(lambda i: i["weight_map"].update(ghost=FIRST)), "ghost", "it is not"
    ),
    sharded("s33 a tensor it does not list", index(lambda i: i["weight_map"].pop(NORM)), NORM, "does not list it"),
    sharded("s33 a shard it does not list", index(lambda i: only(i, FIRST)), "missing tensors"),
    sharded("s33 no tensor", index(lambda i: i.update(weight_map={})), "missing tensors", "and 42 more"),
    sharded("s33 a hostile name", index(lambda i: i["weight_map"].update({"\x1b[2J" * 99: FIRST})), r"\x1b[2J"),
)
test_s33_index_that_is_none = refuses(
    sharded("s33 empty", content(b"", INDEX), INDEX, "empty"),
    sharded("s33 not JSON", content(b"{", INDEX), INDEX, "not JSON"),
    sharded("s33 not UTF-8", content(b'{"\xff": 1}', INDEX), INDEX, "not UTF-8"),
    sharded("s33 a list", content(b"[]", INDEX), INDEX, "list"),
    sharded("s33 no map", content(b"{}", INDEX), INDEX, "weight_map"),
    sharded("s33 a list of tensors", content(b'{"weight_map": ["a"]}', INDEX), INDEX, "weight_map"),
    sharded("s33 numbers", content(b'{"weight_map": {"a": 1}}', INDEX), INDEX, "weight_map"),
    sharded("s33 null in the map", content(b'{"weight_map": {"a": null}}', INDEX), INDEX, "weight_map"),
    sharded("s33 two maps", content(b'{"weight_map": {}, "weight_map": {}}', INDEX), INDEX, "appears twice"),
    sharded(
        "s33 a tensor twice", content(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'.encode(), INDEX),
        INDEX, "'a' appears twice",
    ),
    sharded("s33 5000 deep", content(b'{"a":' * 5000 + b"1" + b"}" * 5000, INDEX), INDEX, "nested"),
    sharded("s33 a million tensors", many, INDEX, "more than the", apart=True),
    sharded("s33 very many tensors", some, "the file does not exist", apart=True),
    sharded("s33 200 MB", replaced(INDEX, sparse(200 << 20)), INDEX, "more than the"),
    sharded("s33 a pipe", replaced(INDEX, os.mkfifo), INDEX, "not an ordinary file"),
)  # fmt: skip


def only(raw: dict[str, Any], shard: str) -> None:
    raw["weight_map"] = {name: file for name, file in raw["weight_map"].items() if file == shard}


# Accepted


def opened(folder: Path) -> int:
    checkpoint = Checkpoint.open(folder)
    checkpoint.bind(load_config(folder))
    return len(checkpoint.files)


def test_s30_links_of_the_hub_cache_work(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    made = tiny.make_checkpoint(tmp_path / "made", "hybrid", sharded=2)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(made.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert opened(snapshot) == 3


def test_s30_links_inside_the_folder_work(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "source", "hybrid", sharded=2)
    (folder / FIRST).rename(folder / "first")
    (folder / FIRST).symlink_to("first")
    assert opened(folder) == 3


def test_s30_folder_that_is_a_link_works(tmp_path: Path) -> None:
    tiny.make_checkpoint(tmp_path / "source", "hybrid", sharded=2)
    (tmp_path / "link").symlink_to("source")
    assert opened(tmp_path / "link") == 3


@pytest.mark.parametrize("stated", [5, 0, -1, "5", 1e300, None, [], {}, "x" * 100_000, float("nan"), True])
def test_s32_wrong_total_size_is_a_warning_with_both_numbers(
    tmp_path: Path, stated: object, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.make_checkpoint(tmp_path / "source", "hybrid", sharded=2)
    total = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
    index(lambda raw: raw["metadata"].update(total_size=stated))(folder)
    with caplog.at_level(logging.WARNING, "exaone_export.model"):
        assert opened(folder) == 3
    if stated is None:  # as good as none stated
        assert caplog.text == ""
    else:
        assert f"says {str(stated)[:40]}" in caplog.text
        assert f"the files hold {total}" in caplog.text
    assert len(caplog.text) < 300


@pytest.mark.parametrize("metadata", [None, [], 5, "x", {}])
def test_s32_index_without_total_size(tmp_path: Path, metadata: object, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.make_checkpoint(tmp_path / "source", "hybrid", sharded=2)
    index(lambda raw: raw.update(metadata=metadata))(folder)
    assert opened(folder) == 3
    assert caplog.text == ""
