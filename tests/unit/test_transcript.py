from __future__ import annotations

import json

import pytest

from runtime.tokenizer import Tokenizer
from runtime.tools import Calls
from runtime.transcript import Chunk, Event, Result, Timings, Transcript, chunks
from tests.tiny import BYTES_AT, SPECIAL, write_assets


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_assets(folder, vision=False)
    return Tokenizer.load(folder)


def ids(text: str) -> list[int]:
    return [byte + BYTES_AT for byte in text.encode()]


def test_thinking_answer_and_call(tokenizer: Tokenizer) -> None:
    call = '{"name": "f", "arguments": {"x": 1}}'
    tokens = [
        *ids("생각 중"), SPECIAL["</think>"], *ids("\n\n안녕 🙂\n"), SPECIAL["<tool_call>"], *ids(call),
        SPECIAL["</tool_call>"], SPECIAL["<|endofturn|>"],
    ]  # fmt: skip
    transcript = Transcript(tokenizer, thinking=True)
    pieces = [piece for token in tokens for piece in transcript.feed(token)] + transcript.finish()
    assert transcript.parts() == ("생각 중", Calls("안녕 🙂\n", [{"name": "f", "arguments": {"x": 1}}]))
    assert transcript.token_ids == tokens
    assert "".join(text for kind, text in pieces if kind == "reasoning") == "생각 중"
    assert "".join(text for kind, text in pieces if kind == "content") == "안녕 🙂\n"
    assert not any("\ufffd" in text for _, text in pieces)


def test_a_character_cut_off_by_the_limit_is_left_out(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer)
    for token in ids("가나🙂")[:-1]:
        transcript.feed(token)
    transcript.finish()
    assert transcript.parts()[1].text == "가나"


def test_stop_string_ends_the_text(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer, stop=["END"])
    pieces = []
    for token in ids("one EN two END three"):
        pieces += transcript.feed(token)
        if transcript.stopped:
            break
    pieces += transcript.finish()
    assert "".join(text for _, text in pieces) == transcript.parts()[1].text == "one EN two "


def test_held_answers_keep_their_tags(tokenizer: Tokenizer) -> None:
    for thinking, reasoning in ((False, ""), (True, "hm")):
        transcript = Transcript(tokenizer, thinking=thinking, answer_only=True, calls=False)
        answer = '{"a": "</think> <tool_call>{}</tool_call>"}'
        tokens = [*ids("hm"), SPECIAL["</think>"]] * thinking + ids(answer)
        pieces = [piece for token in tokens for piece in transcript.feed(token)] + transcript.finish()
        assert transcript.parts() == (reasoning, Calls(answer))
        assert "".join(text for kind, text in pieces if kind == "content") == answer


def test_without_a_tokenizer_there_is_no_text() -> None:
    transcript = Transcript(None)
    assert transcript.feed(5) == []
    assert transcript.finish() == []
    assert transcript.parts() == ("", Calls(""))
    assert transcript.token_ids == [5]


def test_events_become_chunks() -> None:
    result = Result("ab", "r", [], [1, 2, 3], 9, 0, "stop", "cpu", Timings(0, 0, 0, 0, 0))
    events = [
        Event(0, 1, [], None),
        Event(0, 2, [("reasoning", "r"), ("content", "a")], None),
        Event(0, 3, [("content", "b")], result),
    ]
    assert list(chunks(events)) == [
        Chunk("r", "reasoning", (1, 2)),
        Chunk("a", "text", ()),
        Chunk("b", "text", (3,)),
        Chunk("", "text", (), result),
    ]
    assert [chunk.finished for chunk in chunks(events)] == [False, False, False, True]
    assert json.loads(json.dumps(result.to_dict()))["timings"]["load_s"] == 0
    assert set(result.to_dict()) == {
        "text", "reasoning", "tool_calls", "token_ids", "prompt_tokens", "image_tokens", "finish_reason", "ep",
        "timings", "boxed", "logprobs", "warnings",
    }  # fmt: skip
