from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.reasoning import ReasoningSplitter, opens_think, split_reasoning

CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


def test_whether_the_prompt_opens_a_think_block() -> None:
    assert opens_think("<|assistant|>\n<think>\n")
    assert not opens_think("<|assistant|>\n<think>\n\n</think>\n\n")
    assert not opens_think("<|assistant|>\n")


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("hm\n</think>\n\nyes", True, ("hm", "yes")),
        ("<think>\nhm\n</think>\n\nyes", False, ("hm", "yes")),
        ("<think>hm</think>yes", True, ("hm", "yes")),
        ("hm, still", True, ("hm, still", "")),
        ("plain\n", False, ("", "plain\n")),
        ("<think>cut", False, ("cut", "")),
        (f"hm\n{CALL}", True, ("hm", CALL)),
        (f"call {CALL}?</think>no", True, (f"call {CALL}?", "no")),
        (f"text {CALL}", False, ("", f"text {CALL}")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("", True, ("", "")),
        ("\n\n</think>\n\nyes", True, ("", "yes")),
    ],
)
def test_split(text: str, thinking: bool, expected: tuple[str, str]) -> None:
    assert split_reasoning(text, thinking) == expected
    for size in (1, 2, 7, 1000):
        assert stream(text, thinking, size) == expected


def stream(text: str, thinking: bool, size: int) -> tuple[str, str]:
    splitter = ReasoningSplitter(thinking)
    pieces = [piece for i in range(0, len(text), size) for piece in splitter.feed(text[i : i + size])]
    pieces += splitter.finish()
    assert all(text for _, text in pieces)
    kinds = [kind for kind, _ in pieces]
    assert kinds == sorted(kinds, reverse=True)  # content never comes before reasoning
    return tuple("".join(t for k, t in pieces if k == kind) for kind in ("reasoning", "content"))  # type: ignore[return-value]


PARTS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "think>", "\n", " ", "a", "</", "봐"]


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.booleans(), st.integers(1, 9))
@settings(deadline=None, max_examples=500)
def test_streaming_equals_splitting_the_whole(text: str, thinking: bool, size: int) -> None:
    if thinking or text.lstrip().startswith("<think>") or "</think>" not in text:
        assert stream(text, thinking, size) == split_reasoning(text, thinking)
    else:
        assert stream(text, thinking, size) == ("", text)


def test_reasoning_is_streamed_as_it_comes() -> None:
    splitter = ReasoningSplitter(thinking=True)
    assert splitter.feed("\nfirst ") == [("reasoning", "first ")]
    assert splitter.feed("second</thi") == [("reasoning", "second")]
    assert splitter.feed("nk>\n") == []
    assert splitter.feed("\nanswer") == [("content", "answer")]
