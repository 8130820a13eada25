"""M01 to M06, M18 and M20: a bundle's files, what its manifest says of them, and what may happen to a whole bundle.

Numbers are those of the table of faults that the toolkit is tried against.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from exaone_export import integrity
from model.bundle import CARD, MANIFEST, file_sha256
from tests.faults.harness import check_refusal, run_here
from tests.faults.hostile import (
    DATA,
    DECODER,
    Bad,
    answer,
    asks,
    check_verify,
    instead,
    made,
    manifest,
    moved_out,
    refused,
    sound_bundle,
    verifies,
    written,
)
from tests.tiny import make_checkpoint

GOOD = "0" * 64


def flipped(content: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_m01_one_flipped_bit_in_a_file_of_each_kind(tmp_path: Path) -> None:
    folder = made(tmp_path)
    for name in sorted(json.loads((folder / MANIFEST).read_text())["files"]):
        sound = (folder / name).read_bytes()
        written(name, flipped)(folder)
        words = (name, "sha256")
        check_verify(run_here(verifies(folder)), 4, *words)
        if name != CARD:  # which nothing that runs reads
            check_refusal(run_here(asks(folder)), 4, words, tmp_path / "nowhere")
        (folder / name).write_bytes(sound)
    assert run_here(verifies(folder)).code == 0


test_m02_data_of_another_length = refused(
    Bad("m02 one byte less", written(DATA, lambda old: old[:-1]), (DATA, "expected"), signed=False),
    Bad("m02 one byte more", written(DATA, lambda old: old + b"x"), (DATA, "expected"), signed=False),
    Bad("m02 nothing", written(DATA, lambda old: b""), (DATA, "0 bytes"), signed=False),
    Bad("m02 a page less, and signed", written(DATA, lambda old: old[:-4096]), ("beyond the end",)),
    Bad("m02 nothing, and signed", written(DATA, lambda old: b""), ("beyond the end",)),
)


@pytest.mark.parametrize(("name", "why"), [(DATA, "behind its last weight"), ("tokenizer.json", "without weights"),
                                           (DECODER, "without weights")])  # fmt: skip
def test_m02_a_file_of_holes_is_not_hashed(
    tmp_path: Path, name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs nothing to send, and hashing what it claims to hold would take an hour."""
    folder, size = made(tmp_path), 1 << 41
    try:
        os.truncate(folder / name, size)
    except OSError:
        pytest.skip("files of this system cannot be as large")
    manifest(lambda raw: raw["files"].update({name: {"size": size, "sha256": GOOD}}))(folder)
    hashed_here: list[str] = []

    def digest(path: Path, *more: Any) -> str:
        hashed_here.append(path.name)
        return file_sha256(path, *more)

    monkeypatch.setattr(integrity, "file_sha256", digest)
    check_verify(run_here(verifies(folder)), 4, name, why)
    assert hashed_here
    assert name not in hashed_here
    (folder / name).unlink()  # not left to whoever copies the temporary folders


def version(value: object) -> Any:
    return manifest(lambda raw: raw.update(schema_version=value))


test_m03_no_manifest_to_speak_of = refused(
    Bad("m03 missing", lambda folder: (folder / MANIFEST).unlink(), (MANIFEST,), signed=False),
    Bad("m03 empty", written(MANIFEST, lambda old: b""), (MANIFEST, "empty"), signed=False),
    Bad("m03 not JSON", written(MANIFEST, lambda old: old[:-3]), (MANIFEST, "JSON"), signed=False),
    Bad("m03 not UTF-8", written(MANIFEST, lambda old: b"\xff\xfe" + old), (MANIFEST, "UTF-8"), signed=False),
    Bad("m03 100,000 deep", written(MANIFEST, lambda old: b"[" * 100_000), (MANIFEST,), signed=False),
    Bad("m03 version 0", version(0), (MANIFEST, "schema_version")),
    Bad("m03 version as text", version("1"), (MANIFEST, "schema_version")),
    Bad("m03 a newer version", version(99), ("made by a newer version",), code=5, verify=5),
    Bad("m03 a pipe", instead(MANIFEST, os.mkfifo), (MANIFEST,), signed=False, apart=True),
)


def listed(name: str) -> Any:
    return manifest(lambda raw: raw["files"].update({name: raw["files"]["config.json"]}))


def folder_link(folder: Path) -> None:
    """A file that lies in a folder outside, to which a link inside leads."""
    (folder / "sub").symlink_to(folder.parent)
    (folder.parent / "config.json").write_bytes((folder / "config.json").read_bytes())
    listed("sub/config.json")(folder)


OUTSIDE = {
    "above": "../config.json",
    "absolute": "/etc/passwd",
    "above after all": "a/../../b",
    "a device": "/dev/zero",
    "of Windows": "C:\\x",
    "with NUL": "a\0b",
    "nothing": "",
}
test_m04_names_that_lead_outside = refused(
    *(Bad(f"m04 {what}", listed(name), ("refusing bundle",), signed=False) for what, name in OUTSIDE.items()),
    Bad(
        "m04 a manifest that is a link out",
        moved_out(lambda out, link: link.symlink_to(out), MANIFEST),
        (MANIFEST, "not an ordinary file"),
        signed=False,
    ),
    Bad(
        "m04 a manifest that is a hard link",
        moved_out(lambda out, link: link.hardlink_to(out), MANIFEST),
        (MANIFEST, "hard link"),
        signed=False,
    ),
    Bad("m04 a link out", moved_out(lambda out, link: link.symlink_to(out), "config.json"), ("link",)),
    Bad("m04 a link in", instead("LICENSE", lambda path: path.symlink_to("config.json")), ("link",)),
    Bad(
        "m04 a folder that is a link",
        folder_link,
        ("link",),
    ),
    Bad(
        "m04 a link to a device",
        instead("tokenizer.json", lambda path: path.symlink_to("/dev/zero")),
        ("link",),
        signed=False,
        apart=True,
    ),
    Bad(
        "m04 a hard link to somebody's file",
        moved_out(lambda out, link: link.hardlink_to(out), "config.json"),
        ("config.json", "hard link"),
    ),
    Bad(
        "m04 a pipe that is not listed",
        lambda folder: (
            manifest(lambda raw: raw["files"].pop("tokenizer.json"))(folder),
            instead("tokenizer.json", os.mkfifo)(folder),
        ),
        ("tokenizer.json", "not an ordinary file"),
        apart=True,
    ),
)


