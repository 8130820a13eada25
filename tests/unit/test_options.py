from __future__ import annotations

import math
from typing import Any

import pytest

from model.errors import BundleError, UsageError
from runtime.options import PRESETS, GenerationOptions

REFUSED: list[tuple[str, Any]] = [
    ("temperature", math.nan), ("temperature", -1), ("temperature", "0.5"), ("temperature", 1e308),
    ("temperature", True), ("temperature", math.inf), ("top_p", 0), ("top_p", 1.01), ("top_p", math.nan),
    ("top_k", -1), ("top_k", 2.0),
    ("min_p", -0.1), ("min_p", 1.5), ("presence_penalty", math.nan), ("presence_penalty", None),
    ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("seed", 2**64), ("seed", -1), ("seed", "1"),
    ("max_new_tokens", 0), ("max_new_tokens", 10**12), ("max_new_tokens", 1.5), ("do_sample", 1),
    ("enable_thinking", "on"), ("stop", ("",)), ("stop", (1,)), ("stop", 5), ("stop", ("x",) * 65),
    ("stop", ("x" * 2000,)), ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("logprobs", 1.0),
    ("json_schema", 5), ("json_schema", ""), ("json_schema", {"x": object()}), ("json_schema", {"x": math.nan}),
    ("json_schema", ["x"]), ("json_schema", "\ud800"), ("regex", 5), ("regex", "\ud800"), ("regex", "a" * 2_000_000),
    ("grammar", " \n"), ("grammar", b"start: x"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        GenerationOptions(**{name: value})
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300


def test_limits_themselves_are_accepted() -> None:
    options = GenerationOptions(temperature=0, top_p=1, top_k=0, min_p=1, seed=2**64 - 1, max_new_tokens=1)
    assert options.temperature == 0.0
    assert isinstance(options.temperature, float)


def test_a_single_stop_string_is_one_string() -> None:
    assert GenerationOptions(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert GenerationOptions(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "samples"),
    [
        ({}, False),
        ({"temperature": 0.6}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0, "do_sample": True}, False),
        ({"top_p": 0.9}, True),
        ({"temperature": 0.6, "do_sample": False}, False),
        ({"do_sample": True}, True),
        ({"seed": 3}, False),
    ],
)
def test_when_tokens_are_drawn(values: dict[str, Any], samples: bool) -> None:
    assert GenerationOptions(**values).samples is samples


def test_merged_ignores_none_and_refuses_unknown_names() -> None:
    base = GenerationOptions(temperature=0.6, seed=1)
    assert base.merged(temperature=None, top_k=5) == GenerationOptions(temperature=0.6, seed=1, top_k=5)
    with pytest.raises(UsageError, match="temprature"):
        base.merged(temprature=1)
    with pytest.raises(UsageError, match="guided_json"):
        base.merged(guided_json=None)


def test_an_override_turns_a_greedy_default_into_drawing() -> None:
    default = GenerationOptions.from_generation_config({"eos_token_id": 53})
    assert not default.samples
    assert default.merged(temperature=0.7).samples
    assert not default.merged(temperature=0.7, do_sample=False).samples
    assert not PRESETS["document"].merged(do_sample=False).samples
    assert not PRESETS["document"].merged(temperature=0.0).samples


def test_generation_config() -> None:
    raw = {"do_sample": True, "temperature": 0.6, "top_k": None, "top_p": 0.95, "transformers_version": "5"}
    assert GenerationOptions.from_generation_config(raw) == GenerationOptions(
        do_sample=True, temperature=0.6, top_p=0.95
    )


@pytest.mark.parametrize(
    "raw",
    [{"temperature": -1}, {"temperature": math.nan}, {"max_new_tokens": 10**12}, {"top_p": "x"}, ["temperature"]],
)
def test_a_bad_generation_config_is_the_bundles_fault(raw: Any) -> None:
    with pytest.raises(BundleError, match=r"generation_config\.json"):
        GenerationOptions.from_generation_config(raw)


def test_presets_follow_the_model_card() -> None:
    assert (PRESETS["document"].temperature, PRESETS["document"].top_k) == (0.6, 20)
    assert all(preset.samples and preset.top_p == 0.95 for preset in PRESETS.values())
    assert [PRESETS[name].presence_penalty for name in ("general", "document", "text")] == [1.5, 1.5, 0.0]
    assert [PRESETS[name].temperature for name in ("general", "text", "reasoning")] == [1.0, 1.0, 0.6]


def test_only_one_form_at_a_time() -> None:
    with pytest.raises(UsageError, match=r"regex.*json_schema"):
        GenerationOptions(json_schema={"type": "object"}, regex="a")  # type: ignore[arg-type]


def test_schemas_are_kept_as_text() -> None:
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, str]:
            return {"type": "object"}

    for given in ({"type": "object"}, '{"type": "object"}', Model):
        assert GenerationOptions(json_schema=given).json_schema == '{"type": "object"}'  # type: ignore[arg-type]
    assert GenerationOptions(json_schema=True).json_schema == "true"  # type: ignore[arg-type]
    assert GenerationOptions(json_schema={"title": "이름"}).json_schema == '{"title": "이름"}'  # type: ignore[arg-type]
