"""V10 and V14 where there is no server: absurd numbers in options, and what errors may tell.

By the Python interface, the command line and lines of a batch file. Numbers are those of the table of faults that the
toolkit is tried against.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import exaone_export as ee
from tests.faults.harness import check_refusal, run_here
from tests.faults.hostile import asks, made

ABSURD: dict[str, tuple[dict[str, Any], str]] = {
    "10^9 new tokens": ({"max_new_tokens": 10**9}, "max_new_tokens"),
    "10^12 new tokens": ({"max_new_tokens": 10**12}, "max_new_tokens"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens"),
    "10^6 log-probabilities": ({"logprobs": 10**6}, "logprobs"),
    "10,000 stop strings": ({"stop": [f"s{i}" for i in range(10_000)]}, "stop"),
    "a stop string of a megabyte": ({"stop": ["x" * (1 << 20)]}, "stop"),
    "an empty stop string": ({"stop": [""]}, "stop"),
    "a temperature of 1e308": ({"temperature": 1e308}, "temperature"),
    "a seed of 2^64": ({"seed": 1 << 64}, "seed"),
    "10^9 drafts": ({"speculate": "lookup", "draft_tokens": 10**9}, "draft_tokens"),
    "a grammar of two megabytes": ({"regex": "a" * (2 << 20)}, "regex"),
    "100 answers": ({"n": 100}, "n"),
    "10^9 beams": ({"num_beams": 10**9}, "num_beams"),
    "an address": ({"stop": object()}, "stop"),
}
# Where a flag has the option, and takes the value as text.
FLAGS: dict[str, tuple[str, ...]] = {
    "10^9 new tokens": ("--max-new-tokens", "1000000000"),
    "10^12 new tokens": ("--max-new-tokens", "1000000000000"),
    "no new tokens": ("--max-new-tokens", "0"),
    "10^6 log-probabilities": ("--logprobs", "1000000"),
    "10,000 stop strings": tuple(part for i in range(10_000) for part in ("--stop", f"s{i}")),
    "a stop string of a megabyte": ("--stop", "x" * (1 << 16)),
    "an empty stop string": ("--stop", ""),
    "a temperature of 1e308": ("--temperature", "1e308"),
    "a seed of 2^64": ("--seed", str(1 << 64)),
    "10^9 drafts": ("--speculate", "lookup", "--draft-tokens", "1000000000"),
    "100 answers": ("--n", "100"),
}
INNER = re.compile(r"0x[0-9a-fA-F]{6,}|Traceback|object at|site-packages|File \"")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("limits"))


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[ee.Engine]:
    with ee.Engine.load(bundle, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("name", ABSURD)
def test_v10_in_python(engine: ee.Engine, name: str) -> None:
    options, word = ABSURD[name]
    for ask in (engine.generate, lambda *given, **more: list(engine.stream(*given, **more)), engine.session().send):
        with pytest.raises(ee.UsageError, match=word) as caught:
            ask("x", **options)
        assert len(str(caught.value)) < 700
        assert not INNER.search(str(caught.value))


@pytest.mark.parametrize("name", FLAGS)
def test_v10_on_the_command_line(bundle: Path, name: str) -> None:
    command = [part for part in asks(bundle) if part not in ("--max-new-tokens", "3")]
    check_refusal(run_here((*command, *FLAGS[name])), 2, (), bundle)


def test_v10_in_the_lines_of_a_batch(bundle: Path, tmp_path: Path) -> None:
    """Each is refused by itself, and the good ones between them are answered as they are alone."""
    cases = {name: case for name, case in ABSURD.items() if name != "an address"}
    good = {"prompt": "안녕", "max_new_tokens": 3, "do_sample": False}
    lines: list[dict[str, Any]] = [good]
    for options, _ in cases.values():
        lines += [{"prompt": "x", **options}, good]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    openai: list[dict[str, Any]] = [
        {"max_tokens": 10**9},
        {"n": 100},
        {"logprobs": True, "top_logprobs": 10**6},
        {"stop": ["s"] * 10_000},
    ]
    lines += [{"custom_id": f"o{i}", "body": body | more} for i, more in enumerate(openai)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run_here(("batch", str(bundle), str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--quiet"))
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(found) == len(lines)
    answers = [line for line in found if line.get("error") is None]
    assert len(answers) == len(cases) + 1
    assert len({json.dumps(line["token_ids"]) for line in answers}) == 1
    for line in found:
        if line.get("error") is not None:
            text = json.dumps(line["error"])
            assert len(text) < 900
            assert not INNER.search(text)
            assert str(tmp_path) not in text


def test_v14_errors_of_media_tell_nothing_of_the_machine(bundle: Path, tmp_path: Path) -> None:
    """Not the library's words, which have held addresses, nor folders."""
    for name, content in {"broken.png": b"\x89PNG\r\n\x1a\n" + b"x" * 50, "none.png": None, "text.png": b"x"}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        outcome = run_here((*asks(bundle), "--image", str(tmp_path / name)))
        check_refusal(outcome, 2, (), tmp_path / "deeper")
        assert not INNER.search(outcome.stderr)
