"""How to generate: one frozen dataclass, its checks, its presets.

Names and meanings are those of Hugging Face's ``GenerationConfig``; ``presence_penalty``, ``seed``, ``stop`` and
``enable_thinking`` are those of OpenAI-compatible servers. ``None`` always means "not set".
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from model.errors import BundleError, UsageError

LARGEST_SEED: Final = 2**64 - 1
LARGEST_NEW_TOKENS: Final = 2**31 - 1
GREEDY_BELOW: Final = 1e-5  # a temperature this low draws the likeliest token anyway, and would overflow float32
MAX_STOP_STRINGS: Final = 64
MAX_STOP_LENGTH: Final = 1024
MAX_LOGPROBS: Final = 20  # as OpenAI's API has it
MAX_GRAMMAR_LENGTH: Final = 1 << 20

# name -> (lowest, highest, lowest itself allowed). The ceilings only keep float32 logits finite.
_FLOAT_RANGES: Final[dict[str, tuple[float, float, bool]]] = {
    "fps": (0.0, 1000.0, False),
    "temperature": (0.0, 100.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "presence_penalty": (-100.0, 100.0, True),
    "repetition_penalty": (0.0, 100.0, False),
}
_INT_RANGES: Final[dict[str, tuple[int, int]]] = {
    "max_new_tokens": (1, LARGEST_NEW_TOKENS),
    "top_k": (0, LARGEST_NEW_TOKENS),
    "seed": (0, LARGEST_SEED),
    "logprobs": (0, MAX_LOGPROBS),
    "num_frames": (1, 1 << 20),
    "draft_tokens": (1, 64),
    "min_pixels": (1, 1 << 31),
    "max_pixels": (1, 1 << 31),
    "max_total_pixels": (1, 1 << 40),
}
_REBUILD: Final = "Correct the file or export the model again"
_BOOLEANS: Final = ("do_sample", "enable_thinking")
SPECULATE: Final = ("auto", "mtp", "lookup", "off")
_GRAMMARS: Final = ("json_schema", "regex", "grammar")
_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p")
_FROM_BUNDLE: Final = ("do_sample", "max_new_tokens", *_SAMPLING, "presence_penalty", "repetition_penalty")


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one generation. Every value is checked when the object is made.

    Attributes:
        max_new_tokens: most tokens to generate; None = until the end of the turn or of the context.
        do_sample: True = draw, False = greedy; None = draw if any of temperature (other than 0), top_p, top_k, min_p
            is set.
        temperature: divides the logits, 0 to 100; below 1e-5 means greedy; None = 1.
        top_p: keep the smallest set of tokens whose probability reaches this, above 0 up to 1; None = off.
        top_k: keep this many most likely tokens; None or 0 = off.
        min_p: keep tokens at least this times as likely as the likeliest, 0 to 1; None = off.
        presence_penalty: subtracted once from the logit of every token generated so far (the prompt does not count).
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or generated.
        seed: 0 to 2**64 - 1; None = fresh randomness. Of a list of prompts each draws from a stream of its own, told by
            the seed and its place: the first one's is that of a single prompt, so equal prompts get different answers.
        stop: strings that end the text; they are not part of it.
        enable_thinking: passed to the chat template; None = the template's own default.
        json_schema: the answer is JSON that this schema allows: an object, its JSON text, or a pydantic model; kept as
            text. Keywords that cannot be held are refused.
        regex: the whole answer matches this expression (syntax of Rust's regex, without look-around).
        grammar: the answer follows this grammar, Lark as llguidance reads it or llama.cpp's GBNF. Only one of these
            three may be given; they need the extra "constrained", and hold for the answer alone, not for reasoning.
        logprobs: tell the log-probability of every token and of this many of the likeliest, 0 to 20; None = tell none.
        min_pixels, max_pixels: bounds of an image's, or a video frame's, area after scaling; None = the model's own.
        max_total_pixels: refuse images and videos that have more after scaling, all together; None = what fits into the
            context.
        fps: frames to take of a video, a second.
        num_frames: frames to take of a video, in all; not together with fps.
        speculate: draft tokens and check several with one pass, for a prompt alone: "mtp" by the checkpoint's draft
            head, "lookup" by what followed the same tokens before, "auto" by either, as far as it is faster; "off" is
            plain decoding. The answer is the same, but for ties that the last bits of logits decide; with "auto", which
            passes there are depends on the time they take. Batches and caches of 8 bits are decoded plainly.
        draft_tokens: tokens to draft for a pass, 1 to 64, for "auto" at most; None = as many as pay, 7 at most.

    Raises:
        UsageError: a value has the wrong type or is out of range.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    enable_thinking: bool | None = None
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    logprobs: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_total_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    speculate: str = "off"
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in _BOOLEANS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise _refusal(name, value, "is neither true nor false")
        for name, (lowest, highest) in _INT_RANGES.items():
            _check_int(name, getattr(self, name), lowest, highest)
        for name in _FLOAT_RANGES:
            object.__setattr__(self, name, _checked_float(name, getattr(self, name)))
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        given = [name for name in _GRAMMARS if getattr(self, name) is not None]
        for name in given:
            _check_grammar(name, getattr(self, name))
        if len(given) > 1:
            raise UsageError("bad option", given[1], f"it cannot go together with {given[0]}", "Give one of them")
        if self.speculate not in SPECULATE:
            raise _refusal("speculate", self.speculate, f"is none of {', '.join(SPECULATE)}")
        if self.fps is not None and self.num_frames is not None:
            raise UsageError("bad option", "num_frames", "it cannot go together with fps", "Give one of them")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; False means greedy."""
        if self.temperature is not None and self.temperature < GREEDY_BELOW:
            return False
        if self.do_sample is not None:
            return self.do_sample
        return any(getattr(self, name) is not None for name in _SAMPLING)

    def merged(self, **overrides: Any) -> GenerationOptions:
        """A copy with the given options replaced; an override of None leaves the option as it is.

        Setting temperature, top_p, top_k or min_p turns a greedy default into drawing unless do_sample is given too.

        Raises:
            UsageError: an option is unknown or its value is refused.
        """
        known = {field.name for field in dataclasses.fields(self)}
        for name, value in overrides.items():
            if name not in known:
                raise _refusal(name, value, "is not a known option", f"Known: {', '.join(sorted(known))}")
        changes = {name: value for name, value in overrides.items() if value is not None}
        if "do_sample" not in changes and any(name in changes for name in _SAMPLING):
            changes["do_sample"] = None
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, Any]) -> GenerationOptions:
        """The defaults that a bundle's ``generation_config.json`` asks for; keys this runtime has no use for are
        ignored.

        As in transformers, an absent ``do_sample`` means greedy.

        Raises:
            BundleError: a value has the wrong type or is out of range.
        """
        if not isinstance(raw, Mapping):
            raise BundleError("cannot use bundle", "generation_config.json", "it is not a JSON object", _REBUILD)
        values = {name: raw[name] for name in _FROM_BUNDLE if raw.get(name) is not None}
        values.setdefault("do_sample", False)
        try:
            return cls(**values)
        except UsageError as error:
            why = f"{error.where} {error.why}"
            raise BundleError("cannot use bundle", "generation_config.json", why, _REBUILD) from error


