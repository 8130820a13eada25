"""The command line from checkpoint to answer, on a tiny text model, each command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exaone_export import cli
from model.errors import UsageError
from tests.tiny import make_checkpoint

TIMING_KEYS = {"load_s", "vision_s", "prefill_s", "decode_s", "decode_tokens_per_s"}
RESULT_KEYS = {
    "text", "reasoning", "tool_calls", "token_ids", "prompt_tokens", "image_tokens", "finish_reason", "ep", "timings",
    "boxed", "logprobs", "warnings",
}  # fmt: skip


def _run(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "exaone_export", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, env=environment)


def _json(*argv: str, stdin: str = "") -> dict[str, Any]:
    done = _run(*argv, "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    value: dict[str, Any] = json.loads(done.stdout)
    return value


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "tiny", "dense")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "bundle"
    report = _json("export", str(checkpoint), str(out), "--quantize", "none")
    assert report["recipe"] == "none"
    assert report["bits_per_weight"] >= 32  # a tied head is stored a second time, transposed
    return out


def test_quantize_makes_what_inspect_describes(bundle: Path) -> None:
    out = bundle.parent / "int8"
    report = _json("quantize", str(bundle), str(out), "--quantize", "int8")
    found = _json("inspect", str(out), "--context", "100")
    assert report["recipe"] == "int8"
    assert list(found["memory_bytes"]) == ["100"]
    assert found["bits_per_weight"] < 16
    assert found["model_type"] == report["model_type"]


def test_generate_prints_one_json_object(bundle: Path) -> None:
    result = _json("generate", str(bundle), "hello", "--max-new-tokens", "8", "--greedy")
    assert set(result) == RESULT_KEYS
    assert set(result["timings"]) == TIMING_KEYS
    assert len(result["token_ids"]) <= 8


def test_stdin_streaming_and_json_agree(bundle: Path) -> None:
    flags = ("--max-new-tokens", "8", "--seed", "3", "--temperature", "0.7")
    result = _json("generate", str(bundle), "-", *flags, stdin="hello")
    streamed = _run("generate", str(bundle), "hello", *flags)
    assert streamed.stdout.rstrip("\n") == result["text"].rstrip("\n")


def test_dry_run_renders_without_running(bundle: Path) -> None:
    prompt = _json("generate", str(bundle), "안녕", "--system", "be brief", "--dry-run")
    assert set(prompt) == {"prompt", "prompt_token_ids", "options"}
    assert "be brief" in prompt["prompt"]
    assert "안녕" in prompt["prompt"]


def test_a_prompt_may_stand_behind_the_flags(bundle: Path) -> None:
    wanted = cli.parse(["generate", str(bundle), "안녕", "--system", "be brief", "--dry-run"])
    for argv in (["--system", "be brief", "--dry-run", "안녕"], ["--dry-run", "안녕", "--system", "be brief"]):
        assert cli.parse(["generate", str(bundle), *argv]) == wanted
    for text in ("-", "- one\n- two", ""):
        assert cli.parse(["generate", str(bundle), "--json", text]).prompt == text
    for text in ("hi", "-x", "--json"):
        assert cli.parse(["generate", str(bundle), "--greedy", "--", text]).prompt == text
    for argv in (["--json", "a", "b"], ["a", "--json", "b"], ["--json", "--nonsense"], ["--json", "-x"],
                 ["a", "--json", "--", "b"], ["--json", "--nonsense", "--", "b"]):  # fmt: skip
        with pytest.raises(UsageError, match="unrecognized arguments: "):
            cli.parse(["generate", str(bundle), *argv])
    with pytest.raises(UsageError, match="unrecognized arguments: b"):
        cli.parse(["chat", str(bundle), "--quiet", "b"])


def test_messages_and_prompt_make_one_conversation(bundle: Path, tmp_path: Path) -> None:
    history = tmp_path / "messages.json"
    history.write_text(json.dumps([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]))
    prompt = _json("generate", str(bundle), "three", "--messages", str(history), "--dry-run")["prompt"]
    assert prompt.index("one") < prompt.index("two") < prompt.index("three")


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["generate", "BUNDLE"], 2),
        (["generate", "BUNDLE", "  "], 2),
        (["generate", "BUNDLE", "hi", "--ep", "cuda"], 5),
        (["generate", "BUNDLE", "hi", "--temperature", "nan"], 2),
        (["generate", "BUNDLE", "hi", "--max-new-tokens", "1000000"], 2),
        (["generate", "BUNDLE", "hi", "--image", "none.png"], 2),
        (["generate", "BUNDLE", "hi", "--messages", "none.json"], 2),
        (["generate", "nowhere", "hi"], 4),
        (["inspect", "nowhere"], 2),
        (["verify", "nowhere"], 4),
        (["export", "SOURCE", "BUNDLE"], 2),
        (["export", "SOURCE", "OUT", "--quantize", "int3"], 2),
        (["quantize", "BUNDLE", "OUT", "--quantize", "none"], 2),
    ],
)
def test_bad_input_is_refused(argv: list[str], code: int, checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    names = {"SOURCE": str(checkpoint), "BUNDLE": str(bundle), "OUT": str(tmp_path / "out")}
    done = _run(*(names.get(word, word) for word in argv))
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) <= 3
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_tells_a_sound_bundle_from_a_damaged_one(bundle: Path) -> None:
    assert _json("verify", str(bundle))["ok"] is True
    name = bundle / "decoder.onnx.data"
    original = name.read_bytes()
    name.write_bytes(bytes([original[0] ^ 1]) + original[1:])
    try:
        done = _run("verify", str(bundle), "--json")
    finally:
        name.write_bytes(original)
    assert done.returncode == 4
    assert json.loads(done.stdout)["files"]["decoder.onnx.data"] is False
    assert done.stderr.startswith("error: damaged bundle: ")
