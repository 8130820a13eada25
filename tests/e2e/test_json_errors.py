"""With --json, whatever goes wrong: one JSON object on stdout, the same line on stderr and the same exit code."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exaone_export import api, cli
from tests.e2e.conftest import Bundles

FULL = Path("/dev/full")
full = pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
PARTS = {"what", "where", "why", "remedy", "kind", "exit_code"}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """What a failing command prints for programs, held against what it prints without --json."""
    code = cli.main([*argv, "--json"])
    printed = capsys.readouterr()
    assert cli.main(argv) == code
    plain = capsys.readouterr()
    assert plain.err == printed.err
    assert printed.out.count("\n") == 1
    found: dict[str, Any] = json.loads(printed.out)
    assert found["ok"] is False
    assert set(found["error"]) == PARTS
    assert found["error"]["exit_code"] == code != 0
    assert printed.err.startswith(f"error: {found['error']['what']}: ")
    return found


@pytest.mark.parametrize(
    ("argv", "code", "kind"),
    [
        (["export", "nowhere", "OUT"], 2, "UsageError"),
        (["export", "EMPTY", "OUT"], 3, "CheckpointError"),
        (["export", "nowhere", "OUT", "--quantize", "int3"], 2, "UsageError"),
        (["quantize", "nowhere", "OUT"], 4, "BundleError"),
        (["verify", "nowhere"], 4, "BundleError"),
        (["inspect", "nowhere"], 2, "UsageError"),
        (["generate", "nowhere", "hi"], 4, "BundleError"),
        (["generate", "nowhere", "hi", "--messages", "none.json"], 2, "UsageError"),
        (["batch", "nowhere", "none.jsonl", "OUT"], 2, "UsageError"),
        (["bench", "nowhere"], 4, "BundleError"),
        (["push", "nowhere", "owner/EXAONE-x"], 4, "BundleError"),
        (["demo", "--out", "FILE"], 2, "UsageError"),
        (["bench", "nowhere", "--batch", "0"], 2, "UsageError"),  # argparse's own refusals
        (["verify"], 2, "UsageError"),
        (["doctor", "--nonsense"], 2, "UsageError"),
        (["dance"], 2, "UsageError"),
    ],
)
def test_every_command_answers_programs(
    argv: list[str], code: int, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x").touch()
    names = {"OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty"), "FILE": str(tmp_path / "empty" / "x")}
    found = refused(capsys, *(names.get(word, word) for word in argv))
    assert (found["error"]["exit_code"], found["error"]["kind"]) == (code, kind)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 99}', '{"files": {"../x": {}}}', None])
@pytest.mark.parametrize("command", ["verify", "inspect", "generate"])
def test_a_manifest_that_cannot_be_read(
    command: str, content: str | None, bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundles.bundle("dense"), copy)
    manifest = copy / "exaone_export.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    found = refused(capsys, command, str(copy), *(["hi"] if command == "generate" else []))
    if command == "verify":  # has the keys of its other answers
        assert found["files"] == {}
        assert len(found["problems"]) == 1
        assert found["parity"] is found["quality"] is None


def test_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("surprise")

    monkeypatch.setattr(api, "verify", fail)
    assert refused(capsys, "verify", "x")["error"]["exit_code"] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "inspect", lambda *_, **__: signal.raise_signal(number))
    found = refused(capsys, "inspect", "x")
    assert (found["error"]["exit_code"], found["error"]["where"]) == (code, number.name)


def test_a_prompt_of_that_name_asks_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "nowhere", "--", "--json"]) != 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("how", ["2>&-", pytest.param("2>/dev/full", marks=full)])
def test_where_stderr_takes_nothing_stdout_and_the_code_stay(how: str) -> None:
    program = f"{shlex.quote(sys.executable)} -m exaone_export inspect nowhere --json {how}"
    done = subprocess.run(["sh", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    assert json.loads(done.stdout)["error"]["exit_code"] == 2
    assert done.stdout.count("\n") == 1


@full
def test_where_stdout_takes_nothing_the_code_stays() -> None:
    command = [sys.executable, "-m", "exaone_export", "inspect", "nowhere", "--json"]
    with FULL.open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