def _refusal(name: str, value: object, why: str, remedy: str = "") -> UsageError:
    shown = repr(value)
    if " at 0x" in shown:  # of an object that is none of JSON's
        shown = f"a value of type {type(value).__name__}"
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return UsageError("bad option", name, f"{shown} {why}", remedy)


def _check_int(name: str, value: object, lowest: int, highest: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refusal(name, value, "is not a whole number")
    if not lowest <= value <= highest:
        raise _refusal(name, value, f"is not between {lowest} and {highest}")


def _checked_float(name: str, value: object) -> float | None:
    if value is None and name not in ("presence_penalty", "repetition_penalty"):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(name, value, "is not a number")
    lowest, highest, inclusive = _FLOAT_RANGES[name]
    low_enough = lowest <= value if inclusive else lowest < value
    if math.isnan(value) or not (low_enough and value <= highest):
        bound = "at least" if inclusive else "above"
        raise _refusal(name, value, f"is not {bound} {lowest:g} and at most {highest:g}")
    return float(value)


def _schema_text(value: object) -> str | None:
    """A JSON schema as JSON text."""
    if value is None or isinstance(value, str):
        return value
    make = getattr(value, "model_json_schema", None)  # a pydantic model
    schema = make() if callable(make) else value
    if not isinstance(schema, Mapping | bool):
        raise _refusal("json_schema", value, "is neither an object nor JSON text")
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as reason:
        raise _refusal("json_schema", type(value).__name__, f"is not JSON ({str(reason)[:100]})") from None


def _check_grammar(name: str, value: object) -> None:
    if not isinstance(value, str) or (not value.strip() and name != "regex"):
        raise _refusal(name, value, "is not a text that says something")
    if len(value) > MAX_GRAMMAR_LENGTH:
        raise UsageError("bad option", name, f"it is longer than {MAX_GRAMMAR_LENGTH} characters")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError("bad option", name, "it has half of a surrogate pair", "Pass valid Unicode") from None


def _checked_stop(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, tuple | list):
        raise _refusal("stop", value, "is not a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise _refusal("stop", value, f"has {len(strings)} strings, at most {MAX_STOP_STRINGS} are allowed")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise _refusal("stop", string, "is not a non-empty string")
        if len(string) > MAX_STOP_LENGTH:
            raise _refusal("stop", string, f"is longer than {MAX_STOP_LENGTH} characters")
    return tuple(strings)


PRESETS: Final[dict[str, GenerationOptions]] = {
    # The model card's own advice for EXAONE 4.5, by kind of task.
    "general": GenerationOptions(do_sample=True, temperature=1.0, top_p=0.95, presence_penalty=1.5),
    "document": GenerationOptions(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, presence_penalty=1.5),
    "text": GenerationOptions(do_sample=True, temperature=1.0, top_p=0.95),
    # The model card's advice for EXAONE 4.0 when it reasons.
    "reasoning": GenerationOptions(do_sample=True, temperature=0.6, top_p=0.95),
}
