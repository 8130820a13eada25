from __future__ import annotations

from typing import Any

import pytest

from model.errors import UsageError
from runtime.options import PRESETS, GenerationOptions
from runtime.presets import Kind, kind_of, resolve, says_how_to_draw

DEFAULTS = GenerationOptions.from_generation_config({"eos_token_id": 53})
KOREAN_TURN = [
    {"role": "user", "content": "hello"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "읽어 줘"}]},
]


@pytest.mark.parametrize(
    ("model", "prompt", "images", "thinking", "preset"),
    [
        ("exaone4_5", "Hello", [], None, "text"),
        ("exaone4_5", "안녕", (), True, "text"),
        ("exaone4_5", "What is this?", ["a.png"], None, "general"),
        ("exaone4_5", "이 이미지를 설명해 줘.", ["a.png"], None, "document"),
        ("exaone4_5", KOREAN_TURN, ["a.png"], None, "document"),
        ("exaone4_5", [*KOREAN_TURN, {"role": "user", "content": "in English"}], ["a.png"], None, "general"),
        ("exaone4_5", ["one", "둘"], [[], ["a.png"]], None, "document"),
        ("exaone4_5", [5, {"role": "user"}], ["a.png"], None, "general"),
        ("exaone4_5", ["one", "둘"], [[], []], None, "text"),
        ("exaone4", "안녕", (), None, None),
        ("exaone4", "Hello", (), True, "reasoning"),
        ("exaone4", "Hello", (), False, None),
    ],
)
def test_the_input_decides(model: str, prompt: Any, images: Any, thinking: bool | None, preset: str | None) -> None:
    kind = kind_of(model, prompt, images, thinking)
    assert kind.preset == preset
    name, options = resolve("auto", kind, DEFAULTS, None, {})
    assert name == preset
    assert options == (DEFAULTS if preset is None else PRESETS[preset])


IMAGE = Kind("exaone4_5", media=True)


def test_single_values_go_before_the_preset() -> None:
    name, options = resolve("document", IMAGE, DEFAULTS, None, {"temperature": 0.2, "max_new_tokens": 9})
    assert name == "document"
    assert options == GenerationOptions(temperature=0.2, top_p=0.95, top_k=20, presence_penalty=1.5, max_new_tokens=9)
    given = GenerationOptions(top_k=3, seed=1, regex="a+")
    name, options = resolve("auto", IMAGE, DEFAULTS, given, {"top_k": None, "min_p": 0.1})
    assert name == "general"
    assert (options.top_k, options.seed, options.min_p, options.temperature) == (3, 1, 0.1, 1.0)
    assert (options.regex, options.samples) == ("a+", True)


@pytest.mark.parametrize("name", ["auto", "document"])
@pytest.mark.parametrize("values", [{"do_sample": False}, {"temperature": 0.0}])
def test_greedy_is_greedy(name: str, values: dict[str, Any]) -> None:
    for options, overrides in ((None, values), (GenerationOptions(**values), {})):
        preset, found = resolve(name, IMAGE, DEFAULTS, options, overrides)
        assert (preset, found.samples, found.presence_penalty) == (None, False, 0.0)


def test_none_leaves_the_bundles_own_values() -> None:
    own = GenerationOptions.from_generation_config({"do_sample": True, "top_k": 5})
    assert resolve("none", IMAGE, own, None, {}) == (None, own)
    assert resolve(None, IMAGE, own, None, {"top_p": 0.5})[1].top_p == 0.5


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(UsageError, match=r"preset: 'chat' is not known\. Known: auto, none, general"):
        resolve("chat", IMAGE, DEFAULTS, None, {})


def test_which_bundles_say_how_to_draw() -> None:
    assert not says_how_to_draw({"eos_token_id": 53, "temperature": None, "max_new_tokens": 5})
    assert says_how_to_draw({"do_sample": False})
    assert says_how_to_draw({"top_p": 0.9})
