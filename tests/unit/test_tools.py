from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UsageError
from runtime.messages import check_messages
from runtime.prompt import render_prompt
from runtime.template import TemplateRenderer
from runtime.tokenizer import Tokenizer
from runtime.tools import CallHolder, Calls, find_tool_calls
from tests.unit.chat_templates import STYLE_40, STYLE_45
from tests.unit.tiny_tokenizer import write_tokenizer

CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
F = {"name": "f", "arguments": {"x": 1}}
ROUND = Path(__file__).parents[1] / "data" / "tool_round.json"


@pytest.mark.parametrize(
    ("text", "before", "calls"),
    [
        ("none", "none", []),
        (CALL, "", [F]),
        (f"First.\n{CALL}\n{CALL}", "First.\n", [F, F]),
        (
            f'{CALL}\nand\n<tool_call>\n{{"name": "g", "arguments": "서울", "id": 1}}\n</tool_call> bye',
            "",
            [F, {"name": "g", "arguments": "서울"}],
        ),
        (CALL.removesuffix("</tool_call>"), "", [F]),
        (
            '<tool_call>{"name": "f", "arguments": {"x": "</tool_call> <tool_call>"}}</tool_call>' + CALL,
            "",
            [{"name": "f", "arguments": {"x": "</tool_call> <tool_call>"}}, F],
        ),
        ('<tool_call>{"arguments": null, "name": "f"}</tool_call>', "", [{"name": "f", "arguments": None}]),
    ],
)
def test_calls(text: str, before: str, calls: list[dict[str, Any]]) -> None:
    assert find_tool_calls(text) == Calls(before, calls)


@pytest.mark.parametrize(
    "bad",
    [
        "<tool_call></tool_call>",
        "<tool_call>",
        "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>["f"]</tool_call>',
        '<tool_call>{"name": "f", "arguments": NaN}</tool_call>',
        '<tool_call>{"name": "f", "arguments": 1e999}</tool_call>',
        '<tool_call>{"name": "f", "arguments": ' + "9" * 5000 + "}</tool_call>",
        '<tool_call>{"name": "f", "arguments": "\\ud800"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}} {"name": "f", "arguments": {}}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        CALL + "<tool_call>{</tool_call>",
    ],
)
def test_a_bad_call_stays_in_the_text_and_is_told(bad: str) -> None:
    found = find_tool_calls("text " + bad)
    assert (found.text, found.calls) == ("text " + bad, [])
    assert found.fault.startswith("tool call ")
    assert len(found.fault) < 260


PIECES = ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": 1}', "<", "tool_call>", "\n", "a", "<tool", "봐"]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.integers(1, 9))
@settings(deadline=None, max_examples=400)
def test_streaming_gives_the_text_and_no_more(text: str, size: int) -> None:
    holder = CallHolder()
    parts = [holder.feed(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join(parts) + holder.finish() == find_tool_calls(text).text


def test_text_before_a_call_is_not_kept_back() -> None:
    holder = CallHolder()
    assert holder.feed("Let me look. <to") == "Let me look. "
    assert holder.feed("day") == "<today"
    assert holder.feed("<tool_call>{") == ""
    assert holder.finish() == "<tool_call>{"


def test_calls_are_brought_into_the_form_that_templates_read() -> None:
    wanted = {"type": "function", "function": F}
    forms = [
        F,
        {"function": F},
        {"type": "function", "function": F | {"arguments": '{"x": 1}'}},
    ]
    for form in forms:
        turn = {"role": "assistant", "content": None, "tool_calls": [form]}
        assert check_messages([{"role": "user", "content": "u"}, turn])[1]["tool_calls"] == [wanted]
    with_id = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "a bare text"}}
    turn = {"role": "assistant", "content": "", "tool_calls": [with_id]}
    assert check_messages([{"role": "user", "content": "u"}, turn])[1]["tool_calls"] == [with_id]


@pytest.mark.parametrize("calls", ["f", [5], [{"arguments": {}}], [{"function": {"name": 5}}], {"name": "f"}])
def test_calls_that_are_none_are_refused(calls: Any) -> None:
    turn = {"role": "assistant", "content": "x", "tool_calls": calls}
    with pytest.raises(UsageError, match=r"messages\[1\]\.tool_calls"):
        check_messages([{"role": "user", "content": "u"}, turn])


def test_what_a_function_returns_may_be_any_json() -> None:
    for value, text in (({"온도": 3}, '{"온도": 3}'), (3, "3"), (True, "true"), ("3 °C", "3 °C")):
        turn = {"role": "tool", "content": value}
        assert check_messages([{"role": "user", "content": "u"}, turn])[1]["content"] == text


@pytest.mark.parametrize("model", ["4.0", "4.5"])
def test_a_round_of_calling_is_rendered_as_the_models_were_trained(model: str, tmp_path: Path) -> None:
    case = json.loads(ROUND.read_text(encoding="utf-8"))[model]
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    with TemplateRenderer(STYLE_45 if model == "4.5" else STYLE_40) as renderer:
        call = find_tool_calls('<tool_call>{"name": "get_weather", "arguments": {"city": "서울"}}</tool_call>').calls
        messages = [*case["messages"]]
        messages[1] = {"role": "assistant", "content": "", "tool_calls": call}  # as a Result has it
        prompt = render_prompt(renderer, tokenizer, messages, case["tools"])
        assert prompt.text.endswith(case["expected"])
        assert model == "4.0" or prompt.text == case["expected"]
