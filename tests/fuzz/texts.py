"""What users write: recipes, conversations, lines of requests and of calibration, grammars; and chat templates."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from random import Random
from typing import Any, Final

from exaone_export.batching.lines import ask_of, lines, parse, survey
from exaone_export.calibration.encode import load_prompts
from model.errors import UsageError
from model.jsonfile import parse_json_object
from quantize.recipe import Recipe, load_recipe, parse_recipe
from runtime.messages import check_messages, check_tools, take_media
from runtime.options import GenerationOptions
from tests.fuzz.mutators import hostile, same, spoiled, spoiled_json, strict_json
from tests.fuzz.target import Target

_RECIPE: Final = """name = "mine"
[[rule]]
match = "vision_encoder.patch_embed.*"
bits = "float"
[[rule]]
match = "*.lm_head"
bits = 8
block_size = 128
symmetric = true
method = "rtn"
[[rule]]
match = "decoder.layers.[0-3].*"
bits = 8
activations = "int8"
rotate = 64
[[rule]]
match = "decoder.*"
bits = 4
block_size = 32
symmetric = false
method = "hqq"
[verify]
mean_kld = 0.05
[target.cuda]
block_size = 32
symmetric = true
"""
_TOML: Final = (
    "1e400", "nan", "-inf", "0x10", "0b1", "1_000", "2", "8", "16", "4.0", "true", "'x'", '"float"', '"gptq"', '""',
    '"\\u0000"', '"""x\ny"""', "[1, 2]", "{a = 1}", "1979-05-27", "9" * 30, "[" * 2000, "{a = " * 500, "-0", '"int8"',
)  # fmt: skip
_LINES: Final = (
    "[[rule]]", "[rule]", "[verify]", "[target.cuda]", "[target]", 'name = "x"', "extra = 1", "mean_kld = 1e9",
    "a.b.c.d = 1", 'match = "*"', "rule = 1", "[[rule.x]]", "rotate = 3", "target.cuda.block_size = 16",
)  # fmt: skip


class RecipeFile(Target):
    """A recipe in TOML."""

    name, codes = "recipe", frozenset({2})
    long = 60_000

    def mutant(self, random: Random) -> bytes:
        rows = _RECIPE.splitlines()
        if random.random() < 0.35:
            return spoiled(_RECIPE.encode(), random)
        for _ in range(random.choice((1, 1, 2, 4))):
            at = random.randrange(len(rows))
            kind = random.randrange(5)
            if kind < 2 and "=" in rows[at]:
                rows[at] = f"{rows[at].partition('=')[0]}= {random.choice(_TOML)}"
            elif kind == 2 and len(rows) > 1:
                del rows[at]
            elif kind == 3:
                rows.insert(at, rows[random.randrange(len(rows))])
            else:
                rows.insert(at, random.choice(_LINES))
        return "\n".join(rows).encode()

    def run(self, data: bytes) -> Recipe:
        path = self.scratch / "recipe.toml"
        path.write_bytes(data)
        return load_recipe(path)

    def judge(self, data: bytes, accepted: Recipe) -> str:
        """Each rule says what the file says, and the recipe written out is the same again."""
        raw = tomllib.loads(data.decode())
        if raw.keys() - {"name", "rule", "verify", "target"} or len(raw["rule"]) != len(accepted.rules):
            return "keys or rules that recipes do not have"
        for stated, rule in zip(raw["rule"], accepted.rules, strict=True):
            if stated["match"] != rule.match or (rule.scheme is None) != (stated["bits"] == "float"):
                return f"rule {stated}"
            for key in stated.keys() - {"match", "bits"} if rule.scheme is None else stated.keys() - {"match"}:
                if rule.scheme is None or not same(stated[key], getattr(rule.scheme, key)):
                    return f"rule {stated}: {key}"
        again = parse_recipe(accepted.to_toml(), "again")
        return "" if again == accepted else f"written out it is another: {again}"


_TURNS: Final[list[Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "가 b"}, {"type": "image"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": {"x": [1, 2.5, None]}, "name": "f"},
    {"role": "assistant", "content": "so", "reasoning": "hm"},
    {"role": "user", "content": "next"},
]
_TOOLS: Final[list[Any]] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


class Conversation(Target):
    """Messages and tools as JSON."""

    name, codes = "messages", frozenset({2})
    long = 100_000

    def mutant(self, random: Random) -> bytes:
        value: Any = {"messages": _TURNS, "tools": _TOOLS}
        if random.random() < 0.4:
            turn = {
                "role": random.choice(("user", "tool", "assistant")),
                "content": hostile(random),
                "x": hostile(random),
            }
            value = {"messages": [*_TURNS, turn], "tools": _TOOLS}
        return spoiled_json(json.dumps(value).encode(), value, random)

    def run(self, data: bytes) -> tuple[list[Any], Any]:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise UsageError("cannot use messages", "file", "it is not UTF-8") from None
        raw = parse_json_object(text, "file", UsageError, "cannot use messages")
        messages = raw.get("messages")
        plain = take_media(messages)[0] if isinstance(messages, list) else messages
        return check_messages(plain), check_tools(raw.get("tools"))

    def judge(self, data: bytes, accepted: tuple[list[Any], Any]) -> str:
        raw, (messages, tools) = strict_json(data), accepted
        json.dumps(messages, allow_nan=False, ensure_ascii=False).encode()
        if (tools or []) != (raw.get("tools") or []):
            return "other tools"
        if [turn["role"] for turn in messages] != [turn["role"] for turn in raw["messages"]]:
            return "other roles"
        for turn, stated in zip(messages, raw["messages"], strict=True):
            content = stated.get("content")
            if isinstance(content, str) and turn["content"] != content:
                return f"content {content[:80]!r} becomes {str(turn['content'])[:80]!r}"
            if turn["role"] == "user" and not turn["content"]:
                return "a user's turn without content"
        return ""


class RequestLine(Target):
    """A file of requests for `batch`, ours or OpenAI's."""

    name, codes = "request_line", frozenset({2})
    long = 80_000
    _good: Final[tuple[dict[str, Any], ...]] = (
        {"id": "a", "prompt": "x", "images": ["a.png"], "system": "s", "preset": "text", "temperature": 0.5, "seed": 1,
         "max_new_tokens": 5, "stop": ["."], "json_schema": {"type": "object"}},
        {"id": 7, "messages": _TURNS, "tools": _TOOLS, "top_k": 5, "enable_thinking": True, "speculate": "off"},
        {"custom_id": "b", "method": "POST", "url": "/v1", "body": {"model": "m", "messages": _TURNS, "n": 1,
         "max_tokens": 5, "temperature": 1, "logprobs": True, "top_logprobs": 2, "stream": False,
         "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string"}}}}},
    )  # fmt: skip

    def mutant(self, random: Random) -> bytes:
        value = random.choice(self._good)
        return spoiled_json(json.dumps(value).encode(), value, random).replace(b"\n", b" ")

    def run(self, data: bytes) -> list[tuple[Any, GenerationOptions]]:
        path = self.scratch / "requests.jsonl"
        path.write_bytes(data + b"\n")
        survey(path)
        found = []
        for number, line in lines(path):
            ask = ask_of(parse(line, number), number, self.scratch, None)
            found.append((ask, GenerationOptions().merged(**ask.options)))
        return found

    def judge(self, data: bytes, accepted: list[tuple[Any, GenerationOptions]]) -> str:
        if not accepted:
            return "" if not data.strip(b"\xef\xbb\xbf \t\r\x0b\x0c") else "a line that is passed over"
        raw = strict_json(data)
        ask, options = accepted[0]
        for key in ("temperature", "top_k", "seed", "max_new_tokens"):
            if "body" not in raw and raw.get(key) is not None and not same(raw[key], getattr(options, key)):
                return f"{key} {raw[key]!r}"
        stated = raw.get("images") or [] if "prompt" in raw and "body" not in raw else ask.images
        pairs = zip(stated, ask.images, strict=True)
        return (
            ""
            if all(path in (own, str(self.scratch / str(own))) or isinstance(own, list) for own, path in pairs)
            else "paths"
        )


