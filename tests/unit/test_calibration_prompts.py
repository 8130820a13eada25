"""Prompts to calibrate on: the set that comes with the package, a user's file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import exaone_export as ee
from exaone_export.calibration.choose import calibrated
from exaone_export.calibration.encode import LONGEST, load_prompts
from model.errors import UsageError
from quantize.apply import Quantizer
from quantize.calibration.prompts import Prompt, PromptSet, token_weights
from quantize.recipe import Recipe, Rule
from quantize.scheme import Scheme
from tests import tiny

GPTQ = Recipe("hessian", (Rule("*", Scheme(4, 32, method="gptq")),))
SEARCH = Recipe("search", (Rule("*", Scheme(4, 32, method="search")),))
RTN = Recipe("plain", (Rule("*", Scheme(4, 32)),))
ASK = {"role": "user", "content": "What is this?"}
LOOK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read it."}]}
IMAGE = tiny.SPECIAL["<|image_pad|>"]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("prompts") / "vlm", "vlm")


def spelled(prompt: Prompt) -> str:
    """Its text without special tokens."""
    return bytes(token - tiny.BYTES_AT for token in prompt.ids.tolist() if token >= tiny.BYTES_AT).decode()


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def test_the_default_set(vlm: Path, tmp_path: Path) -> None:
    prompts = load_prompts(vlm, None)
    seen = [prompt for prompt in prompts.prompts if prompt.patches]
    assert 60 <= len(prompts.prompts) <= 100
    assert len(seen) >= 20
    assert prompts.describe() | {"sha256": ""} == {
        "name": "default", "sha256": "", "prompts": len(prompts.prompts),
        "text_tokens": prompts.text_tokens, "image_tokens": prompts.image_tokens,
    }  # fmt: skip
    assert prompts.sha256 == load_prompts(vlm, None).sha256
    for prompt in seen:
        assert prompt.pixels is not None
        assert len(prompt.pixels()) == prompt.patches
        assert prompts.is_media(prompt).sum() == prompt.patches // 4
    assert any("가" <= character <= "힣" for character in spelled(prompts.prompts[20]))
    text = load_prompts(tiny.make_checkpoint(tmp_path / "text", "dense"), None)
    assert len(text.prompts) == len(prompts.prompts) - len(seen)
    assert text.image_tokens == 0


def test_nothing_in_it_is_measured_too() -> None:
    """What quality is measured on must not be what the weights were fitted to."""
    root = Path(ee.__file__).parent
    files = (root / "calibration" / "prompts.jsonl", root / "verifying" / "prompts.jsonl")
    mine, measured = (set(map(spoken, map(json.loads, file.read_text("utf-8").splitlines()))) for file in files)
    assert not mine & measured


def spoken(line: dict[str, Any]) -> str:
    return line["text"] if "text" in line else line["messages"][-1]["content"]


def test_a_users_file(vlm: Path, tmp_path: Path) -> None:
    Image.new("RGB", (56, 84), (255, 0, 0)).save(tmp_path / "red.png")
    answered = {"messages": [ASK, {"role": "assistant", "content": "A test."}], "language": "en"}
    path = write(tmp_path, {"text": "한글 text"}, "", answered, {"messages": [LOOK], "images": ["red.png"]})
    prompts = load_prompts(vlm, path)
    assert prompts.name == "mine.jsonl"
    assert [prompt.patches for prompt in prompts.prompts] == [0, 0, 24]
    assert spelled(prompts.prompts[0]) == "한글 text"
    assert spelled(prompts.prompts[1]).endswith("A test.")
    assert (prompts.prompts[2].ids == IMAGE).sum() == 6
    Image.new("RGB", (56, 84), (254, 0, 0)).save(tmp_path / "red.png")
    assert load_prompts(vlm, path).sha256 != prompts.sha256
    long = load_prompts(vlm, write(tmp_path, {"text": "x" * (LONGEST + 5)}))
    assert long.prompts[0].ids.size == LONGEST


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", r"mine\.jsonl:2: not JSON"),
        ("[1]", r"mine\.jsonl:2: a JSON object is needed"),
        ({}, r"mine\.jsonl:2: it needs either a text or messages"),
        ({"text": "a", "messages": [ASK]}, "either a text or messages"),
        ({"text": 3}, "its text is no string"),
        ({"text": "x"}, r"mine\.jsonl:2: prompt: it has fewer than two tokens"),
        ({"text": "words", "image": "a.png"}, "unknown key 'image'"),
        ({"messages": "hello"}, r"mine\.jsonl:2: messages: they are not a list"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"mine\.jsonl:2: messages\[0\]\.role"),
        ({"messages": [LOOK]}, "its messages have 1 images, 0 are given"),
        ({"messages": [ASK], "images": "a.png"}, "images is no list of paths"),
        ({"messages": [LOOK], "images": ["absent.png"]}, r"mine\.jsonl:2: .*absent\.png"),
        ({"messages": [LOOK], "images": ["broken.png"]}, r"mine\.jsonl:2: .*broken\.png"),
    ],
)
def test_a_bad_line_is_named(vlm: Path, tmp_path: Path, line: Any, why: str) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(UsageError, match=why) as failure:
        load_prompts(vlm, write(tmp_path, {"text": "a good line"}, line))
    assert "cannot calibrate" in str(failure.value)


def test_a_bad_file_is_named(vlm: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it has no lines"):
        load_prompts(vlm, write(tmp_path, "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9t\xe9"}')
    with pytest.raises(UsageError, match="not UTF-8 at byte 10"):
        load_prompts(vlm, tmp_path / "latin.jsonl")
    with pytest.raises(UsageError, match="cannot calibrate"):
        load_prompts(vlm, tmp_path)
    text = tiny.make_checkpoint(tmp_path / "text", "dense")
    Image.new("RGB", (56, 56)).save(tmp_path / "red.png")
    with pytest.raises(UsageError, match=r"mine\.jsonl:1: images: this model has no place for images"):
        load_prompts(text, write(tmp_path, {"messages": [LOOK], "images": ["red.png"]}))


def test_what_export_refuses_at_once(vlm: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", write(tmp_path, {"text": "words"})
    with pytest.raises(UsageError, match=r"no such file"):
        ee.export(vlm, out, quantize=GPTQ, calibration=tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="no method of recipe plain looks at"):
        ee.export(vlm, out, quantize=RTN, calibration=path)
    with pytest.raises(UsageError, match="no method of recipe none looks at"):
        ee.export(vlm, out, calibration=path)
    with pytest.raises(UsageError, match="--low-disk: calibrating reads every weight"):
        ee.export(vlm, out, quantize=GPTQ, low_disk=True)
    bare = tiny.make_checkpoint(tmp_path / "bare", "dense", assets=False)
    with pytest.raises(UsageError, match=r"bare: the checkpoint has no tokenizer\.json"):
        ee.export(bare, out, quantize=GPTQ)
    with pytest.raises(UsageError, match="recipe hessian: its method gptq looks at what goes into a weight"):
        ee.quantize(bare, out, recipe=GPTQ)
    assert not out.exists()


def test_prompts_are_there_where_they_are_of_use(vlm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, {"text": "words"})
    assert calibrated(Quantizer(SEARCH), vlm, None).calibration is None
    assert calibrated(Quantizer(None), vlm, None).calibration is None
    mine, own = calibrated(Quantizer(SEARCH), vlm, path), calibrated(Quantizer(GPTQ), vlm, None)
    assert "the 78 prompts of the default set are used" in caplog.text
    assert mine.calibration is not None
    assert own.calibration is not None
    assert mine.calibration.prompts.name == "mine.jsonl"
    assert "calibrated on mine.jsonl" in mine.fingerprint
    assert mine.fingerprint != calibrated(Quantizer(SEARCH), vlm, write(tmp_path, {"text": "other"})).fingerprint


def test_text_and_images_count_the_same() -> None:
    def prompt(*ids: int) -> Prompt:
        return Prompt(np.array(ids))

    mixed = token_weights(PromptSet("mixed", (prompt(9, 67, 67, 67), prompt(9, 9, 9)), (67,)))
    np.testing.assert_allclose(mixed[0], [1 / 8, 1 / 6, 1 / 6, 1 / 6])
    np.testing.assert_allclose(mixed[1], [1 / 8] * 3)
    (text,) = token_weights(PromptSet("text", (prompt(9, 8, 7, 6),), (67,)))
    np.testing.assert_allclose(text, [1 / 4] * 4)
