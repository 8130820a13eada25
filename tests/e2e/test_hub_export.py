"""Exports from the hub's stand-in: the same bytes as from a folder, shards as they come, few of them on the disk."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

import exaone_export as ee
from exaone_export import cli
from exporter import export as export_room
from exporter import transfer
from exporter.hub import HubModel
from exporter.low_disk import LARGEST_STOCK, ShardSupply
from model.bundle import file_sha256, read_manifest
from model.errors import (
    CheckpointError,
    EnvironmentFault,
    ExaoneError,
    LockedError,
    NumericalError,
    ResourceError,
    UsageError,
)  # fmt: skip
from model.progress import NullProgress
from tests import tiny
from tests.declared import declare_readers
from tests.hub_server import BROKEN_OFF, Fault, Hub, environment, point_at, serve

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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


# Refusals before the weights


def spoil_config(files: dict[str, bytes]) -> None:
    raw = json.loads(files["config.json"])
    files["config.json"] = json.dumps(raw | {"num_hidden_layers": 12, "layer_types": ["full_attention"] * 12}).encode()


def spoil_index(files: dict[str, bytes]) -> None:
    raw = json.loads(files["model.safetensors.index.json"])
    raw["weight_map"]["lm_head.weight"] = "model-00001-of-00012.safetensors"
    files["model.safetensors.index.json"] = json.dumps(raw).encode()


def spoil_shard(files: dict[str, bytes]) -> None:
    del files["model-00007-of-00012.safetensors"]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (spoil_config, "missing"),
        (spoil_index, "lm_head.weight: .*puts it in"),
        (spoil_shard, "model-00007-of-00012.safetensors: the file does not exist"),
    ],
)
def test_a_bad_checkpoint_costs_no_weights(hub: Hub, tmp_path: Path, folder: Path, spoil: Any, why: str) -> None:
    files = files_of(folder)
    spoil(files)
    hub.add(ID, files)
    with pytest.raises(CheckpointError, match=why):
        ee.export(ID, tmp_path / "out", low_disk=True)
    assert fetched(hub) == {}
    assert left_beside(tmp_path / "out") == set()


@pytest.mark.parametrize("low_disk", [False, True])
def test_a_damaged_shard_is_never_exported(hub: Hub, tmp_path: Path, low_disk: bool) -> None:
    change = lambda content: content[:-1] + bytes([content[-1] ^ 1])  # noqa: E731
    hub.faults.append(Fault(digest_of(hub, 4), times=99, change=change))
    name = f"model-00004-of-{SHARDS:05}.safetensors"
    with pytest.raises(CheckpointError, match=f"{name}: its sha256 is not the one that the hub states"):
        ee.export(ID, tmp_path / "out", low_disk=low_disk)
    assert not (tmp_path / "out").exists()
    assert left_beside(tmp_path / "out") == set()


def test_a_header_that_is_not_the_files_own(hub: Hub, tmp_path: Path) -> None:
    """Two tensors of one shape change places in the header that is sent first: the weights would be mixed up."""
    name = f"model-00004-of-{SHARDS:05}.safetensors"
    content = hub.models[ID].commits[hub.models[ID].refs["main"]][name]
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = [key for key in header if key != "__metadata__"]
    one, two = next(
        (a, b) for i, a in enumerate(tensors) for b in tensors[i + 1 :] if header[a]["shape"] == header[b]["shape"]
    )
    swapped = content.replace(one.encode(), b"#").replace(two.encode(), one.encode()).replace(b"#", two.encode())
    hub.faults.append(Fault(digest_of(hub, 4), change=lambda _: swapped))
    with pytest.raises(CheckpointError, match=f"{name}: its header is not the one that the hub gave before"):
        ee.export(ID, tmp_path / "out")


def test_a_shard_that_changes_while_it_is_read(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = ShardSupply.release

    def touch(self: ShardSupply, file: Path) -> None:
        release(self, file)
        for path in (tmp_path / "cache").rglob("*.safetensors"):
            with path.open("r+b") as stream:
                stream.seek(-1, 2)
                stream.write(b"x")

    monkeypatch.setattr(ShardSupply, "release", touch)
    with pytest.raises(CheckpointError, match="the file changed during the export"):
        ee.export(ID, tmp_path / "out")


def test_a_hub_that_goes_away_meanwhile(hub: Hub, tmp_path: Path) -> None:
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == SHARDS + 5:
            hub.faults.insert(0, Fault(".", "HEAD", times=999, status=503))
            hub.faults.insert(0, Fault(".", "GET", times=999, status=503))

    hub.faults.append(Fault(STORED, times=999, before=count))
    with pytest.raises(EnvironmentFault, match="the hub answered 503|cannot be reached"):
        ee.export(ID, tmp_path / "out", low_disk=True)
    assert left_beside(tmp_path / "out") == set()


def test_a_nan_found_late_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.layers.7.mlp.down_proj.weight"][3, 3] = float("nan")

    hub.add(ID, files_of(make_source(tmp_path / "bad" / "source", change=spoil)))
    with pytest.raises(NumericalError, match="layers.7.mlp.down_proj"):
        ee.export(ID, tmp_path / "run" / "out", low_disk=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_an_interrupt_leaves_nothing_unless_it_is_to(
    hub: Hub, tmp_path: Path, expected: dict[str, dict[str, str]], keep: bool
) -> None:
    class Interrupting(NullProgress):
        writing = False
        left = 8e5

        def start(self, label: str, total: float, unit: str) -> None:
            self.writing = label.startswith("writing")

        def advance(self, amount: float) -> None:
            self.left -= amount if self.writing else 0
            if self.left < 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ee.export(ID, tmp_path / "out", low_disk=True, keep_partial=keep, progress=Interrupting())
    assert "shards" not in {thread.name for thread in threading.enumerate()}
    if not keep:
        assert left_beside(tmp_path / "out") == set()
        return
    assert any(".source-" in name for name in left_beside(tmp_path / "out"))
    before = fetched(hub)
    report = ee.export(ID, tmp_path / "out", low_disk=True, resume=True)
    assert report.resumed_parts > 0
    assert tree(tmp_path / "out") == expected["none"]
    assert sum(fetched(hub).values()) - sum(before.values()) < SHARDS
    assert left_beside(tmp_path / "out") == set()


# Killed, and the same command again

CHILD = """
import os, signal, sys
import exaone_export as ee
from exporter import export as export_room
from exporter.low_disk import ShardSupply
from tests.declared import declare_readers

