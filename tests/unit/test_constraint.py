"""Constraints on streams of tokens that no model stands behind: whatever is drawn, the text comes out right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.errors import EnvironmentFault, UsageError
from runtime.choosing import Chooser, make_choosers
from runtime.constraint import Constraint, Constraints, Vocabulary
from runtime.options import GenerationOptions
from runtime.tokenizer import Tokenizer
from tests.tiny import BYTES_AT, SPECIAL, VOCABULARY, write_assets
from tests.unit.tiny_tokenizer import write_tokenizer

EOS = SPECIAL["<|endofturn|>"]
RECEIPT = {
    "type": "object",
    "properties": {
        "store": {"type": "string", "maxLength": 12},
        "total": {"type": "integer", "minimum": 0, "maximum": 99999},
        "paid": {"enum": ["card", "현금"]},
        "items": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
    },
    "required": ["store", "total", "paid", "items"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_assets(folder, vision=False)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def constraints(tokenizer: Tokenizer) -> Constraints:
    return Constraints(lambda: Vocabulary(tokenizer, VOCABULARY, {EOS, 1}))


def options(**values: Any) -> GenerationOptions:
    return GenerationOptions(temperature=1.0, **values)


def ids(text: str) -> list[int]:
    return [byte + BYTES_AT for byte in text.encode()]


def write(chooser: Chooser, seed: int, limit: int = 4000, script: str = "") -> tuple[list[int], str]:
    """What a model of random logits says, and why it stops. What it is to say first is likelier than anything."""
    random = np.random.default_rng(seed)
    said: list[int] = []
    wanted = ids(script)
    while len(said) < limit:
        logits = (2 * random.standard_normal(VOCABULARY)).astype(np.float32)
        if len(said) < len(wanted):
            logits[wanted[len(said)]] = 100
        said.append(chooser(logits, [5], np.array(said, np.int64)))
        if said[-1] in (EOS, 1):
            return said, "eos"
        if chooser.complete:
            return said, "complete"
    return said, "length"


def one(constraints: Constraints, thinking: bool = False, **values: Any) -> Chooser:
    chosen = options(seed=7, **values)
    return make_choosers(chosen, constraints.rows(chosen, [thinking]), None)[0]


def held(chooser: Chooser) -> Constraint:
    assert chooser.constraint is not None
    return chooser.constraint


@pytest.mark.parametrize("seed", range(8))
def test_noise_becomes_the_json_that_was_asked_for(seed: int, constraints: Constraints, tokenizer: Tokenizer) -> None:
    chooser = one(constraints, json_schema=RECEIPT)
    said, why = write(chooser, seed)
    assert why == "complete"  # the closing brace leaves nothing to say: no end-of-turn token is waited for
    value = json.loads(tokenizer.decode(said))
    assert list(value) == list(RECEIPT["properties"])  # type: ignore[call-overload]
    assert len(value["store"]) <= 12
    assert 0 <= value["total"] <= 99999
    assert value["paid"] in ("card", "현금")
    assert len(value["items"]) <= 3
    assert held(chooser).matches


@pytest.mark.parametrize("expression", ["[a-c]{3,5}", r"(가|나다)+!", r"\d{4}-\d{2}", "", "x?"])
def test_noise_becomes_what_an_expression_matches(
    expression: str, constraints: Constraints, tokenizer: Tokenizer
) -> None:
    for seed in range(4):
        said, why = write(one(constraints, regex=expression), seed)
        text = tokenizer.decode([token for token in said if token not in (EOS, 1)])
        assert re.fullmatch(expression, text), text
        assert why in ("eos", "complete")


LARK = 'start: word ("," word)*\nword: /[a-z]{1,3}/'
GBNF = 'root ::= word ("," word)*\nword ::= [a-z] [a-z]? [a-z]?'


@pytest.mark.parametrize("grammar", [LARK, GBNF])
def test_noise_becomes_what_a_grammar_allows(grammar: str, constraints: Constraints, tokenizer: Tokenizer) -> None:
    for seed in range(4):
        said, why = write(one(constraints, grammar=grammar), seed)
        assert why == "eos"
        assert re.fullmatch(r"[a-z]{1,3}(,[a-z]{1,3})*", tokenizer.decode(said[:-1]))


def test_the_turn_ends_only_where_the_answer_matches(constraints: Constraints) -> None:
    (row,) = constraints.rows(options(regex="ab(cd)?"), [False])
    assert row is not None
    flat = np.zeros(VOCABULARY, np.float32)
    allowed = []
    for token in ids("abcd"):
        allowed.append({int(i) for i in np.flatnonzero(np.isfinite(row.restrict(flat)))})
        assert not row.complete
        row.take(token)
    a, b, c, d = ids("abcd")
    assert allowed == [{a}, {b}, {c, EOS, 1}, {d}]
    assert row.complete


def test_control_tokens_are_no_text(constraints: Constraints) -> None:
    (row,) = constraints.rows(options(regex="(?s).*"), [False])
    assert row is not None
    allowed = set(np.flatnonzero(np.isfinite(row.restrict(np.zeros(VOCABULARY, np.float32)))).tolist())
    assert allowed & set(SPECIAL.values()) == {EOS, 1}
    assert set(range(BYTES_AT, BYTES_AT + 0x80)) <= allowed  # any character of ASCII


def test_reasoning_is_free_but_does_not_end_the_turn(constraints: Constraints, tokenizer: Tokenizer) -> None:
    for seed in range(4):
        chooser = one(constraints, thinking=True, regex="[0-9]{3}")
        said, why = write(chooser, seed, script="어디 보자 {")
        assert why == "complete"
        close = said.index(SPECIAL["</think>"])
        assert close >= len(ids("어디 보자 {"))
        assert not {EOS, 1, SPECIAL["<tool_call>"]} & set(said)
        answer = tokenizer.decode(said[close + 1 :])
        assert re.fullmatch(r"\n{0,2}[0-9]{3}", answer), answer


def test_a_closing_tag_of_letters_counts_as_well(constraints: Constraints, tokenizer: Tokenizer) -> None:
    script = "hm</think>\n\n"
    said, why = write(one(constraints, thinking=True, regex="[0-9]{3}"), 3, script=script)
    assert why == "complete"
    assert re.fullmatch(r"hm</think>\n\n[0-9]{3}", tokenizer.decode(said))
    third, _ = write(one(constraints, thinking=True, regex="[0-9]{3}"), 3, script=script + "\n")
    assert re.fullmatch(r"hm</think>\n\n[0-9]{3}", tokenizer.decode(third))


def test_a_limit_cuts_and_is_told(constraints: Constraints) -> None:
    chooser = one(constraints, json_schema=RECEIPT)
    assert write(chooser, 0, limit=10)[1] == "length"
    assert not held(chooser).matches


def test_drafts_that_were_wrong_leave_no_trace(constraints: Constraints) -> None:
    for thinking, start in ((False, ""), (True, "hm</think>\n")):
        fresh, drafted = constraints.rows(options(json_schema=RECEIPT), [thinking, thinking])
        assert fresh is not None
        assert drafted is not None
        flat = np.zeros(VOCABULARY, np.float32)
        text = start + '{"store": "a", "total": 12'
        for length in range(0, len(ids(text)), 3):
            fresh.follow(ids(text)[:length])
            wrong = [*ids(text)[:length], *ids(text)[length : length + 2]]
            drafted.follow(wrong)
            drafted.restrict(flat)
            drafted.follow(np.array(ids(text)[:length], np.int64))
            np.testing.assert_array_equal(drafted.restrict(flat), fresh.restrict(flat))
        drafted.follow(ids(start + '{"store": "b'))
        drafted.follow([*ids(start + '{"store": "b"'), *ids(', "total": 5')])
        drafted.follow([])
        drafted.follow(ids(text))
        fresh.follow(ids(text))
        np.testing.assert_array_equal(drafted.restrict(flat), fresh.restrict(flat))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[1]"}, "object schema"),
        ({"json_schema": False}, "object schema"),
        ({"json_schema": {"type": "nonsense"}}, "Invalid type: nonsense"),
        ({"json_schema": {"type": "object", "not": {}}}, "Unimplemented keys"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "Unsatisfiable"),
        ({"json_schema": {"$ref": "http://example.com/x"}}, "not present in a registry"),
        ({"json_schema": '{"x":' + "[" * 3000 + "]" * 3000 + "}"}, "recursion"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "nonsense"}, "GBNF"),
        ({"grammar": "start: foo"}, "unknown name"),
        ({"grammar": "start: <nothere>"}, "unknown special token"),
    ],
)
def test_what_cannot_be_held_is_refused_in_one_line(values: dict[str, Any], why: str, constraints: Constraints) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        constraints.rows(options(**values), [False])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 330
    assert next(iter(values)) in message


def test_rows_and_threads_do_not_disturb_each_other(tokenizer: Tokenizer) -> None:
    shared = Constraints(lambda: Vocabulary(tokenizer, VOCABULARY, {EOS}))
    kinds: list[dict[str, Any]] = [{"json_schema": RECEIPT}, {"regex": "[a-f]{30}"}, {"grammar": LARK}] * 3

    def texts(values: dict[str, Any]) -> list[list[int]]:
        chosen = options(seed=3, **values)
        rows = make_choosers(chosen, shared.rows(chosen, [False, True]), None)
        return [write(row, 5)[0] for row in rows]

    alone = [texts(values) for values in kinds[:3]]
    found: dict[int, list[list[int]]] = {}

    def work(place: int) -> None:
        found[place] = texts(kinds[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(len(kinds))] == alone * 3


def test_tokens_of_many_bytes(tmp_path: Path) -> None:
    merged = Tokenizer.load(write_tokenizer(tmp_path))
    end = merged.token_to_id("<|endofturn|>")
    assert end is not None
    size = merged.vocab_size + 20
    shared = Constraints(lambda: Vocabulary(merged, size, {end}))
    chosen = options(seed=1, regex="(the user|said|hello| |이미지를|설명해){4}")
    (chooser,) = make_choosers(chosen, shared.rows(chosen, [False]), None)
    random = np.random.default_rng(0)
    said: list[int] = []
    while not chooser.complete and (not said or said[-1] != end):
        said.append(chooser(random.standard_normal(size).astype(np.float32), [], said))
    text = merged.decode(said)
    assert re.fullmatch("(the user|said|hello| |이미지를|설명해){4}", text)
    assert len(said) < len(text.encode())
    (row,) = shared.rows(options(regex="(?s).*"), [False])
    assert row is not None
    allowed = np.isfinite(row.restrict(np.zeros(size, np.float32)))
    assert allowed[: merged.vocab_size].sum() > 200
    assert not allowed[merged.vocab_size :].any()  # rows of the model's table without a token


def test_any_json(constraints: Constraints, tokenizer: Tokenizer) -> None:
    said, why = write(one(constraints, json_schema=True), 0, script='{"a": [1, "x", null]}!')
    assert (json.loads(tokenizer.decode(said)), why) == ({"a": [1, "x", None]}, "complete")


def test_without_constraints_llguidance_is_not_needed(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = Constraints(lambda: Vocabulary(tokenizer, VOCABULARY, {EOS}))
    assert fresh.rows(GenerationOptions(), [False, True]) == [None, None]
    with pytest.raises(EnvironmentFault, match=r"llguidance: it is not installed\. .*constrained"):
        fresh.rows(options(regex="a"), [False])


def test_importing_the_runtime_does_not_import_llguidance() -> None:
    code = "import sys, runtime.engine; print('llguidance' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