class CalibrationLine(Target):
    """A line of prompts to calibrate on, given to tokenizer and template."""

    name, codes = "calibration", frozenset({2, 4})
    short, long = 40, 8_000
    _good: Final[tuple[dict[str, Any], ...]] = (
        {"messages": [*_TURNS[:1], {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]},
        {"text": "a plain text of some words", "language": "en"},
    )

    def mutant(self, random: Random) -> bytes:
        value = random.choice(self._good)
        return spoiled_json(json.dumps(value).encode(), value, random)

    def run(self, data: bytes) -> Any:
        path = self.scratch / "prompts.jsonl"
        path.write_bytes(data)
        return load_prompts(self.corpus / "text", path)

    def judge(self, data: bytes, accepted: Any) -> str:
        ids = [int(token) for prompt in accepted.prompts for token in prompt.ids]
        return "" if ids and all(0 <= token < 512 for token in ids) else "no tokens, or such as there are none"


class Grammar(Target):
    """A JSON schema, a regular expression or a grammar that an answer is to follow."""

    name, codes = "grammar", frozenset({2})
    short, long = 60, 30_000
    _good: Final[dict[str, str]] = {
        "json_schema": '{"type": "object", "properties": {"a": {"type": "integer", "minimum": 3},'
        ' "b": {"enum": ["x", 1]}, "c": {"type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 3}},'
        ' "required": ["a"],'
        ' "$defs": {"d": {"type": "string", "pattern": "^a+$", "maxLength": 4}}, "additionalProperties": false}',
        "regex": r"(a|b){2,5}[0-9]+(\.\d{1,3})?|x*y+",
        "grammar": 'start: "a" b+ | NUMBER\nb: /[a-z]+/ "!"\nNUMBER: /[0-9]+/\n%ignore /[ ]+/\n',
    }

    def __init__(self, corpus: Path, scratch: Path) -> None:
        from runtime.constraint import Constraints, Vocabulary
        from runtime.tokenizer import Tokenizer

        super().__init__(corpus, scratch)
        vocabulary = Vocabulary(Tokenizer.load(corpus / "text"), 512, [53])
        self._constraints = Constraints(lambda: vocabulary)

    def mutant(self, random: Random) -> bytes:
        kind = random.choice(list(self._good))
        raw = self._good[kind].encode()
        changed = spoiled_json(raw, json.loads(raw), random) if kind == "json_schema" else spoiled(raw, random)
        return kind.encode() + b"\n" + changed

    def run(self, data: bytes) -> Any:
        kind, _, raw = data.partition(b"\n")
        given: dict[str, Any] = {kind.decode(): raw.decode("utf-8", "surrogateescape")}
        return self._constraints.rows(GenerationOptions(**given), [False])[0]

    def judge(self, data: bytes, accepted: Any) -> str:
        return "" if accepted is not None else "nothing holds the answer"
