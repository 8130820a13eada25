"""The demonstration checkpoint: complete, loadable by transformers with equal results, and it reads its images."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from benchmarks.reading import PROMPT, held_out_lines, read
from exaone_export.demo import INSTRUCTION, Sample, checkpoint_folder, samples
from exaone_export.demo.tasks import LEVELS
from exaone_export.demo.texts import is_held_out
from model.exaone import Exaone
from model.load import load_exaone
from tests import outliers
from training import make_images
from training.make_tokenizer import CONTROL, MARKUP
from training.pixels import to_patches

FOLDER = checkpoint_folder()
IMAGE = 67


@pytest.fixture(scope="module")
def model() -> Exaone:
    return load_exaone(FOLDER)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(FOLDER)


def _pixels(path: Path, processor: Any) -> np.ndarray[Any, Any]:
    """The image as the processor resizes it, uint8 [H, W, 3]."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    _, rows, columns = processor(rgb, return_tensors="np")["image_grid_thw"][0].tolist()
    return np.array(rgb.resize((columns * 14, rows * 14), Image.Resampling.BICUBIC))


def test_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20e6


@pytest.mark.parametrize("text", ["Hello, World! $12.50", "너가 얼마나 대단한지", "a\n\nb\t 😀", "Read the text", ""])
def test_tokenizer_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_keeps_control_tokens_and_digits_single(tokenizer: Tokenizer) -> None:
    for number, name in (CONTROL | MARKUP).items():
        assert tokenizer.encode(name, add_special_tokens=False).ids == [number]
    assert len(tokenizer.encode("2026", add_special_tokens=False).ids) == 4
    assert len(tokenizer.encode("한", add_special_tokens=False).ids) == 3


def test_training_cuts_patches_as_the_processor(processor: Any) -> None:
    pixels = _pixels(samples()[0].paths[0], processor)
    expected = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"].reshape(-1, 3, 2, 196)
    found = to_patches(pixels[None])[0].view(-1, 3, 196).numpy()
    assert np.abs(expected - found[:, :, None]).max() < 1e-6


def test_transformers_computes_the_same(model: Exaone, tokenizer: Tokenizer, processor: Any) -> None:
    from transformers import AutoModelForImageTextToText

    reference = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with Image.open(samples()[0].paths[0]) as image:
        inputs = processor(image, return_tensors="pt")
    ids = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    at = ids.index(IMAGE)
    tokens = int(inputs["image_grid_thw"].prod()) // 4
    input_ids = torch.tensor([ids[:at] + [IMAGE] * tokens + ids[at + 1 :] + [172, 201, 208]])
    with torch.no_grad():
        expected = reference(
            input_ids=input_ids,
            mm_token_type_ids=(input_ids == IMAGE).int(),
            attention_mask=torch.ones_like(input_ids),
            **inputs,
        ).logits
        found = model(input_ids, inputs["pixel_values"], inputs["image_grid_thw"])[0]
    assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


LINES = [sample for sample in samples() if sample.task == "line"]


@pytest.mark.parametrize("sample", LINES, ids=lambda sample: sample.paths[0].stem)
def test_bundled_images_are_read(model: Exaone, tokenizer: Tokenizer, processor: Any, sample: Sample) -> None:
    assert sample.prompt == INSTRUCTION
    assert read(model, tokenizer, _pixels(sample.paths[0], processor)[None], PROMPT) == [sample.text]


def test_reasoning_comes_before_the_answer_when_asked_for(model: Exaone, tokenizer: Tokenizer, processor: Any) -> None:
    sample = samples()[0]
    prompt = PROMPT.replace("<think>\n\n</think>\n\n", "<think>\n")
    (answer,) = read(model, tokenizer, _pixels(sample.paths[0], processor)[None], prompt)
    reasoning, _, text = answer.partition("\n</think>\n\n")
    assert (reasoning, text) == ("The image shows one line.", sample.text)


def test_what_is_shown_is_held_out(tmp_path: Path) -> None:
    """All of it, whether the bundled checkpoint can do it or not; and the images are those of the program."""
    for one in make_images.entries():
        if one["task"] == "question":
            assert one["images"] == ["receipt.png"]
            assert one["answer"] in make_images.BOUGHT.json()
        else:
            assert is_held_out(one["prompt"].rpartition("\n")[0] if one["task"] == "find" else one["answer"])
    assert {one["task"] for one in make_images.entries()} == set(LEVELS) - {"copy"}


def test_images_are_what_the_program_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", str(tmp_path)])
    make_images.main()
    bundled = samples()[0].paths[0].parent
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in bundled.iterdir()}
    assert (tmp_path / "expected.json").read_text() == (bundled / "expected.json").read_text()
    for path in tmp_path.glob("*.png"):
        assert np.array_equal(np.array(Image.open(path)), np.array(Image.open(bundled / path.name)))


def test_outliers_leave_the_checkpoint_as_it_is(model: Exaone, tmp_path: Path) -> None:
    spiked = load_exaone(outliers.write_checkpoint(FOLDER, tmp_path / "spiked", exponent=6))
    name = "decoder.layers.0.mlp.up_proj.weight"
    plain, changed = (one.get_parameter(name) for one in (model, spiked))
    assert int((changed == 64 * plain).all(1).sum()) == 4
    ids = torch.tensor([[51, 210, 150, 151, 152, 53, 52]])
    with torch.no_grad():
        assert torch.equal(model(ids)[0], spiked(ids)[0])


def test_held_out_lines_are_held_out_and_reproducible() -> None:
    lines = [(line.kind, line.text) for line in held_out_lines(40, 1)]
    assert lines == [(line.kind, line.text) for line in held_out_lines(40, 1)]
    assert all(is_held_out(text) for _, text in lines)
    assert len({kind for kind, _ in lines}) == 8
