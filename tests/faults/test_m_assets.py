"""M16 and M17: the tokenizer of another model, and defaults that make no sense, though their hashes are right.

Numbers are those of the table of faults that the toolkit is tried against.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.quiet import stderr_held_back
from tests.faults.hostile import Bad, answer, json_file, made, refused, run_alone, sign
from tests.tiny import tokenizer_json

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
Change = Callable[[dict[str, Any]], object]


def tokens(change: Change) -> Any:
    return json_file(TOKENIZER, change)


def more(raw: dict[str, Any]) -> None:
    """A thousand words that the model has no embedding of."""
    vocabulary = raw["model"]["vocab"]
    vocabulary |= {f"Ġword{i}": 10_000 + i for i in range(1000)}


def fewer(raw: dict[str, Any]) -> None:
    """The token that ends a turn, by the id that config.json says, is not there."""
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] != 53]
    raw["model"]["vocab"] = {token: number for token, number in raw["model"]["vocab"].items() if number != 53}


def far(raw: dict[str, Any]) -> None:
    """One byte's token has an id far beyond all others, so that there are not too many."""
    raw["model"]["vocab"]["x"] = 1_000_000


def far_added(raw: dict[str, Any]) -> None:
    """A control token has an id far beyond all others."""
    last = raw["added_tokens"][-1]
    last["id"] = raw["model"]["vocab"][last["content"]] = 100_000


test_m16_the_tokenizer_of_another_model = refused(
    Bad("m16 more tokens", tokens(more), (TOKENIZER, "tokens, the model has")),
    Bad("m16 fewer tokens", tokens(fewer), (TOKENIZER, "it has no token 53, which config.json names")),
    Bad("m16 an id beyond the vocabulary", tokens(far), (TOKENIZER, "token 1000000, the model has"), verify=0),
    Bad("m16 an added id beyond it", tokens(far_added), (TOKENIZER, "an added token has the id 100000")),
)


def defaults(**values: Any) -> Any:
    return json_file(GENERATION, lambda raw: raw.update(values))


BAD: dict[str, tuple[str, object]] = {
    "a temperature of minus one": ("temperature", -1.0),
    "a temperature that is NaN": ("temperature", math.nan),
    "an infinite temperature": ("temperature", math.inf),
    "a temperature that is text": ("temperature", "hot"),
    "top_k of minus one": ("top_k", -1),
    "top_p of two": ("top_p", 2.0),
    "min_p of minus one": ("min_p", -1),
    "max_new_tokens of 10^12": ("max_new_tokens", 10**12),
    "max_new_tokens of 0": ("max_new_tokens", 0),
    "a penalty of zero": ("repetition_penalty", 0.0),
    "eos that is text": ("eos_token_id", "x"),
    "a negative eos": ("eos_token_id", -1),
    "eos that is true": ("eos_token_id", True),
    "eos of lists": ("eos_token_id", [[1]]),
}
test_m17_defaults_that_make_no_sense = refused(
    *(
        Bad(f"m17 {name}", defaults(**{key: value}), (GENERATION, key))
        for name, (key, value) in BAD.items()
    ),
    Bad("m17 not JSON", lambda folder: (folder / GENERATION).write_text("{"), (GENERATION, "JSON")),
    Bad("m17 a list", lambda folder: (folder / GENERATION).write_text("[]"), (GENERATION,)),
    Bad("m17 a number of 9999 digits", lambda folder: (folder / GENERATION).write_text(f'{{"x": {"9" * 9999}}}'),
        (GENERATION,)),
)  # fmt: skip


@pytest.mark.parametrize("change", ["no eos", "top_k 0", "no file"])
def test_m17_defaults_that_are_missing_or_switch_something_off(tmp_path: Path, change: str) -> None:
    """Without an end of turn of its own, config.json's holds; top_k 0 is transformers' word for none."""
    folder = made(tmp_path)
    wanted = answer(folder)
    if change == "no eos":
        json_file(GENERATION, lambda raw: raw.pop("eos_token_id", None))(folder)
    elif change == "top_k 0":
        defaults(top_k=0)(folder)
    else:
        (folder / GENERATION).unlink()
        json_file("exaone_export.json", lambda raw: raw["files"].pop(GENERATION))(folder)
    sign(folder)
    assert answer(folder) == wanted


def test_t11_a_regex_without_end_is_told_in_a_line(tmp_path: Path) -> None:
    """The library writes a page on stderr before it fails, with paths and addresses; none of it may be seen."""
    folder = made(tmp_path)
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    raw = tokenizer_json()
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, raw["pre_tokenizer"]]}
    (folder / TOKENIZER).write_text(json.dumps(raw))
    sign(folder)
    outcome = run_alone(("generate", str(folder), "a" * 200 + "!", "--dry-run"))
    assert (outcome.code, outcome.stdout) == (4, "")
    assert len(outcome.stderr.splitlines()) <= 3
    assert "error: cannot use tokenizer: tokenizer.json: " in outcome.stderr
    assert "panicked" not in outcome.stderr


HELD = """
import os, sys
from runtime.quiet import stderr_held_back
os.write(2, b"before ")
with stderr_held_back():
    os.write(2, b"meanwhile ")
    with stderr_held_back():
        print("inside", end=" ", file=sys.stderr, flush=True)
try:
    with stderr_held_back():
        os.write(2, b"panicked ")
        raise ValueError
except ValueError:
    os.write(2, b"after")
os.close(2)
with stderr_held_back():
    pass
"""


def test_what_others_write_on_stderr_is_late_but_not_lost() -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == "before meanwhile inside after"


def test_stderr_is_as_before() -> None:
    before = os.fstat(2)
    with pytest.raises(ValueError, match="x"), stderr_held_back():
        raise ValueError("x")
    assert os.fstat(2) == before
