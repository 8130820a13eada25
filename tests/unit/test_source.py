from __future__ import annotations

import errno
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.source import PATTERNS, describe_source, resolve_source
from model.errors import EnvironmentFault, ExaoneError, ResourceError, UsageError

hub = pytest.importorskip("huggingface_hub")


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="--revision: the source is a local folder"):
        resolve_source(str(tmp_path), "main")


@pytest.mark.parametrize(
    "source", ["no/such/folder", "./nothing", "/nothing/here", "nothing", "", "-x/y", "owner/..", "한국/어"]
)
def test_neither_folder_nor_hub_id(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if source == "":
        assert resolve_source(source) == Path()
        return
    with pytest.raises(UsageError, match="no such folder"):
        resolve_source(source)


def test_a_file_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="it is a file"):
        resolve_source(str(tmp_path / "model.safetensors"))


def test_downloads_only_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls: list[Any] = []

    def download(*args: object, **kwargs: object) -> str:
        calls.append((args, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_source("owner/name", "v1") == tmp_path
    ((args, kwargs),) = calls
    assert args == ("owner/name",)
    assert (kwargs["revision"], kwargs["allow_patterns"]) == ("v1", list(PATTERNS))


def answer(kind: str) -> Exception:
    errors: Any = hub.errors
    response = SimpleNamespace(status_code=503, headers={}, request=None, url="")
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
        ("server", EnvironmentFault, "the hub answered 503"),
        ("network", EnvironmentFault, "the hub cannot be reached"),
        ("disk", ResourceError, "the disk is full"),
        ("transport", EnvironmentFault, "the hub cannot be reached"),
    ],
)
def test_what_the_hub_says_is_explained(
    kind: str, error: type[ExaoneError], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object, **__: object) -> str:
        raise answer(kind)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(error, match=f"owner/name: .*{why}"):
        resolve_source("owner/name", "v9")


def test_without_the_hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentFault, match="huggingface_hub is not installed"):
        resolve_source("owner/name")


def test_source_is_described_by_its_hub_name_or_its_folder(tmp_path: Path) -> None:
    assert describe_source(tmp_path / "EXAONE") == ("EXAONE", None)
    snapshot = tmp_path / "models--LGAI-EXAONE--EXAONE-4.0-1.2B" / "snapshots" / "0a1b"
    assert describe_source(snapshot) == ("LGAI-EXAONE/EXAONE-4.0-1.2B", "0a1b")
