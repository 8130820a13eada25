"""Lines of a file of requests: what they may say, and what is said of those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exaone_export.batching.lines import LONGEST, ask_of, id_of, lines, merged, parse, survey
from model.errors import UsageError

HERE = Path("/data")


def ask(usual: str | None = None, /, **raw: Any) -> Any:
    return ask_of(parse(json.dumps(raw).encode(), 3), 3, HERE, usual)


def test_a_prompt_with_images_and_options() -> None:
    found = ask(prompt="Read.", images=["a.png", "/b.png"], videos=["c"], max_new_tokens=3, seed=None, preset="text")
    assert found.images == ["/data/a.png", "/b.png"]
    assert found.videos == ["/data/c"]
    kinds = [part["type"] for part in found.messages[0]["content"]]
    assert kinds == ["image", "image", "video", "text"]
    assert (found.options, found.preset, found.tools) == ({"max_new_tokens": 3}, "text", None)


def test_a_conversation_names_its_images_itself() -> None:
    parts = [{"type": "image", "image": "a.png"}, {"type": "image"}, {"type": "text", "text": "?"}]
    found = ask(messages=[{"role": "user", "content": parts}], images=["b.png"])
    assert found.images == ["/data/a.png", "/data/b.png"]
    assert found.messages[0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]


def test_the_system_text_of_a_line_goes_before_the_commands() -> None:
    assert ask("short", prompt="x").messages[0] == {"role": "system", "content": "short"}
    assert ask("short", prompt="x", system="long").messages[0] == {"role": "system", "content": "long"}
    assert ask("short", messages=[{"role": "user", "content": "x"}]).messages[0]["content"] == "short"


def test_lines_of_openais_batch_files() -> None:
    body = {
        "model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "temperature": 0.5,
        "stop": ["a"], "logprobs": True, "top_logprobs": 2, "n": 1, "stream": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    }  # fmt: skip
    raw = {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert id_of(raw, 3) == "r-1"
    assert ask(**raw).options == {
        "max_new_tokens": 5, "temperature": 0.5, "stop": ["a"], "logprobs": 2, "json_schema": {"type": "object"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({}, "either a prompt or messages"),
        ({"prompt": "x", "messages": []}, "either a prompt or messages"),
        ({"prompt": " "}, "empty"),
        ({"prompt": 3}, "not text"),
        ({"prompt": "x", "promt": 1}, "'promt' is unknown"),
        ({"prompt": "x", "images": "a.png"}, "not a list"),
        ({"messages": "x"}, "not a list"),
        ({"messages": ["x"]}, "not an object"),
        ({"messages": []}, "no user turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "http://x"}]}]}, "address"),
        ({"body": []}, "body is no object"),
        ({"body": {"messages": [], "n": 2}}, "n cannot be 2"),
        ({"body": {"messages": [], "stream": True}}, "stream cannot be True"),
        ({"body": {"messages": [], "best_of": 2}}, "'best_of' of body is unknown"),
        ({"body": {"messages": [], "response_format": 1}}, "response_format"),
        ({"body": {"messages": []}, "id": 1}, "'id' is unknown"),
    ],
)
def test_what_cannot_be_asked(raw: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        ask(**raw)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b"hello", "not JSON"),
        (b"[1]", "object is needed"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
        (b'{"prompt": "x", "prompt": "y"}', "twice"),
        (b"[" * 100_000, "deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (None, "longer than"),
    ],
)
def test_what_is_no_request(line: bytes | None, word: str) -> None:
    with pytest.raises(UsageError, match=word) as raised:
        parse(line, 7)
    assert raised.value.where == "line 7"


@pytest.mark.parametrize("own", [True, 1.5, [], {}, "x" * 600])
def test_ids_of_other_kinds(own: Any) -> None:
    with pytest.raises(UsageError, match="its id is"):
        id_of({"id": own}, 4)


def test_ids() -> None:
    assert [id_of(raw, 4) for raw in ({}, {"id": None}, {"id": "a"}, {"id": 0})] == [4, 4, "a", 0]


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n' + b"x" * (LONGEST + 5) + b"\nlast")
    assert list(lines(path)) == [(1, b'{"a": 1}\r\n'), (4, None), (5, b"last")]
    assert survey(path).requests == 3
    with pytest.raises(UsageError, match="No such file"):
        survey(tmp_path / "missing")
    with pytest.raises(UsageError, match="ordinary"):
        survey(tmp_path)


def test_a_lines_options_go_before_the_commands() -> None:
    flags = {"do_sample": False, "regex": "a", "max_new_tokens": 4}
    assert merged(flags, {"json_schema": {}}) == {"do_sample": False, "max_new_tokens": 4, "json_schema": {}}
    assert merged(flags, {"temperature": 0.5, "max_new_tokens": 9}) == {
        "regex": "a", "temperature": 0.5, "max_new_tokens": 9,
    }  # fmt: skip
