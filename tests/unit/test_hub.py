"""A model on the hub, seen through the stand-in: its commit, its files, their bytes, and what goes wrong with them."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter import hub as hub_room
from exporter import transfer
from exporter.hub import HubModel
from exporter.hub_errors import Stopped
from exporter.placeholders import peek_source
from exporter.source import resolve_source
from model.config import load_config
from model.errors import CheckpointError, EnvironmentFault, ExaoneError, UsageError
from model.shards import open_shards
from tests import tiny
from tests.hub_server import BROKEN_OFF, Fault, Hub, git_id, point_at, serve

ID = "LGAI-EXAONE/EXAONE-Tiny"
SHARD = "model-00002-of-00003.safetensors"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("hub") / "source", "hybrid", sharded=3)


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0, 0.0))
    with serve() as hub:
        hub.add(ID, files_of(folder) | {"pytorch_model.bin": b"pickle", "code.py": b"evil()", "onnx/model.json": b"{}"})
        point_at(hub, monkeypatch, tmp_path / "cache")
        yield hub


def commit(hub: Hub) -> str:
    return hub.models[ID].refs["main"]


# What is fetched, and from where


def test_a_peek_needs_no_weights(hub: Hub, folder: Path) -> None:
    with peek_source(ID) as peeked:
        assert load_config(peeked) == load_config(folder)
        found, _ = open_shards(peeked)
        true, _ = open_shards(folder)
        assert {n: (r.dtype, r.shape, r.offset, r.nbytes) for n, r in found.items()} == {
            n: (r.dtype, r.shape, r.offset, r.nbytes) for n, r in true.items()
        }
        assert (peeked / SHARD).stat().st_size == (folder / SHARD).stat().st_size
        assert (peeked / SHARD).stat().st_blocks * 512 <= 128 << 10
    assert not peeked.exists()
    assert all(request.range == "bytes=0-65535" for request in hub.requests if request.server == "storage")


def test_a_header_longer_than_the_first_read(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.placeholders._FIRST_READ", 64)
    with peek_source(ID) as peeked:
        assert set(open_shards(peeked)[0]) == set(open_shards(folder)[0])


def test_only_what_is_needed_is_asked_for(hub: Hub, folder: Path) -> None:
    whole = resolve_source(ID)
    assert {path.name for path in whole.iterdir()} == {path.name for path in folder.iterdir()}
    assert all((whole / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())
    assert not [r.path for r in hub.requests if r.path.endswith((".bin", ".py")) or "onnx" in r.path]
    asked = len(hub.requests)
    assert resolve_source(ID) == whole
    assert len(hub.requests) <= asked + 2  # the commit, and whether config.json is still what it was


def test_revisions_are_recorded_as_commits(hub: Hub, folder: Path) -> None:
    old = commit(hub)
    changed = files_of(folder) | {"generation_config.json": b'{"temperature": 0.5}'}
    new = hub.models[ID].commit(changed, "v2")
    for revision, sha in ((None, old), ("main", old), ("v2", new), (new, new), (old, old)):
        assert HubModel.find(ID, revision).commit == sha
    assert resolve_source(ID, "v2").name == new
    assert (resolve_source(ID, "v2") / "generation_config.json").read_bytes() == b'{"temperature": 0.5}'


def test_a_push_in_between_does_not_mix_two_commits(hub: Hub, folder: Path) -> None:
    changed = files_of(folder) | {"config.json": (folder / "config.json").read_bytes() + b"\n"}
    hub.faults.append(Fault("config.json", "HEAD", before=lambda: hub.models[ID].commit(changed)))
    model = HubModel.find(ID)
    assert model.commit == commit(hub)
    assert model.files is not None
    assert model.files["config.json"].git_id == git_id(changed["config.json"])


# Tokens


def test_the_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.models[ID].private = hub.models[ID].gated = True
    hub.users["hf_secret"] = ("somebody", "read")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    resolve_source(ID)
    with peek_source(ID):
        pass
    assert {request.token for request in hub.requests if request.server == "hub"} == {"hf_secret"}
    assert {request.token for request in hub.requests if request.server == "storage"} == {""}


@pytest.mark.parametrize(("private", "gated", "why"), [(True, False, "neither a local"), (False, True, "is gated")])
def test_what_needs_a_token_says_so(hub: Hub, private: bool, gated: bool, why: str) -> None:
    hub.models[ID].private, hub.models[ID].gated = private, gated
    with pytest.raises(UsageError, match=f"{why}.*hf auth login"):
        resolve_source(ID)


def test_no_message_shows_a_token_or_an_address(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    hub.users["hf_secret"] = ("somebody", "read")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for status in (403, 500):
        hub.faults.append(Fault(f"/{SHARD}|^/[0-9a-f]{{64}}", "GET", times=9, status=status))
        with pytest.raises(ExaoneError) as caught:
            resolve_source(ID)
        hub.faults.clear()
        shown = str(caught.value) + caplog.text + "".join(capfd.readouterr())
        assert "secret" not in shown
        assert "http" not in shown.replace("huggingface_hub", "")


# Refusals and faults


@pytest.mark.parametrize(
    ("fault", "error", "why"),
    [
        (Fault("api/models", status=404, code="RepoNotFound"), UsageError, "neither a local folder nor a model"),
        (Fault("api/models", status=404, code="RevisionNotFound"), UsageError, "no revision 'v9'"),
        (Fault("api/models", status=401, code=""), UsageError, "does not accept the token"),
        (Fault("api/models", status=403), UsageError, "may not read it"),
        (Fault("api/models", status=503, times=9), EnvironmentFault, "the hub answered 503"),
        (Fault("api/models", status=418), EnvironmentFault, "the hub answered 418"),
        (Fault("config.json", "HEAD", status=404, code="EntryNotFound"), CheckpointError, "it has no config.json"),
        (Fault("api/models", change=lambda _: b"<html>"), EnvironmentFault, "not one of a hub"),
    ],
)
def test_what_the_hub_says_is_explained(hub: Hub, fault: Fault, error: type[ExaoneError], why: str) -> None:
    hub.models[ID].refs["v9"] = commit(hub)
    hub.faults.append(fault)
    with pytest.raises(error, match=f"{ID}: .*{why}"):
        HubModel.find(ID, "v9")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_hub_is_asked_again(hub: Hub, folder: Path, status: int, caplog: pytest.LogCaptureFixture) -> None:
    hub.faults.append(Fault("api/models", status=status, headers={"Retry-After": "0"}))
    hub.faults.append(Fault("^/[0-9a-f]{64}", status=status, times=2, headers={"Retry-After": "0"}))
    with peek_source(ID) as peeked:
        assert len(open_shards(peeked)[0]) == len(open_shards(folder)[0])
    assert f"the hub answered {status} for the list of files: trying again" in caplog.text


def test_patience_ends(hub: Hub) -> None:
    model = HubModel.find(ID)
    hub.faults.append(Fault("^/[0-9a-f]{64}", status=503, times=99))
    with pytest.raises(EnvironmentFault, match="the hub answered 503. Try again later"):
        model.start_of(SHARD, 8)
    assert len(hub.asked("^/[0-9a-f]{64}")) == 4


def test_a_cut_connection_goes_on_where_it_broke(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    size = (folder / SHARD).stat().st_size
    arrived: list[float] = []
    model = HubModel.find(ID)
    # The library counts in pieces of this size; a piece that was not whole is asked for again.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    hub.faults.append(Fault("^/[0-9a-f]{64}", status=BROKEN_OFF))
    assert model.fetch(SHARD, arrived.append).read_bytes() == (folder / SHARD).read_bytes()
    first, second = hub.asked("^/[0-9a-f]{64}")
    assert (first.range, second.range) == ("", f"bytes={size // 2 // 4096 * 4096}-")
    assert sum(arrived) == size


@pytest.mark.parametrize("into_cache", [True, False])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_download_is_refused_and_removed(hub: Hub, tmp_path: Path, damage: str, into_cache: bool) -> None:
    def change(content: bytes) -> bytes:
        return content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1])

    model = HubModel.find(ID)
    hub.faults.append(Fault("^/[0-9a-f]{64}", change=change))
    place = None if into_cache else tmp_path / "place"
    with pytest.raises(CheckpointError, match=f"{SHARD}: .*(sha256|cut short)"):
        model.fetch(SHARD, folder=place)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert not left
    assert model.fetch(SHARD, folder=place).stat().st_size == model.files[SHARD].size  # type: ignore[index]


def test_a_damaged_file_in_the_cache_is_refused_and_kept(hub: Hub) -> None:
    model = HubModel.find(ID)
    path = model.fetch(SHARD)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{SHARD}: its sha256 is not.*hf cache"):
        model.fetch(SHARD)
    assert path.read_bytes() == content


def test_small_files_are_checked_by_their_git_hash(hub: Hub) -> None:
    model = HubModel.find(ID)
    hub.faults.append(Fault("/tokenizer.json", change=lambda content: content.replace(b"vocab", b"vocal", 1)))
    with pytest.raises(CheckpointError, match="tokenizer.json: its git hash is not"):
        model.fetch("tokenizer.json")
    assert model.cached("tokenizer.json") is None


def test_a_transfer_that_is_stopped_ends(hub: Hub, tmp_path: Path) -> None:
    model = HubModel.find(ID)
    hub.faults.append(Fault("^/[0-9a-f]{64}", before=model.stopped.set))
    with pytest.raises(Stopped):
        model.fetch(SHARD)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 100_000]


# Without a network


def test_offline_the_cache_is_enough_if_it_is_whole(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resolve_source(ID, "main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    for revision in (None, "main", commit(hub)):
        assert resolve_source(ID, revision).name == commit(hub)
        with peek_source(ID, revision) as peeked:
            assert (peeked / SHARD).read_bytes() == (folder / SHARD).read_bytes()
    assert len(hub.requests) == asked
    assert not caplog.records
    for name, revision in (("owner/name", None), (ID, "v2")):
        with pytest.raises(EnvironmentFault, match=f"{name}: not in the cache, and HF_HUB_OFFLINE is set"):
            resolve_source(name, revision)


def test_offline_an_incomplete_cache_is_not_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with peek_source(ID):
        pass
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match="not in the cache, and HF_HUB_OFFLINE is set"):
        resolve_source(ID)


def test_a_hub_that_is_gone_leaves_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = resolve_source(ID)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve_source(ID) == whole
    assert "taken from the cache" in caplog.text
    shutil.rmtree(whole)
    with pytest.raises(EnvironmentFault, match="the hub cannot be reached"):
        resolve_source(ID)


# Odd models


def test_pickled_weights_are_named(hub: Hub, folder: Path) -> None:
    hub.add(ID, {"config.json": (folder / "config.json").read_bytes(), "pytorch_model.bin": b"pickle"})
    with peek_source(ID) as peeked, pytest.raises(CheckpointError, match="pytorch_model.bin: pickled weights"):
        open_shards(peeked)
    assert not hub.asked("pytorch_model.bin", "HEAD") + hub.asked("pytorch_model.bin")


@pytest.mark.parametrize("length", [0, 2**62, 10**8 + 1])
def test_an_absurd_header_costs_no_download(hub: Hub, folder: Path, length: int) -> None:
    weights = length.to_bytes(8, "little") + b"{" * 1000
    hub.add(ID, {"config.json": (folder / "config.json").read_bytes(), "model.safetensors": weights})
    with peek_source(ID) as peeked, pytest.raises(CheckpointError, match="model.safetensors"):
        open_shards(peeked)
    assert len(hub.asked("^/[0-9a-f]{64}")) == 1


def test_an_absurd_size_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    described = hub_room._described
    monkeypatch.setattr(hub_room, "_described", lambda entry: described(entry).__class__(
        **{**vars(described(entry)), "size": 2**60 if entry.rfilename == SHARD else entry.size}))  # fmt: skip
    with (
        pytest.raises(CheckpointError, match=f"{SHARD}: the hub says it has 1152921504606846976 bytes"),
        peek_source(ID),
    ):
        pass


def test_small_weights_may_live_in_git(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hub_server.LARGE", ())
    with peek_source(ID) as peeked:
        assert (peeked / SHARD).read_bytes() == (folder / SHARD).read_bytes()


def test_an_index_cannot_lead_outside(hub: Hub, folder: Path) -> None:
    index = b'{"weight_map": {"a": "../outside.safetensors", "b": "/etc/passwd"}}'
    hub.add(ID, {"config.json": (folder / "config.json").read_bytes(), "model.safetensors.index.json": index,
                 "../outside.safetensors": b"x"})  # fmt: skip
    with peek_source(ID) as peeked, pytest.raises(ExaoneError, match="leads outside"):
        open_shards(peeked)
    assert not hub.asked("outside|passwd")


def test_threads_may_fetch_at_the_same_time(hub: Hub, folder: Path) -> None:
    model = HubModel.find(ID)
    names = [name for name in model.files or {} if name.endswith(".safetensors")]
    threads = [threading.Thread(target=model.fetch, args=(name,)) for name in names * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert (model.snapshot / name).read_bytes() == (folder / name).read_bytes()


def test_the_bar_suits_both_ways_of_transfer() -> None:
    """The library reports plain HTTP and Xet differently; each byte on the disk counts once in both."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    arrived: list[float] = []
    stopped = threading.Event()
    bar = transfer.make_bar(arrived.append, stopped)

    def report(done: int) -> SimpleNamespace:
        rates = {"total_bytes_completion_rate": 1.0, "total_transfer_bytes_completion_rate": 1.0}
        return SimpleNamespace(
            total_bytes=100, total_bytes_completed=done, total_transfer_bytes_completed=done // 2, **rates
        )

    options = {"reconstruction_desc": "a", "name": "b", "log_level": logging.WARNING}
    with XetDownloadProgressReporter(**options, total=100, tqdm_class=bar) as reporter:
        reporter.update_progress(report(40))
        reporter.update_progress(report(100))
        assert arrived == [40, 60]
        stopped.set()
        with pytest.raises(Stopped):
            reporter.update_progress(report(101))


def test_transfers_are_small_in_memory_unless_the_user_wants_more(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_xet = pytest.importorskip("hf_xet")
    for name in transfer._XET_MEMORY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_XET_RECONSTRUCTION_MIN_PREFETCH_BUFFER", "100mb")
    transfer.make_api()
    config = hf_xet.XetConfig()
    assert config.get("reconstruction.download_buffer_limit") <= 256_000_000
    assert config.get("reconstruction.download_buffer_size") <= 256_000_000
    assert config.get("reconstruction.min_prefetch_buffer") == 100_000_000
    assert config.get("chunk_cache.size_bytes") == 0
    for name in transfer._XET_MEMORY:
        monkeypatch.delenv(name, raising=False)
