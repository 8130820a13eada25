"""Conversations in files: they go on as if nothing had been, and whatever else a file is, it is refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import exaone_export as ee
from model.errors import ResourceError
from runtime import saved_session
from runtime.conversation import Session
from runtime.engine import Engine
from runtime.options import GenerationOptions
from runtime.saved_session import MAGIC
from tests.e2e.conftest import Bundles

GREEDY = GenerationOptions(do_sample=False, max_new_tokens=12)
LONG = " ".join(f"word {i}" for i in range(30))


@pytest.fixture(scope="module")
def engines(bundles: Bundles) -> dict[str, Engine]:
    return {kind: Engine.load(bundles.bundle(kind)) for kind in ("hybrid", "dense", "vlm")}


SEEN: dict[str, Any] = {
    "images": [Image.new("RGB", (84, 56), "red")],
    "videos": [np.random.default_rng(0).integers(0, 255, (3, 56, 56, 3), np.uint8)],
}


@pytest.fixture(scope="module")
def sessions(engines: dict[str, Engine]) -> dict[str, Session]:
    """A conversation of two turns with each model."""
    found = {kind: engine.session(tools=[{"name": "clock"}]) for kind, engine in engines.items()}
    for kind, session in found.items():
        session.send(LONG, options=GREEDY)
        session.send("둘", options=GREEDY, **(SEEN if kind == "vlm" else {}))
    return found


@pytest.fixture(scope="module")
def files(sessions: dict[str, Session], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sessions")
    for kind, session in sessions.items():
        session.save(folder / kind)
    return {kind: folder / kind for kind in sessions}


@pytest.mark.parametrize("kind", ["hybrid", "dense", "vlm"])
def test_a_loaded_conversation_goes_on(
    engines: dict[str, Engine], sessions: dict[str, Session], files: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    engine, session = engines[kind], engines[kind].session()
    session.send("something else", options=GREEDY)
    session.load(files[kind])
    assert session.messages == sessions[kind].messages
    session.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == files[kind].read_bytes()
    asked = [*session.messages, {"role": "user", "content": "셋"}]
    results = [one.send("셋", options=GREEDY).token_ids for one in (session, sessions[kind])]
    seen = SEEN if kind == "vlm" else {}
    wanted = engine.generate(asked, tools=[{"name": "clock"}], options=GREEDY, **seen)
    assert results == [wanted.token_ids] * 2
    # No more is read than where nothing was saved.
    assert session.usage == sessions[kind].usage


def test_the_file_is_the_users_own(files: dict[str, Path]) -> None:
    for path in files.values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(path.name for path in files["vlm"].parent.iterdir()) == sorted(files)


def test_saving_replaces_a_file_only_when_all_is_written(
    engines: dict[str, Engine], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk"
    path.write_bytes(b"older")
    session = engines["dense"].session()
    session.load(files["dense"])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ee.ResourceError, match="No space"):
            session.save(path)
    assert path.read_bytes() == b"older"
    assert [found.name for found in tmp_path.iterdir()] == ["talk"]
    session.save(path)
    assert path.read_bytes() == files["dense"].read_bytes()


def test_what_is_no_file_is_not_replaced(engines: dict[str, Engine], tmp_path: Path) -> None:
    session = engines["dense"].session()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("", "pipe", "link", "no\0name", "none/talk"):
        with pytest.raises(ee.UsageError, match="cannot save session"):
            session.save(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]
    with pytest.raises(ee.UsageError, match="not a usable file name"):
        session.load("no\0name")


def refuses(
    session: Session, path: Path, error: type[ee.ExaoneError] = ee.BundleError, match: str | None = None
) -> None:
    """The file is refused, and the conversation is as it was."""
    before = list(session.messages), session.tokens
    with pytest.raises(error, match=match):
        session.load(path)
    assert (session.messages, session.tokens) == before


@pytest.fixture
def session(engines: dict[str, Engine]) -> Session:
    return engines["vlm"].session()


def test_a_file_that_ends_early_is_refused(session: Session, files: dict[str, Path], tmp_path: Path) -> None:
    whole, path = files["vlm"].read_bytes(), tmp_path / "cut"
    draw = random.Random(0)
    for length in [0, 1, len(MAGIC), len(MAGIC) + 8, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:length])
        refuses(session, path)
    path.write_bytes(whole + b"\0")
    refuses(session, path)


def test_a_changed_bit_is_refused(session: Session, files: dict[str, Path], tmp_path: Path) -> None:
    whole, path = files["vlm"].read_bytes(), tmp_path / "changed"
    draw = random.Random(1)
    header = len(MAGIC) + 8 + int.from_bytes(whole[len(MAGIC) : len(MAGIC) + 8], "little")
    for place in [*range(len(MAGIC) + 8), *(draw.randrange(header) for _ in range(80)), header, len(whole) - 1,
                  *(draw.randrange(len(whole)) for _ in range(60))]:  # fmt: skip
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        refuses(session, path, ee.ExaoneError)


def forged(whole: bytes, change: Callable[[dict[str, Any]], object], tail: Callable[[bytes], bytes] = bytes) -> bytes:
    """A file with another header or tensors, and a sha256 that fits."""
    start = len(MAGIC) + 8
    length = int.from_bytes(whole[start - 8 : start], "little")
    header = json.loads(whole[start : start + length])
    change(header)
    text = json.dumps(header).encode()
    data = MAGIC + len(text).to_bytes(8, "little") + text + tail(whole[start + length : -32])
    return data + hashlib.sha256(data).digest()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "nobody", "content": "x"}]),
        ("messages", "x"),
        ("messages", [{"role": "user", "content": "no image"}]),
        ("tools", 7),
        ("media", None),
        ("media", [[56, 84]]),
        ("media", [[1 << 23, 1 << 23], [3, 56, 56]]),
        ("media", [[1 << 40, 56], [3, 56, 56]]),
        ("media", [[-56, -84], [3, 56, 56]]),
        ("media", [[57, 84], [3, 56, 56]]),
        ("media", [[True, 84], [3, 56, 56]]),
        ("media", [[0, 84], [3, 56, 56]]),
        ("keys", []),
        ("keys", [1.5]),
        ("keys", [10**9]),
        ("keys", [-1]),
        ("keys", [[0, 10**12]]),
        ("keys", [[9, 1]]),
        ("keys", [[0, 0]]),
        ("keys", [100] * 5000),
        ("keys", {"a": 1}),
        ("keys", None),
        ("copies", [1]),
        ("copies", [10**15]),
        ("copies", "x"),
    ],
)
def test_a_forged_header_is_refused(
    session: Session, files: dict[str, Path], tmp_path: Path, name: str, value: Any
) -> None:
    path = tmp_path / "forged"
    path.write_bytes(forged(files["vlm"].read_bytes(), lambda header: header.update({name: value})))
    refuses(session, path)


def test_forged_copies_of_windows_are_refused(
    engines: dict[str, Engine], files: dict[str, Path], tmp_path: Path
) -> None:
    whole, path = files["hybrid"].read_bytes(), tmp_path / "forged"
    path.write_bytes(forged(whole, lambda header: header))
    engines["hybrid"].session().load(path)
    for lengths in ([], [0], [5, 5], [9, 5], [10**9], [-3], [True]):
        path.write_bytes(forged(whole, lambda header, lengths=lengths: header.update(copies=lengths)))  # type: ignore[misc]
        refuses(engines["hybrid"].session(), path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_cache_that_is_not_finite_is_refused(
    session: Session, files: dict[str, Path], tmp_path: Path, value: float
) -> None:
    path = tmp_path / "nan"
    path.write_bytes(
        forged(files["vlm"].read_bytes(), lambda header: header, lambda tail: tail[:-4] + np.float32(value).tobytes())
    )
    refuses(session, path, match="NaN or Inf")


def test_other_bundles_files_and_no_files_are_refused(
    engines: dict[str, Engine], session: Session, files: dict[str, Path], tmp_path: Path
) -> None:
    refuses(session, files["dense"], ee.UsageError, "another bundle")
    refuses(session, tmp_path / "none", ee.UsageError, "No such file")
    refuses(session, tmp_path, ee.UsageError)
    os.mkfifo(tmp_path / "pipe")
    refuses(session, tmp_path / "pipe", ee.UsageError, "ordinary")
    refuses(session, Path("/dev/zero"), ee.UsageError, "ordinary")
    (tmp_path / "deep").write_bytes(forged(files["vlm"].read_bytes(), lambda header: header))
    deep = b"[" * 100_000
    (tmp_path / "deep").write_bytes(MAGIC + len(deep).to_bytes(8, "little") + deep + bytes(32))
    refuses(session, tmp_path / "deep")
    (tmp_path / "huge").write_bytes(MAGIC + (1 << 62).to_bytes(8, "little") + bytes(64))
    refuses(session, tmp_path / "huge", match="header")


def test_a_cache_that_does_not_fit_is_refused(
    engines: dict[str, Engine], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.memory.available_bytes", lambda: 1000)
    refuses(engines["dense"].session(), files["dense"], ResourceError, "tokens fit")


def test_what_was_edited_away_is_saved_without_a_cache(
    engines: dict[str, Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds an image that no turn has; the conversation is read anew after loading."""
    session = engines["vlm"].session()
    session.send("보세요", [Image.new("RGB", (84, 56), "red")], options=GREEDY)
    session.reset()
    session.save(tmp_path / "empty")
    loaded = engines["vlm"].session()
    loaded.load(tmp_path / "empty")
    assert (loaded.messages, loaded.tokens) == ([], 0)
    assert loaded.send("가", options=GREEDY).token_ids == engines["vlm"].generate("가", options=GREEDY).token_ids
    assert saved_session.MAGIC in (tmp_path / "empty").read_bytes()
