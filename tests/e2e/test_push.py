"""Bundles pushed to the hub's stand-in: whole, in one commit, under an allowed name, and only by who may."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id

import exaone_export as ee
from exaone_export import cli
from exporter import export as export_room
from exporter import push, transfer
from exporter.push import check_form, check_name
from model.bundle import MANIFEST, VERIFY, check_contents, check_sizes, read_manifest
from model.errors import BundleError, EnvironmentFault, ExaoneError, UsageError
from tests import tiny
from tests.declared import declare_graphs
from tests.hub_server import BROKEN_OFF, Fault, Hub, point_at, serve

REPOSITORY = "somebody/EXAONE-Tiny-ONNX"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_room, "_trace", declare_graphs)
        ee.export(tiny.make_checkpoint(root / "source", "hybrid"), root / "bundle")
    return root


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "bundle", tmp_path / "bundle"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(export_room, "_trace", declare_graphs)
    with serve() as hub:
        point_at(hub, monkeypatch, tmp_path / "cache")
        hub.users["hf_writer"] = ("somebody", "write")
        hub.users["hf_reader"] = ("somebody", "read")
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield hub


def pushed_files(hub: Hub, repository: str = REPOSITORY) -> dict[str, bytes]:
    model = hub.models[repository]
    return {name: content for name, content in model.commits[model.refs["main"]].items() if name != ".gitattributes"}


def test_what_is_pushed_is_the_bundle_and_nothing_else(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    (bundle / "notes.txt").write_text("private")
    (bundle / VERIFY).write_text("{}")
    report = ee.push(bundle, REPOSITORY)
    manifest = read_manifest(bundle)
    sent = pushed_files(hub)
    assert set(sent) == {*manifest.files, MANIFEST, VERIFY}
    assert all(content == (bundle / name).read_bytes() for name, content in sent.items())
    model = hub.models[REPOSITORY]
    assert len(model.commits) == 2  # the empty repository, and one more
    assert (report.repository, report.commit) == (REPOSITORY, model.refs["main"])
    assert report.url.endswith(f"/{REPOSITORY}/commit/{report.commit}")
    assert (report.files, report.bytes) == (len(sent), sum(map(len, sent.values())))
    assert not model.private
    assert {request.token for request in hub.requests if request.server == "storage"} == {""}
    # What comes back is a bundle.
    back = tmp_path / "back"
    back.mkdir()
    for name, content in sent.items():
        (back / name).write_bytes(content)
    check_sizes(back, read_manifest(back))
    check_contents(back, read_manifest(back), largest=1 << 40)


def test_export_and_push_in_one_go(hub: Hub, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(made / "source"), str(out), "--push-to-hub", "EXAONE-Tiny-ONNX", "--private", "--json"]
    assert cli.main(arguments) == 0
    pushed = json.loads(capfd.readouterr().out)["pushed"]
    assert pushed["repository"] == REPOSITORY
    assert hub.models[REPOSITORY].private
    assert pushed_files(hub)[MANIFEST] == (out / MANIFEST).read_bytes()
    assert cli.main(["push", str(out), "team/EXAONE-Other"]) == 0
    assert f"team/EXAONE-Other/commit/{hub.models['team/EXAONE-Other'].refs['main']}: " in capfd.readouterr().out


def test_a_second_push_of_the_same_changes_nothing(hub: Hub, bundle: Path) -> None:
    first = ee.push(bundle, REPOSITORY)
    uploaded = len([request for request in hub.requests if request.method == "PUT"])
    second = ee.push(bundle, REPOSITORY)
    assert pushed_files(hub)[MANIFEST] == (bundle / MANIFEST).read_bytes()
    assert len([request for request in hub.requests if request.method == "PUT"]) == uploaded
    assert first.bytes == second.bytes


def test_private_is_about_a_push(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--private: .*--push-to-hub"):
        ee.export(made / "source", tmp_path / "out", private=True)


# Names


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "owner/", "/EXAONE-x", "a/b/EXAONE-x", "owner/EXAONE x", "owner/EXAONE--x", "owner/EXAONE..x",
        "own--er/EXAONE-x", "owner/EXAONE-x.git", "owner/EXAONE-x-", "owner/EXAONE-x.", "owner/EXAONE-\u00e9",
        "owner/EXAONE-" + 90 * "x", "owner/EXAONE-x\n", "spaces/owner/EXAONE-x", "hub.example/owner/EXAONE-x",
    ],
)  # fmt: skip
def test_what_can_be_no_name_is_said_at_once(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the hub is asked, the source looked at, or anything written: even of a source that is not there."""
    with pytest.raises(ValueError, match=r"."):
        validate_repo_id(name)
    monkeypatch.setattr(push, "make_api", None)
    for source in (str(made / "source"), "nobody/nothing"):
        with pytest.raises(UsageError, match=r"cannot push: .*Name it like owner/EXAONE-"):
            ee.export(source, tmp_path / "out", push_to_hub=name)
    with pytest.raises(UsageError, match="cannot push"):
        ee.push(tmp_path / "nowhere", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["EXAONE-4.5-33B-ONNX-int4", "me/EXAONE_x.y-z", "o/" + 96 * "x"])
def test_what_can_be_one(name: str) -> None:
    validate_repo_id(name)
    check_form(name)


