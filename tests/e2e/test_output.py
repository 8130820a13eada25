"""Forms of answers, log-probabilities and presets on real graphs, in Python and on the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import exaone_export as ee
from exaone_export.demo import checkpoint_folder
from runtime.engine import Engine
from tests.e2e.conftest import Bundles

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "store": {"type": "string", "maxLength": 8},
        "total": {"type": "integer", "minimum": 1, "maximum": 999},
    },
    "required": ["store", "total"],
    "additionalProperties": False,
}


def check(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["store", "total"]
    assert len(value["store"]) <= 8
    assert 1 <= value["total"] <= 999


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "demonstration"
    ee.export(checkpoint_folder(), out)
    return out


def test_a_model_that_never_learnt_json_writes_it(demonstration: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8))
    with Engine.load(demonstration) as engine:
        for options in ({"do_sample": False}, {"temperature": 1.5, "seed": 4}, {"preset": "general", "seed": 5}):
            result = engine.generate("Read it.", [picture], json_schema=SCHEMA, max_new_tokens=200, **options)
            check(result.text)
            assert (result.finish_reason, result.warnings, result.reasoning) == ("stop", [], "")


def test_rows_of_a_batch_and_streams_hold_the_form(bundles: Bundles) -> None:
    with Engine.load(bundles.bundle("vlm", "int8")) as engine:
        options: dict[str, Any] = {"json_schema": SCHEMA, "temperature": 1.0, "seed": 2, "max_new_tokens": 300}
        for result in engine.generate(["a", "a longer prompt", "셋"], **options):
            check(result.text)
        chunks = list(engine.stream("a", **options))
        check("".join(chunk.text for chunk in chunks if chunk.kind == "text"))


def test_log_probabilities_are_those_of_the_graph(bundles: Bundles) -> None:
    with Engine.load(bundles.bundle("dense")) as engine:
        prompt = list(engine.prompt("hello").token_ids)
        result = engine.generate_ids(prompt, max_new_tokens=6, logprobs=3, temperature=0.8, seed=1)
        logits = engine.logits(prompt + result.token_ids).astype(np.float64)[len(prompt) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert result.logprobs is not None
    for place, (token, told) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        assert told.logprob == pytest.approx(expected[place, token], abs=1e-4)
        best = np.sort(expected[place])[::-1][:3]
        assert [item.logprob for item in told.top_logprobs] == pytest.approx(best.tolist(), abs=1e-4)


def run(*argv: str, stdin: str = "", before: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys; {before}\nfrom exaone_export.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *argv]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def test_forms_on_the_command_line(bundles: Bundles, tmp_path: Path) -> None:
    bundle = str(bundles.bundle("dense"))
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text(json.dumps(SCHEMA), encoding="utf-8")
    grammar.write_text('start: "yes" | "no"\n', encoding="utf-8")
    limit = ("--max-new-tokens", "300", "--seed", "1")
    found = run("generate", bundle, "a", "--json-schema", str(schema), "--logprobs", "1", "--json", *limit)
    assert found.returncode == 0, found.stderr
    printed = json.loads(found.stdout)
    check(printed["text"])
    assert len(printed["logprobs"]) == len(printed["token_ids"])
    piped = run("generate", bundle, "a", "--json-schema", "-", *limit, stdin=json.dumps(SCHEMA))
    check(piped.stdout)
    assert run("generate", bundle, "a", "--grammar", str(grammar), "--greedy").stdout in ("yes\n", "no\n")
    assert re.fullmatch(r"[0-9]{4}\n", run("generate", bundle, "a", "--regex", "[0-9]{4}", "--greedy").stdout)


@pytest.mark.parametrize(
    ("argv", "stdin", "code", "why"),
    [
        (["--regex", "("], "", 2, "regex"),
        (["--json-schema", "-"], '{"type": "nonsense"}', 2, "Invalid type"),
        (["--json-schema", "-"], "not JSON", 2, "json_schema"),
        (["--json-schema", "none.json"], "", 2, "no such file"),
        (["--json-schema", "-", "--grammar", "-"], "", 2, "stdin"),
        (["--regex", "a", "--json-schema", "-"], "{}", 2, "cannot go together"),
        (["--logprobs", "21"], "", 2, "logprobs"),
        (["--regex", "a", "--quiet"], "", 5, "constrained"),
    ],
)
def test_forms_that_cannot_be_had(bundles: Bundles, argv: list[str], stdin: str, code: int, why: str) -> None:
    before = "sys.modules['llguidance'] = None" if code == 5 else ""
    done = run("generate", str(bundles.bundle("dense")), "a", *argv, stdin=stdin, before=before)
    assert done.returncode == code, done.stderr
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 1)
    assert done.stderr.startswith("error: ")
    assert why in done.stderr


def test_the_preset_is_chosen_by_the_input(bundles: Bundles, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (56, 56)).save(picture)
    bundle = str(bundles.bundle("vlm"))

    def options(*argv: str) -> dict[str, Any]:
        done = run("generate", bundle, *argv, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)["options"]
        return found

    assert (options("hi")["temperature"], options("hi")["presence_penalty"]) == (1.0, 0.0)
    general = options("hi", "--image", str(picture), "--top-p", "0.5")
    assert (general["temperature"], general["top_p"], general["presence_penalty"]) == (1.0, 0.5, 1.5)
    document = options("hi", "--preset", "document")
    assert (document["temperature"], document["top_k"]) == (0.6, 20)
    greedy = options("hi", "--image", str(picture), "--greedy")
    assert (greedy["do_sample"], greedy["temperature"], greedy["presence_penalty"]) == (False, None, 0.0)
