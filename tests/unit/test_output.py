"""What the engine makes of what a model says: calls, boxes, log-probabilities, forms, presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import UsageError
from runtime.engine import Engine
from runtime.options import PRESETS
from runtime.transcript import Chunk
from tests.tiny import SPECIAL, make_config, write_assets
from tests.unit.test_engine import engine_of, text

EOS = SPECIAL["<|endofturn|>"]
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "서울"}}</tool_call>'
WEATHER = {"name": "weather", "arguments": {"city": "서울"}}
SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "integer", "maximum": 99, "minimum": 10}},
    "required": ["total"],
    "additionalProperties": False,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(make_config("vlm", max_position_embeddings=400)))
    write_assets(tmp_path, vision=True)
    return tmp_path


def tokens(words: str) -> list[int]:
    """Token ids of a text in which tags are control tokens."""
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        words = words.replace(tag, f"\0{tag}\0")
    ids: list[int] = []
    for part in words.split("\0"):
        ids += [SPECIAL[part]] if part in SPECIAL else text(part)
    return ids


def saying(folder: Path, *answers: str) -> Engine:
    return engine_of(folder, [[*tokens(answer), EOS] for answer in answers])


def joined(chunks: list[Chunk], kind: str = "text") -> str:
    return "".join(chunk.text for chunk in chunks if chunk.kind == kind)


@pytest.mark.parametrize(
    ("says", "thinking", "answer", "reasoning", "calls"),
    [
        (f"Let me see. {CALL}\n{CALL}", False, "Let me see. ", "", [WEATHER, WEATHER]),
        (f"I should ask.\n{CALL}", True, "", "I should ask.", [WEATHER]),  # the think block was never closed
        (f"hm {CALL} no</think>\n\nIt rains.", True, "It rains.", f"hm {CALL} no", []),
        (f"hm</think>\n\n{CALL}", True, "", "hm", [WEATHER]),
    ],
)
def test_calls_in_answers(
    folder: Path, says: str, thinking: bool, answer: str, reasoning: str, calls: list[Any]
) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with saying(folder, says) as engine:
        result = engine.generate("서울 날씨?", tools=tools, enable_thinking=thinking)
        assert (result.text, result.reasoning, result.tool_calls) == (answer, reasoning, calls)
        assert result.finish_reason == ("tool_calls" if calls else "stop")
        assert result.warnings == []
        chunks = list(engine.stream("서울 날씨?", tools=tools, enable_thinking=thinking))
        assert (joined(chunks), joined(chunks, "reasoning")) == (answer, reasoning)
        assert chunks[-1].result is not None
        assert chunks[-1].result.tool_calls == calls


def test_a_faulty_call_is_text_and_told(folder: Path) -> None:
    says = 'So: <tool_call>{"name": "weather", </tool_call>'
    with saying(folder, says, CALL) as engine:
        bad, good = engine.generate(["a", "b"])
        assert (bad.text, bad.tool_calls, bad.finish_reason) == (says, [], "stop")
        assert len(bad.warnings) == 1
        assert bad.warnings[0].startswith("tool call 1 cannot be used: ")
        assert good.tool_calls == [WEATHER]
        assert joined(list(engine.stream("a"))) == says


def test_a_call_and_its_result_can_be_given_back(folder: Path) -> None:
    with saying(folder, CALL) as engine:
        result = engine.generate("서울 날씨?")
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": "서울 날씨?"},
            {"role": "assistant", "content": result.text, "tool_calls": result.tool_calls},
            {"role": "tool", "content": {"temp": 3}},
        ]
        assert '{"temp": 3}' in engine.prompt(turns).text


def test_a_call_cut_off_by_the_limit(folder: Path) -> None:
    with saying(folder, CALL) as engine:
        cut = engine.generate("hi", max_new_tokens=20)
        assert (cut.finish_reason, cut.tool_calls) == ("length", [])
        assert cut.text == "<tool_call>" + CALL.removeprefix("<tool_call>")[:19]
        assert cut.warnings


def test_the_box_is_of_the_answer_not_of_the_reasoning(folder: Path) -> None:
    with saying(folder, r"maybe \boxed{1}</think> It is \boxed{\frac{1}{2}}.", r"no box") as engine:
        first, second = engine.generate(["a", "b"], enable_thinking=True)
        assert (first.boxed, second.boxed) == (r"\frac{1}{2}", None)


def test_several_stop_strings_over_chunks(folder: Path) -> None:
    with saying(folder, "one two STOP three END four") as engine:
        result = engine.generate("hi", stop=("END", "STOP", "never"))
        assert (result.text, result.finish_reason) == ("one two ", "stop")
        assert joined(list(engine.stream("hi", stop=["END", "three"]))) == "one two STOP "


def test_log_probabilities_come_with_every_token(folder: Path) -> None:
    with saying(folder, "가나", "a longer one") as engine:
        for result in engine.generate(["a", "b"], logprobs=2, temperature=0.01, seed=1):
            assert result.logprobs is not None
            assert [item.token_id for item in result.logprobs] == result.token_ids
            assert b"".join(bytes(item.bytes) for item in result.logprobs[:-1]).decode() == result.text
            for item in result.logprobs:  # the fake's logits are 1 for what it says and 0 for the 511 others
                assert item.logprob == pytest.approx(-5.2417, abs=1e-3)
                first, second = item.top_logprobs
                assert (first.token_id, first.logprob) == (item.token_id, item.logprob)
                assert second.logprob == pytest.approx(-6.2417, abs=1e-3)
            assert json.loads(json.dumps(result.to_dict()))["logprobs"][0]["top_logprobs"][0]["token"] is not None
        chunks = list(engine.stream("a", logprobs=0))
        told = [item.token_id for chunk in chunks for item in chunk.logprobs or ()]
        assert told == [token for chunk in chunks for token in chunk.token_ids]
        assert engine.generate("a").logprobs is None
        assert all(chunk.logprobs is None for chunk in engine.stream("a"))


def test_whatever_the_model_says_the_schema_holds(folder: Path) -> None:
    with saying(folder, "I would rather talk.", '{"total": 42} and', "12") as engine:
        results = engine.generate(["a", "b", "c"], json_schema=SCHEMA)
        values = [json.loads(result.text) for result in results]
        assert all(10 <= value["total"] <= 99 for value in values)
        assert values[1] == {"total": 42}
        assert [result.finish_reason for result in results] == ["stop"] * 3
        assert all(result.token_ids[-1] == text("}")[0] for result in results)
        chunks = list(engine.stream("b", json_schema=json.dumps(SCHEMA)))
        assert json.loads(joined(chunks)) == json.loads(results[0].text)


def test_a_form_begins_behind_the_reasoning(folder: Path) -> None:
    says = 'Forty-two, {"no": 1}</think>\n\n{"total": 42}'
    with saying(folder, says) as engine:
        result = engine.generate("a", json_schema=SCHEMA, enable_thinking=True)
        assert (result.text, result.reasoning) == ('{"total": 42}', 'Forty-two, {"no": 1}')
        assert (result.finish_reason, result.warnings) == ("stop", [])
        chunks = list(engine.stream("a", json_schema=SCHEMA, enable_thinking=True))
        assert (joined(chunks), joined(chunks, "reasoning")) == (result.text, result.reasoning)


def test_what_is_cut_off_says_so(folder: Path) -> None:
    with saying(folder, '{"total": 42}') as engine:
        result = engine.generate("a", json_schema=SCHEMA, max_new_tokens=5)
        assert (result.text, result.finish_reason) == ('{"tot', "length")
        assert result.warnings == ["the answer was ended at its longest, before it was complete under its constraint"]
        stopped = engine.generate("a", json_schema=SCHEMA, stop=[":"])
        assert (stopped.text, stopped.finish_reason) == ('{"total"', "stop")
        assert "stop string" in stopped.warnings[0]
        whole = engine.generate("a", json_schema=SCHEMA, max_new_tokens=13)
        assert (whole.text, whole.finish_reason, whole.warnings) == ('{"total": 42}', "stop", [])


def test_json_with_tags_in_it_is_whole(folder: Path) -> None:
    schema = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1}
    answer = f'["</think> {WEATHER} <tool_call>{{}}"]'.replace("'", "")
    with engine_of(folder, [[*text(answer), EOS]]) as engine:
        assert engine.generate("a", json_schema=schema).text == answer
        assert joined(list(engine.stream("a", json_schema=schema))) == answer


def test_a_bad_form_is_refused_by_the_call_itself(folder: Path) -> None:
    with saying(folder, "a") as engine:
        with pytest.raises(UsageError, match="json_schema"):
            engine.stream("a", json_schema={"type": "nonsense"})
        with pytest.raises(UsageError, match="regex"):
            engine.generate_ids([1, 2], regex="(")
        assert engine.generate_ids([100, 101], regex="[0-9]{2}").text.isdecimal()
        (folder / "tokenizer.json").unlink()
    with saying(folder, "a") as engine, pytest.raises(UsageError, match=r"tokenizer\.json"):
        engine.generate_ids([1, 2], regex="a")


def test_presets_by_the_kind_of_input(folder: Path) -> None:
    with saying(folder, "a") as engine:
        assert engine.choose_options("hi") == (None, engine.defaults)  # as transformers: greedy unless told
        for prompt, images, name in (("hi", [], "text"), ("hi", ["a"], "general"), ("안녕", ["a"], "document")):
            assert engine.choose_options(prompt, images, preset="auto") == (name, PRESETS[name])
        assert engine.choose_options("hi", preset="document", top_k=3)[1].top_k == 3
        assert engine.choose_options("hi", preset="auto", do_sample=False)[0] is None
        assert engine.generate("hi", preset="document", top_k=1, presence_penalty=0.0).text == "a"
        assert list(engine.stream("hi", preset="text", top_k=1))
        with pytest.raises(UsageError, match="preset"):
            engine.generate("hi", preset="fast")
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    with saying(folder, "a") as engine:
        assert engine.choose_options("hi", preset="auto") == (None, engine.defaults)
        assert engine.choose_options("hi", preset="text") == ("text", PRESETS["text"])
