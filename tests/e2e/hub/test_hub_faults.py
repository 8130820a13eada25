"""Exports from the hub's stand-in that go wrong: bad checkpoints, bad connections, interrupts and kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import exaone_export as ee
from exporter.low_disk import ShardSupply
from model.errors import (
    CheckpointError,
    EnvironmentFault,
    ExaoneError,
    LockedError,
    NumericalError,
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
from tests.hub_server import Fault, Hub, environment

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
    root = Path(__file__).parents[3]
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
