from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.detokenize import Detokenizer, StopStrings
from runtime.tokenizer import Tokenizer
from tests.unit.tiny_tokenizer import write_tokenizer

TEXTS = ["대단한지 설명해 봐", "👨‍👩‍👧‍👦 가족 👩🏽‍🚀!", "é e\u0301 \u202eRTL\u202c \ufeff\0", "plain", ""]


@cache
def tokenizer() -> Tokenizer:
    with TemporaryDirectory() as folder:
        return Tokenizer.load(write_tokenizer(Path(folder)))


def stream(ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer(), skip_special_tokens)
    return [*map(detokenizer.feed, ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_split_over_tokens_never_show_as_replacements(text: str) -> None:
    pieces = stream(tokenizer().encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


def test_text_comes_as_soon_as_it_is_complete() -> None:
    ids = tokenizer().encode("👩")
    assert len(ids) > 1
    assert stream(ids) == [""] * (len(ids) - 1) + ["👩", ""]


@given(st.text())
@settings(deadline=None)
def test_streaming_any_text(text: str) -> None:
    assert "".join(stream(tokenizer().encode_plain(text))) == text


@given(st.lists(st.integers(0, tokenizer().vocab_size + 5), max_size=60), st.booleans())
@settings(deadline=None)
def test_streaming_any_ids_equals_decoding_the_whole(ids: list[int], skip: bool) -> None:
    assert "".join(stream(ids, skip)) == tokenizer().decode(ids, skip)


def test_invalid_bytes_are_replaced_only_when_certain() -> None:
    first, *_ = tokenizer().encode("👩")
    detokenizer = Detokenizer(tokenizer())
    assert detokenizer.feed(first) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_special_tokens_are_skipped_but_tags_are_not() -> None:
    ids = tokenizer().encode("<|user|><think>a</think>b<|endofturn|>")
    assert "".join(stream(ids)) == "<think>a</think>b"
    assert "".join(stream(ids, skip_special_tokens=False)) == "<|user|><think>a</think>b<|endofturn|>"


def run_stops(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    text = "".join([*map(matcher.feed, pieces), matcher.finish()])
    return text, matcher.stopped


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["END"], ["text E", "N", "D more"], ("text ", True)),
        (["END"], ["text E", "N", "d"], ("text ENd", False)),
        (["END"], ["text EN"], ("text EN", False)),
        (["aab"], ["aaa", "ab"], ("aa", True)),
        (["abc", "b"], ["a", "b", "c"], ("a", True)),
        (["c", "abc"], ["xab", "c"], ("x", True)),
        (["뜻"], ["무슨 ", "뜻", "?"], ("무슨 ", True)),
        ([], ["any", "thing"], ("anything", False)),
    ],
)
def test_stop_strings(stops: list[str], pieces: list[str], expected: tuple[str, bool]) -> None:
    assert run_stops(stops, pieces) == expected


def test_nothing_follows_a_stop() -> None:
    matcher = StopStrings(["."])
    assert (matcher.feed("a.b"), matcher.feed("c"), matcher.finish()) == ("a", "", "")


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopStrings(["<|end|>"])
    assert [matcher.feed(piece) for piece in ("ab<", "|e", "x", "y")] == ["ab", "", "<|ex", "y"]


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.text("abc", max_size=30), st.integers(1, 5))
@settings(deadline=None)
def test_stops_do_not_depend_on_the_pieces(stops: list[str], text: str, size: int) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    assert run_stops(stops, pieces) == expected