@pytest.mark.parametrize(
    ("licence", "source", "name", "proposal"),
    [
        ("EXAONE AI Model License Agreement 1.2 - NC", None, "me/my-int4", "me/EXAONE-my-int4"),
        ("the exaone model", "somebody/else", "my-int4", "EXAONE-my-int4"),
        (None, None, "me/exaone-tiny", "me/EXAONE-tiny"),
        (None, "LGAI-EXAONE/EXAONE-4.0-1.2B", "me/tiny", "me/EXAONE-tiny"),
        ("Apache License", "LGAI-EXAONE/EXAONE-4.0-1.2B", "me/tiny", "me/EXAONE-tiny"),
        ("Apache License", "me/own", "me/tiny", None),
        ("EXAONE AI Model License Agreement", "me/own", "me/EXAONE-tiny", None),
    ],
)
def test_names_begin_as_the_licence_wants(
    tmp_path: Path, licence: str | None, source: str | None, name: str, proposal: str | None
) -> None:
    if licence is not None:
        (tmp_path / "LICENSE").write_text(licence)
    if proposal is None:
        check_name(name, tmp_path, source)
        return
    with pytest.raises(UsageError, match=f"{name}: EXAONE's licence wants.*Call it {proposal}"):
        check_name(name, tmp_path, source)


@pytest.mark.parametrize("name", ["", "a/b/c", "-x", "EXAONE x", "me/", "/EXAONE", "me/EXAONE\n"])
def test_names_that_the_hub_does_not_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a repository of the hub"):
        check_name(name, tmp_path, None)


# Before hours are spent


@pytest.mark.parametrize(
    ("token", "repository", "why"),
    [
        ("", REPOSITORY, "nobody is logged in.*hf auth login"),
        ("hf_wrong", REPOSITORY, "the hub does not accept the token"),
        ("hf_reader", REPOSITORY, "the token may read only"),
        ("hf_writer", "stranger/EXAONE-Tiny", "somebody is not a member of stranger. Push to somebody/EXAONE-Tiny"),
        ("hf_writer", "somebody/tiny", "EXAONE's licence wants.*Call it somebody/EXAONE-tiny"),
    ],
)
def test_who_may_not_push_learns_it_before_the_export(
    hub: Hub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, repository: str, why: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(export_room, "_trace", lambda *_: pytest.fail("the export began"))
    source = Path(shutil.copytree(made / "source", tmp_path / "source"))
    (source / "LICENSE").write_text("EXAONE AI Model License Agreement 1.2 - NC")
    with pytest.raises(UsageError, match=why):
        ee.export(source, tmp_path / "out", push_to_hub=repository)
    assert not (tmp_path / "out").exists()
    assert not hub.models


def test_a_private_bundle_does_not_go_to_a_public_place(hub: Hub, bundle: Path) -> None:
    ee.push(bundle, REPOSITORY)
    commits = len(hub.models[REPOSITORY].commits)
    with pytest.raises(UsageError, match="it exists and is public, not private"):
        ee.push(bundle, REPOSITORY, private=True)
    assert len(hub.models[REPOSITORY].commits) == commits


# What goes wrong


@pytest.mark.parametrize(
    ("fault", "error", "why"),
    [
        (Fault("whoami", status=503, times=99), EnvironmentFault, "the hub answered 503"),
        (Fault("repos/create", "POST", status=403), UsageError, "may not write there"),
        (Fault("preupload", "POST", status=403, times=9), UsageError, "may not write there"),
        (Fault("commit", "POST", status=409), EnvironmentFault, "somebody else pushed at the same time"),
        (Fault("commit", "POST", status=404), UsageError, "no such place"),
        (Fault("objects/batch", "POST", status=413), EnvironmentFault, "the hub answered 413"),
        (Fault("^/[0-9a-f]{64}", "PUT", status=403), UsageError, "may not write there"),
        (Fault("^/[0-9a-f]{64}", "PUT", status=500, times=99), EnvironmentFault, "the hub answered 500"),
    ],
)
def test_what_the_hub_says_is_explained(
    hub: Hub, bundle: Path, fault: Fault, error: type[ExaoneError], why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    hub.faults.append(fault)
    with pytest.raises(error, match=f"{REPOSITORY}: .*{why}") as caught:
        ee.push(bundle, REPOSITORY)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    shown = str(caught.value) + "".join(capfd.readouterr())
    assert "hf_writer" not in shown
    assert "http" not in shown
    assert REPOSITORY not in hub.models or MANIFEST not in pushed_files(hub)


def test_an_upload_that_breaks_is_tried_again(hub: Hub, bundle: Path) -> None:
    hub.faults.append(Fault("^/[0-9a-f]{64}", "PUT", status=503))
    hub.faults.append(Fault("preupload", "POST", status=BROKEN_OFF))
    ee.push(bundle, REPOSITORY)
    assert pushed_files(hub)[MANIFEST] == (bundle / MANIFEST).read_bytes()


def test_without_a_network(hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match="HF_HUB_OFFLINE is set"):
        ee.push(bundle, REPOSITORY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="cannot be reached|failed"):
        ee.push(bundle, REPOSITORY)


@pytest.mark.parametrize("name", ["decoder.onnx.data", "config.json", MANIFEST])
def test_a_damaged_bundle_is_not_pushed(hub: Hub, bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[0 if name == MANIFEST else len(content) // 2] ^= 1  # nothing vouches for the manifest's text
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError):
        ee.push(bundle, REPOSITORY)
    assert REPOSITORY not in hub.models


def test_a_file_that_changes_while_it_is_uploaded(hub: Hub, bundle: Path) -> None:
    def spoil() -> None:
        with (bundle / "decoder.onnx.data").open("r+b") as stream:
            stream.write(b"other")

    hub.faults.append(Fault("repos/create", "POST", before=spoil))
    with pytest.raises(BundleError, match="decoder.onnx.data: the file changed while it was uploaded"):
        ee.push(bundle, REPOSITORY)
    assert MANIFEST not in pushed_files(hub)