def twice(content: bytes) -> bytes:
    """The first file is listed two times."""
    raw = json.loads(content)
    name, entry = next(iter(raw["files"].items()))
    more = f'"files": {{{json.dumps(name)}: {json.dumps(entry)}, '
    return json.dumps(raw).replace('"files": {', more, 1).encode()


test_m05_a_list_of_other_files = refused(
    Bad("m05 a file twice", written(MANIFEST, twice), ("appears twice",), signed=False),
    Bad("m05 a graph is not listed", manifest(lambda raw: raw["files"].pop(DECODER)), (DECODER, "not listed")),
    Bad("m05 its data is not listed", manifest(lambda raw: raw["files"].pop(DATA)), (DATA, "not listed")),
    Bad("m05 a file too many", listed("more.json"), ("more.json", "missing"), signed=False),
    Bad("m05 no graphs", manifest(lambda raw: raw.update(graphs=[])), ("'decoder'",)),
    Bad("m05 two decoders", manifest(lambda raw: raw["graphs"].append(raw["graphs"][0])), ("two graphs",)),
)


def test_m05_a_file_that_nobody_lists_is_told(tmp_path: Path) -> None:
    folder = made(tmp_path)
    wanted = answer(folder)
    (folder / "notes.txt").write_text("mine")
    assert answer(folder) == wanted
    outcome = run_here(("verify", str(folder)))
    assert outcome.code == 0
    assert "warning: notes.txt is not part of the bundle" in outcome.stderr


def hashed(**entry: object) -> Any:
    return manifest(lambda raw: raw["files"].update({DATA: entry}))


test_m06_hashes_of_another_form = refused(
    Bad("m06 too short", hashed(size=1, sha256="ab"), (MANIFEST, "sha256"), signed=False),
    Bad("m06 no hexadecimal", hashed(size=1, sha256="g" * 64), (MANIFEST, "sha256"), signed=False),
    Bad("m06 upper case", hashed(size=1, sha256="A" * 64), (MANIFEST, "sha256"), signed=False),
    Bad("m06 another algorithm", hashed(size=1, md5="a" * 32), (MANIFEST, "sha256"), signed=False),
    Bad("m06 with its algorithm", hashed(size=1, sha256=f"sha512:{GOOD}"), (MANIFEST, "sha256"), signed=False),
    Bad("m06 none", hashed(size=1), (MANIFEST, "sha256"), signed=False),
    Bad("m06 a list", hashed(size=1, sha256=[GOOD]), (MANIFEST, "sha256"), signed=False),
    Bad("m06 a size of minus one", hashed(size=-1, sha256=GOOD), (MANIFEST, "size"), signed=False),
)


def test_m18_a_bundle_that_was_moved_packed_or_locked_works(tmp_path: Path) -> None:
    folder = made(tmp_path)
    wanted = answer(folder)
    moved = folder.rename(tmp_path / "다른 이름 -x")
    assert answer(moved) == wanted
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(moved, "packed")
    with tarfile.open(tmp_path / "b.tar") as tar:
        if hasattr(tarfile, "data_filter"):  # since 3.11.4; without a word, later ones warn
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(tmp_path / "out")
    unpacked = tmp_path / "out" / "packed"
    assert answer(unpacked) == wanted
    (tmp_path / "link").symlink_to(unpacked)
    assert answer(tmp_path / "link") == wanted
    assert run_here(("verify", str(tmp_path / "link"))).code == 0
    for path in (*unpacked.iterdir(), unpacked):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert answer(unpacked) == wanted
        assert run_here(("verify", str(unpacked))).code == 0
    finally:
        unpacked.chmod(0o755)
    shutil.copytree(unpacked, tmp_path / "copied")
    assert answer(tmp_path / "copied") == wanted


@pytest.mark.parametrize("kind", ["dense", "vlm"])
def test_m18_the_name_of_its_folder_may_be_any_bytes(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path, kind)
    wanted = answer(folder)
    try:
        moved = folder.rename(tmp_path / os.fsdecode(b"not utf-8 \xff"))
    except OSError:
        pytest.skip("names are UTF-8 here")
    assert answer(moved) == wanted
    assert run_here(verifies(moved)).code == 0


@pytest.mark.parametrize("how", ["another", "one file"])
def test_m20_a_source_that_is_not_the_one_that_was_hashed(tmp_path: Path, how: str) -> None:
    folder = made(tmp_path)
    other = make_checkpoint(
        tmp_path / "other", "dense", dtype="fp32", seed=6 if how == "another" else 5,
        num_hidden_layers=1, layer_types=["full_attention"],
    )  # fmt: skip
    if how == "one file":
        written("config.json", lambda old: old + b"\n")(other)
    outcome = run_here(("verify", str(folder), "--source", str(other), "--quiet"))
    check_refusal(outcome, 4, ("cannot verify", "not the one that the bundle was made from"), tmp_path / "nowhere")
    assert "verify.json" not in {path.name for path in folder.iterdir()} - sound_bundle("dense").keys()