export_room._trace = declare_readers
left, release = int(sys.argv[2]), ShardSupply.release

def count(self, file):
    global left
    release(self, file)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

ShardSupply.release = count
ee.export(sys.argv[1], sys.argv[3], quantize="int4", low_disk=True)
"""


def test_killed_and_started_again(hub: Hub, tmp_path: Path, expected: dict[str, dict[str, str]]) -> None:
    root = Path(__file__).parents[2]
    out = tmp_path / "out"

    def run(kill_after: int) -> int:
        command = [sys.executable, "-c", CHILD, ID, str(kill_after), str(out)]
        env = environment(hub, tmp_path / "cache") | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=env, cwd=root, timeout=120, check=False).returncode

    assert run(6) == -signal.SIGKILL
    assert not out.exists()
    before = fetched(hub)
    assert 6 <= len(before) < SHARDS
    hub.requests.clear()
    assert run(0) == 0
    after = fetched(hub)
    done = {f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i in range(6)}
    assert not done & set(after)
    assert len(set(before) & set(after)) <= 1  # the one that was on its way
    assert tree(out) == expected["int4"]
    assert left_beside(out) == set()


def test_two_exports_to_one_folder(hub: Hub, tmp_path: Path, expected: dict[str, dict[str, str]]) -> None:
    refused: list[ExaoneError] = []

    def second() -> None:
        try:
            ee.export(ID, tmp_path / "out", low_disk=True)
        except ExaoneError as error:
            refused.append(error)

    hub.faults.append(Fault(STORED, before=second))
    ee.export(ID, tmp_path / "out", low_disk=True)
    assert tree(tmp_path / "out") == expected["none"]
    (error,) = refused
    assert isinstance(error, LockedError)
    assert error.where == "out"


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
