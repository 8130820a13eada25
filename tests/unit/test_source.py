from __future__ import annotations

import errno
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter import hub as hub_room
from exporter.source import describe_source, is_hub_id, open_source, resolve_source
from model.errors import EnvironmentFault, ExaoneError, ResourceError, UsageError

hub = pytest.importorskip("huggingface_hub")


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="--revision: the source is a local folder"):
        resolve_source(str(tmp_path), "main")
    with open_source(str(tmp_path), tmp_path.parent / "out") as opened:
        assert (opened.folder, opened.id, opened.revision, opened.feed) == (tmp_path, None, None, None)
    assert not (tmp_path.parent / "out").exists()


@pytest.mark.parametrize(
    "source",
    ["no/such/folder", "./nothing", "/nothing/here", "nothing", "", "-x/y", "owner/..", "한국/어", "a/b\n", "a/b?x=y"],
)
def test_neither_folder_nor_hub_id(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(source)
    if source == "":
        assert resolve_source(source) == Path()
        return
    with pytest.raises(UsageError, match="no such folder"):
        resolve_source(source)


def test_what_is_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")
    assert resolve_source("owner/name") == Path("owner/name")


def test_a_file_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="it is a file"):
        resolve_source(str(tmp_path / "model.safetensors"))


def answer(kind: str) -> Exception:
    errors: Any = hub.errors
    response = SimpleNamespace(status_code=418, headers={}, request=None, url="")
    transport = errors.HfHubHTTPError.__bases__[0]
    made: dict[str, Exception] = {
        "missing": errors.RepositoryNotFoundError("m", response=response),
        "gated": errors.GatedRepoError("m", response=response),
        "revision": errors.RevisionNotFoundError("m", response=response),
        "offline": errors.OfflineModeIsEnabled("m"),
        "uncached": errors.LocalEntryNotFoundError("m"),
        "server": errors.HfHubHTTPError("m", response=response),
        "network": ConnectionError("m"),
        "transport": transport("m"),
        "xet": errors.XetDownloadError("m"),
        "disk": OSError(errno.ENOSPC, "m"),
        "name": errors.HFValidationError("m"),
    }
    return made[kind]


@pytest.mark.parametrize(
    ("kind", "error", "why"),
    [
        ("missing", UsageError, "neither a local folder nor a model on the hub"),
        ("name", UsageError, "neither a local folder nor a model on the hub"),
        ("gated", UsageError, "gated.*Accept its licence"),
        ("revision", UsageError, "it has no revision 'v9'"),
        ("offline", EnvironmentFault, "HF_HUB_OFFLINE"),
        ("uncached", EnvironmentFault, "the hub cannot be reached"),
        ("server", EnvironmentFault, "the hub answered 418"),
        ("network", EnvironmentFault, "the hub cannot be reached"),
        ("transport", EnvironmentFault, "the hub cannot be reached"),
        ("xet", EnvironmentFault, "the hub cannot be reached"),
        ("disk", ResourceError, "the disk is full"),
    ],
)
def test_what_the_library_raises_is_explained(
    kind: str, error: type[ExaoneError], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object, **__: object) -> str:
        raise answer(kind)

    api = SimpleNamespace(model_info=refuse, hf_hub_download=refuse)
    monkeypatch.setattr(hub_room, "make_api", lambda: api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(error, match=f"owner/name: .*{why}"):
        resolve_source("owner/name", "v9")


def test_without_the_hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentFault, match="huggingface_hub is not installed"):
        resolve_source("owner/name")


def test_a_folder_of_the_cache_is_described_by_its_hub_name(tmp_path: Path) -> None:
    assert describe_source(tmp_path / "EXAONE") == (None, None)
    snapshot = tmp_path / "models--LGAI-EXAONE--EXAONE-4.0-1.2B" / "snapshots" / "0a1b"
    assert describe_source(snapshot) == ("LGAI-EXAONE/EXAONE-4.0-1.2B", "0a1b")
