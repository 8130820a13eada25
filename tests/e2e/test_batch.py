"""`exaone-export batch`: answers in order, errors of single lines, and runs that are killed and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exaone_export import cli
from exaone_export.batching import run as running
from exaone_export.batching.journal import Journal, journal_path
from exporter import disk
from model.errors import UsageError
from runtime.engine import Engine
from runtime.options import GenerationOptions
from runtime.scheduler import Scheduler
from tests.e2e.conftest import Bundles

GREEDY = GenerationOptions(do_sample=False)
FLAGS = ("--greedy", "--max-new-tokens", "12", "--batch-size", "3")


def write(path: Path, *requests: Any) -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in requests]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = cli.main(["batch", *map(str, argv)])
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    assert len(out.err.splitlines()) <= 3
    return code, out.out, out.err


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Path:
    return bundles.bundle("hybrid")


def many(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": "word " * (1 + 7 * i % 23), "max_new_tokens": 3 + i % 9} for i in range(count)]


def test_answers_are_those_of_one_by_one_and_in_order(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = many(13)
    source, out = write(tmp_path / "in.jsonl", *requests), tmp_path / "out.jsonl"
    code, stdout, _ = run(capsys, bundle, source, out, *FLAGS, "--json")
    assert code == 0
    report = json.loads(stdout)
    assert (report["requests"], report["answered"], report["failed"], report["batch_size"]) == (13, 13, 0, 3)
    answers = read(out)
    assert [answer["id"] for answer in answers] == [request["id"] for request in requests]
    with Engine.load(bundle) as engine:
        for request, answer in zip(requests, answers, strict=True):
            alone = engine.generate(request["prompt"], options=GREEDY, max_new_tokens=request["max_new_tokens"])
            assert answer["token_ids"] == alone.token_ids
            assert (answer["text"], answer["reasoning"]) == (alone.text, alone.reasoning)
            assert (answer["finish_reason"], answer["error"]) == (alone.finish_reason, None)
            assert (answer["prompt_tokens"], answer["new_tokens"]) == (alone.prompt_tokens, len(alone.token_ids))
    assert report["new_tokens"] == sum(answer["new_tokens"] for answer in answers)
    assert not journal_path(out).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_images_are_found_beside_the_file(bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("a.png", (56, 84)), ("b.png", (140, 56))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    parts = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "Read."}]
    source = write(
        tmp_path / "in.jsonl",
        {"prompt": "Read.", "images": ["a.png"]},
        {"messages": [{"role": "user", "content": parts}]},
        {"prompt": "Read.", "images": ["missing.png"]},
        {"prompt": "Read."},
    )
    code, _, err = run(capsys, bundles.bundle("vlm"), source, tmp_path / "out.jsonl", *FLAGS)
    assert code == 2
    assert "1 of 4" in err
    answers = read(tmp_path / "out.jsonl")
    assert [answer["error"] is None for answer in answers] == [True, True, False, True]
    assert "missing.png" in answers[2]["error"]["where"]
    with Engine.load(bundles.bundle("vlm")) as engine:
        for place, name in ((0, "a.png"), (1, "b.png")):
            alone = engine.generate("Read.", [tmp_path / name], options=GREEDY, max_new_tokens=12)
            assert answers[place]["token_ids"] == alone.token_ids
            assert answers[place]["image_tokens"] == alone.image_tokens > 0


def test_hostile_lines_are_errors_of_their_own(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad: list[Any] = [
        "hello", "[]", "null", "{", '{"prompt": "x", "temperature": NaN}', '{"prompt": "x", "temperature": 1e308}',
        {"prompt": "x", "seed": 2**64}, {"prompt": "x", "max_new_tokens": "7"},
        {"prompt": "x", "max_new_tokens": 99999}, {"prompt": ""}, {"prompt": "a" * 5000}, {"prompt": "\ud800"},
        {"prompt": "x", "images": ["a.png"]},
        {"messages": [{"role": "king", "content": "x"}]}, {"prompt": "x", "preset": "wild"}, {"prompt": "x", "foo": 1},
        {"prompt": "x", "stop": 5}, {"prompt": "x", "regex": "("}, {"prompt": "x", "id": {}}, "[" * 30_000,
        {"id": "\udc00", "prompt": ""}, {"prompt": "x", "tools": [1]},
    ]  # fmt: skip
    good = [{"id": "good", "prompt": "x"}, {"id": "good", "prompt": "y"}, {"prompt": "<|endofturn|><think>"}]
    source, out = write(tmp_path / "in.jsonl", *bad, *good), tmp_path / "out.jsonl"
    code, stdout, err = run(capsys, bundle, source, out, *FLAGS, "--json")
    assert code == 2
    assert err.startswith(
        "error: some requests have no answer: out.jsonl: 23 of 25, the first: cannot use line: line 1:"
    )
    assert json.loads(stdout)["failed"] == len(bad) + 1
    answers = read(out)
    assert [answer["line"] for answer in answers] == list(range(1, len(bad) + len(good) + 1))
    for answer in answers[: len(bad)]:
        assert set(answer["error"]) == {"what", "where", "why", "remedy", "kind"}
        assert answer["error"]["kind"] == "UsageError"
    assert answers[-3]["error"] is None
    assert "its id is that of line 23" in answers[-2]["error"]["why"]
    assert answers[-1]["error"] is None


def test_files_that_cannot_be_used(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", *many(2)), tmp_path / "out.jsonl"
    empty = write(tmp_path / "empty.jsonl")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for given, made, word in (
        (tmp_path / "none", out, "No such file"),
        (fifo, out, "ordinary"),
        (source, source, "it is the input"),
        (source, tmp_path, "it is a folder"),
        (source, tmp_path / "no" / "out", "does not exist"),
    ):
        code, _, err = run(capsys, bundle, given, made, *FLAGS)
        assert (code, word in err) == (2, True), err
    journal_path(out).symlink_to(source)
    assert "ordinary" in run(capsys, bundle, source, out, *FLAGS)[2]
    journal_path(out).unlink()
    assert run(capsys, bundle, empty, out, *FLAGS)[0] == 0
    assert out.read_bytes() == b""
    assert "it exists" in run(capsys, bundle, source, out, *FLAGS)[2]
    assert run(capsys, bundle, source, out, *FLAGS, "--force")[0] == 0
    assert len(read(out)) == 2
    assert run(capsys, tmp_path, source, tmp_path / "other", *FLAGS)[0] == 4
    assert run(capsys, bundle, source, tmp_path / "other", "--batch-size", "0")[0] == 2
    assert run(capsys, bundle, source, tmp_path / "other", "--temperature", "nan")[0] == 2


CHILD = """
import os, signal, sys
from exaone_export import cli
from exporter import disk
left = int(sys.argv[1])
def about_to(operation, path):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
disk.about_to = about_to
sys.exit(cli.main(sys.argv[2:]))
"""


def test_killed_at_every_change_on_the_disk_and_gone_on_with(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [*many(6), {"prompt": ""}, *many(9)[6:]]
    source = write(tmp_path / "in.jsonl", *requests)
    calm, out = tmp_path / "calm.jsonl", tmp_path / "out.jsonl"
    argv = [*FLAGS, "--max-new-tokens", "4"]
    changes = []
    monkeypatch.setattr(disk, "about_to", lambda operation, path: changes.append(operation))
    assert run(capsys, bundle, source, calm, *argv)[0] == 2
    monkeypatch.undo()
    # A few early, a few while answers come in, and all of the last ones, where the output takes its place.
    for kill in [1, 3, 5, *range(8, len(changes) - 14, 9), *range(len(changes) - 14, len(changes) + 1, 2)]:
        out.unlink(missing_ok=True)
        command = [sys.executable, "-c", CHILD, str(kill), "batch", str(bundle), str(source), str(out), *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 2, done.stderr  # answers came together, so there were fewer changes
            out.unlink()
            continue
        if not journal_path(out).exists() and out.exists():
            assert read(out) == read(calm)  # all was done
            continue
        kept = _complete_lines(journal_path(out))
        code, stdout, _ = run(capsys, bundle, source, out, *argv, "--json")
        assert code == 2
        assert json.loads(stdout)["resumed"] == kept
        assert read(out) == read(calm)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["calm.jsonl", "in.jsonl", "out.jsonl"]


def _complete_lines(path: Path) -> int:
    content = path.read_bytes() if path.exists() else b""
    return max(0, content.count(b"\n") - 1)


def begun(bundle: Path, source: Path, out: Path, answered: int) -> None:
    """What a run leaves behind that was killed after so many answers."""
    settings = running.Settings({"max_new_tokens": 12, "do_sample": False}, "auto", rows=3)
    count = 0
    collect = running._Run._collect

    def interrupted(self: Any) -> None:
        nonlocal count
        collect(self)
        count = len(self._journal.done)
        if count >= answered:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running._Run, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            running.run_batch(bundle, source, out, settings, running.Place())
    assert count >= answered


def test_what_the_disk_lost_is_answered_again(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", *many(7)), tmp_path / "out.jsonl"
    assert run(capsys, bundle, source, tmp_path / "calm.jsonl", *FLAGS)[0] == 0
    for spoil in (
        lambda data: data[:-7],
        lambda data: data[:-30] + b"\0" * 30,
        lambda data: data[:9],
        lambda data: b"",
    ):
        begun(bundle, source, out, 3)
        path = journal_path(out)
        path.write_bytes(spoil(path.read_bytes()))
        code, stdout, _ = run(capsys, bundle, source, out, *FLAGS, "--json")
        assert code == 0
        assert json.loads(stdout)["resumed"] < 7
        assert read(out) == read(tmp_path / "calm.jsonl")
        out.unlink()


def test_something_else_is_not_gone_on_with(
    bundle: Path, bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in.jsonl", *many(5)), tmp_path / "out.jsonl"
    begun(bundle, source, out, 2)
    other = write(tmp_path / "other.jsonl", *many(6))
    for argv, word in (
        ((bundle, other, out, *FLAGS), "another input"),
        ((bundle, source, out, *FLAGS, "--seed", "1"), "another options"),
        ((bundle, source, out, *FLAGS, "--system", "x"), "another system text"),
        ((bundles.bundle("hybrid", "int8"), source, out, *FLAGS), "another bundle"),
    ):
        code, _, err = run(capsys, *argv)
        assert (code, word in err) == (2, True), err
        assert journal_path(out).exists()
    code, stdout, _ = run(capsys, bundle, other, out, *FLAGS, "--force", "--json")
    assert (code, json.loads(stdout)["resumed"], len(read(out))) == (0, 0, 6)


def test_two_at_once(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", *many(2)), tmp_path / "out.jsonl"
    from exporter.lock import output_lock

    with output_lock(out):
        assert run(capsys, bundle, source, out, *FLAGS)[0] == 8


def test_a_fault_of_the_bundle_ends_the_run(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would befall every line; what is answered stays, and the run goes on once the fault is gone."""
    from model.errors import BundleError

    source, out = write(tmp_path / "in.jsonl", *many(9)), tmp_path / "out.jsonl"
    submit = Scheduler.submit_request
    calls = []

    def failing(self: Scheduler, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 5:
            raise BundleError("cannot run graph", "decoder.onnx", "it is gone")
        return submit(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "submit_request", failing)
        code, _, err = run(capsys, bundle, source, out, *FLAGS)
    assert code == 4
    assert "it is gone" in err
    assert run(capsys, bundle, source, out, *FLAGS)[0] == 0
    assert [answer["id"] for answer in read(out)] == [f"r{i}" for i in range(9)]


def test_an_interrupt_stops_and_keeps(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", *many(150)), tmp_path / "out.jsonl"
    program = CHILD.replace("os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGINT)")
    command = [sys.executable, "-c", program, "14", "batch", str(bundle), str(source), str(out), *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("error: interrupted")
    assert not out.exists()
    code, stdout, _ = run(capsys, bundle, source, out, *FLAGS, "--json")
    assert code == 0
    assert 0 < json.loads(stdout)["resumed"] < 150
    assert len(read(out)) == 150


def test_a_journal_of_another_version(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    Journal(out, {"input": "a"}).close()
    with pytest.raises(UsageError, match="another input"):
        Journal(out, {"input": "b"})
    again = Journal(out, {"input": "b"}, force=True)
    again.add([{"line": 4, "id": 1, "error": None}, {"line": 2, "id": "둘", "error": None}])
    again.finish()
    assert [record["id"] for record in read(out)] == ["둘", 1]
