"""Exports from the hub's stand-in: the same bytes as from a folder, shards as they come, few of them on the disk."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

import exaone_export as ee
from exaone_export import cli
from exporter.hub import HubModel
from exporter.low_disk import LARGEST_STOCK
from model.bundle import read_manifest
from model.errors import (
    ResourceError,
    UsageError,
)  # fmt: skip
from model.progress import NullProgress
from tests.e2e.hub.conftest import (
    ID,
    SHARDS,
    STORED,
    digest_of,
    fetched,
    files_of,
    left_beside,
    make_source,
    tree,
)
from tests.hub_server import BROKEN_OFF, Fault, Hub

# The same bytes


@pytest.mark.parametrize("recipe", ["none", "int4"])
@pytest.mark.parametrize("low_disk", [False, True])
def test_equals_the_export_of_the_folder(
    hub: Hub, tmp_path: Path, expected: dict[str, dict[str, str]], recipe: str, low_disk: bool
) -> None:
    out = tmp_path / "out"
    ee.export(ID, out, quantize=recipe, low_disk=low_disk)
    assert tree(out) == expected[recipe]
    source = read_manifest(out).source
    assert (source["id"], source["revision"]) == (ID, hub.models[ID].refs["main"])
    assert fetched(hub) == {f"model-{i + 1:05}-of-{SHARDS:05}.safetensors": 1 for i in range(SHARDS)}
    assert not hub.asked(r"\.bin|\.py") + hub.asked(r"\.bin|\.py", "HEAD")
    assert left_beside(out) == set()
    cached = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(cached) == (0 if low_disk else SHARDS)


def test_from_the_cache_without_a_network(
    hub: Hub, tmp_path: Path, expected: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ee.export(ID, tmp_path / "first", quantize="int4")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    ee.export(ID, tmp_path / "second", quantize="int4", revision=hub.models[ID].refs["main"])
    ee.export(ID, tmp_path / "third", quantize="int4", low_disk=True)
    assert len(hub.requests) == asked
    assert tree(tmp_path / "first") == tree(tmp_path / "second") == tree(tmp_path / "third") == expected["int4"]


def test_what_the_cache_has_is_used_and_kept(hub: Hub, tmp_path: Path, expected: dict[str, dict[str, str]]) -> None:
    model = HubModel.find(ID)
    names = [f"model-{i:05}-of-{SHARDS:05}.safetensors" for i in (1, 5, 12)]
    for name in names:
        model.fetch(name)
    hub.requests.clear()
    ee.export(ID, tmp_path / "out", quantize="int4", low_disk=True)
    assert tree(tmp_path / "out") == expected["int4"]
    assert len(fetched(hub)) == SHARDS - 3
    assert {path.name for path in model.snapshot.glob("*.safetensors")} == set(names)


def test_what_another_commit_shares_is_not_fetched_again(
    hub: Hub, tmp_path: Path, folder: Path, expected: dict[str, dict[str, str]]
) -> None:
    old = hub.models[ID].commit(files_of(folder) | {"README.md": b"old"}, "old")
    ee.export(ID, tmp_path / "first", quantize="int4", revision="old")
    assert read_manifest(tmp_path / "first").source["revision"] == old
    hub.requests.clear()
    for low_disk in (True, False):
        ee.export(ID, tmp_path / str(low_disk), quantize="int4", low_disk=low_disk)
        assert tree(tmp_path / str(low_disk)) == expected["int4"]
    assert fetched(hub) == {}


def test_a_push_in_between_changes_nothing(hub: Hub, tmp_path: Path, expected: dict[str, dict[str, str]]) -> None:
    new = files_of(make_source(tmp_path / "new", change=lambda tensors: tensors["lm_head.weight"].fill(0)))
    hub.faults.append(Fault(STORED, before=lambda: hub.models[ID].commit(new)))
    first = hub.models[ID].refs["main"]
    ee.export(ID, tmp_path / "out", quantize="int4")
    assert hub.models[ID].refs["main"] != first
    assert tree(tmp_path / "out") == expected["int4"]


def test_faults_of_the_connection_do_not_show(hub: Hub, tmp_path: Path, expected: dict[str, dict[str, str]]) -> None:
    hub.faults += [
        Fault("api/models", status=503),
        Fault("resolve", "HEAD", times=3, status=429, headers={"Retry-After": "0"}),
        Fault(STORED, status=500),
        Fault(STORED, times=2, status=BROKEN_OFF),
        Fault(digest_of(hub, 3), times=2, status=BROKEN_OFF),  # the header, and the shard
        Fault(digest_of(hub, 4), times=2, status=502),
    ]
    ee.export(ID, tmp_path / "out", quantize="int4", low_disk=True)
    assert tree(tmp_path / "out") == expected["int4"]


# How much is on the disk


class Watch(NullProgress):
    """Measures what is on the disk whenever something moves; also the steps, and the bytes of each."""

    def __init__(self, root: Path) -> None:
        self.root, self.peak, self.key = root, 0, ""
        self.steps: dict[str, float] = {}
        self.lock = threading.Lock()
        self.others: list[Watch] = []

    def start(self, label: str, total: float, unit: str) -> None:
        self.key = f"{label} of {total:.0f} {unit}"
        self.steps[self.key] = 0

    def advance(self, amount: float) -> None:
        with self.lock:
            self.steps[self.key] += amount
        used = 0
        for path in self.root.rglob("*"):
            try:
                used += 0 if path.is_symlink() else path.stat().st_blocks * 512 if path.is_file() else 0
            except FileNotFoundError:
                continue
        self.peak = max(self.peak, used)

    def beside(self) -> Watch:
        self.others.append(Watch(self.root))
        return self.others[-1]


def test_low_disk_keeps_few_shards(hub: Hub, tmp_path: Path, folder: Path) -> None:
    watch = Watch(tmp_path)
    ee.export(ID, tmp_path / "out", quantize="int4", low_disk=True, progress=watch)
    peak = max(watch.peak, *(other.peak for other in watch.others))
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    bundle = sum(path.stat().st_blocks * 512 for path in (tmp_path / "out").iterdir())
    small = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".safetensors")
    assert len(shards) == SHARDS
    # The small files twice (cache and working folder), the journal, and what a block of the disk rounds up.
    allowed = bundle + LARGEST_STOCK * max(shards) + 2 * small + SHARDS * 8192 + 200_000
    assert peak <= allowed < bundle + sum(shards)
    assert peak >= bundle / 2


def test_the_transfer_is_shown(hub: Hub, tmp_path: Path, folder: Path) -> None:
    watch = Watch(tmp_path / "nothing")
    ee.export(ID, tmp_path / "out", progress=watch)
    sizes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert watch.others[0].steps == {f"downloading weights of {sizes} bytes": sizes}
    configuration = next(key for key in watch.steps if key.startswith("fetching configuration"))
    assert configuration == f"fetching configuration of {watch.steps[configuration]:.0f} bytes"
    assert watch.steps[f"reading headers of {SHARDS} files"] == SHARDS


@pytest.mark.parametrize(("low_disk", "why"), [(False, "--low-disk"), (True, "Free some space")])
def test_too_little_room_for_the_shards_is_known_first(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_disk: bool, why: str
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(ResourceError, match=f"{ID}: .* [kMG]B are needed for its shards.*{why}"):
        ee.export(ID, tmp_path / "out", low_disk=low_disk)
    assert fetched(hub) == {}
    assert left_beside(tmp_path / "out") == set()


def test_too_little_room_for_both_the_shards_and_the_bundle(
    hub: Hub, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=shards * 3 // 2))
    with pytest.raises(ResourceError, match="not enough disk space"):
        ee.export(ID, tmp_path / "out")
    assert fetched(hub) == {}
    ee.export(ID, tmp_path / "out", low_disk=True)


def test_low_disk_leaves_a_local_folder_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--low-disk: the source is a local folder"):
        ee.export(folder, tmp_path / "out", low_disk=True)


# The command line


def test_command_line(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", ID, str(out), "--revision", "main", "--low-disk", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["folder"] == str(out)
    for source, options, why in (
        ("owner/nothing", [], "owner/nothing: neither a local folder nor a model on the hub"),
        (ID, ["--revision", "v9"], f"{ID}: it has no revision 'v9'. Check --revision."),
    ):
        assert cli.main(["export", source, str(tmp_path / "other"), *options]) == 2
        err = capfd.readouterr().err
        assert err.startswith(f"error: cannot get checkpoint: {why}"), err
        assert len(err.splitlines()) == 1
