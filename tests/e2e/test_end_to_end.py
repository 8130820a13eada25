"""Checkpoint to words: exported graphs give transformers' greedy tokens, whatever the prompt, however it is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import exaone_export as ee
from model.bundle import check_sizes, file_sha256, read_manifest
from runtime.decode import generate
from runtime.options import GenerationOptions
from runtime.sampling import make_samplers
from tests.e2e.conftest import KINDS, Bundles
from tests.tiny import SPECIAL, VOCABULARY, make_checkpoint

WINDOW, COUNT = 8, 32
IMAGE = SPECIAL["<|image_pad|>"]
GREEDY = GenerationOptions(do_sample=False)
LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW)


@cache
def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    multimodal = json.loads((folder / "config.json").read_text())["model_type"] == "exaone4_5"
    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def expected_ids(folder: Path, ids: list[int], **media: Any) -> list[int]:
    """transformers' greedy tokens; the end of turn is a token like any other."""
    given = torch.tensor([ids])
    out = transformers_model(folder).generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=COUNT, eos_token_id=None, **media
    )
    found: list[int] = out[0, len(ids) :].tolist()
    assert len(found) == COUNT
    return found


def engine_ids(engine: ee.Engine, ids: list[int], images: list[Image.Image] = [], chunk: int = 512) -> list[int]:  # noqa: B006
    """The bundle's greedy tokens, the prompt read `chunk` tokens at a time."""
    features = None
    if images:
        features = np.concatenate(
            [engine.graphs.encode(px, grid, int(grid.prod()) // 4) for px, grid in patches(engine, images)]
        )
    forward = engine.graphs.forward(1, features, len(ids) + COUNT)
    steps = generate(forward, [ids], make_samplers(GREEDY, 1), [COUNT], eos_ids=(), chunk=chunk)
    return [step[0].id for step in steps]


def patches(engine: ee.Engine, images: list[Image.Image]) -> Iterator[tuple[Any, Any]]:
    processor = engine.requests.image_processor
    for image in images:
        yield processor(image)


def picture(rows: int, columns: int, seed: int = 0) -> Image.Image:
    """Noise that becomes a grid of that many patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows * 14, columns * 14, 3), np.uint8)
    return Image.fromarray(pixels)


def text(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(100, VOCABULARY, count).tolist()
    return ids


@pytest.fixture(scope="module", params=["hybrid", "dense"])
def text_model(request: pytest.FixtureRequest, bundles: Bundles) -> Iterator[tuple[Path, ee.Engine]]:
    with ee.Engine.load(bundles.bundle(request.param)) as engine:
        yield bundles.source(request.param), engine


@pytest.fixture(scope="module")
def vlm(bundles: Bundles) -> Iterator[tuple[Path, ee.Engine]]:
    with ee.Engine.load(bundles.bundle("vlm")) as engine:
        yield bundles.source("vlm"), engine


@pytest.mark.parametrize("length", LENGTHS)
def test_text_prompts(text_model: tuple[Path, ee.Engine], length: int) -> None:
    source, engine = text_model
    ids = text(length, seed=length)
    assert engine_ids(engine, ids) == expected_ids(source, ids)


@pytest.mark.parametrize("chunk", [1, 3, WINDOW, WINDOW + 1, 17])
def test_a_prompt_read_in_chunks(text_model: tuple[Path, ee.Engine], chunk: int) -> None:
    source, engine = text_model
    ids = text(5 * WINDOW, seed=99)
    assert engine_ids(engine, ids, chunk=chunk) == expected_ids(source, ids)


def test_a_batch_gives_what_each_prompt_alone_gives(text_model: tuple[Path, ee.Engine]) -> None:
    _, engine = text_model
    prompts = [text(length, seed=length) for length in (3, 5 * WINDOW, 1)]
    together = engine.generate_ids(prompts, options=GREEDY, max_new_tokens=COUNT)
    alone = [engine.generate_ids(prompt, options=GREEDY, max_new_tokens=COUNT) for prompt in prompts]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_generation_ends_where_transformers_ends(text_model: tuple[Path, ee.Engine]) -> None:
    source, engine = text_model
    for seed in range(4):
        ids = torch.tensor([text(9, seed)])
        out = transformers_model(source).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT, eos_token_id=[53, 200, 300]
        )
        wanted = out[0, 9:].tolist()
        forward = engine.graphs.forward(1, None, 9 + COUNT)
        steps = generate(forward, [ids[0].tolist()], make_samplers(GREEDY, 1), [COUNT], eos_ids=(53, 200, 300))
        assert [step[0].id for step in steps] == wanted


IMAGES: dict[str, list[tuple[int, int]]] = {
    "2x2": [(2, 2)],
    "8x12": [(8, 12)],
    "34x10": [(34, 10)],
    "14x22": [(14, 22)],
    "two": [(8, 12), (14, 6)],
    "three": [(2, 2), (34, 10), (4, 18)],
}


def image_prompt(grids: list[tuple[int, int]]) -> list[int]:
    """Text before, between and after the images."""
    ids = text(4, seed=1)
    for i, (rows, columns) in enumerate(grids):
        ids += [IMAGE] * (rows * columns // 4) + text(3 + i, seed=i)
    return ids


@pytest.mark.parametrize("name", IMAGES)
def test_image_prompts(vlm: tuple[Path, ee.Engine], name: str) -> None:
    source, engine = vlm
    grids = IMAGES[name]
    images = [picture(*grid, seed=i) for i, grid in enumerate(grids)]
    ids = image_prompt(grids)
    pixels, thw = (torch.from_numpy(np.concatenate(part)) for part in zip(*patches(engine, images), strict=True))
    assert thw.tolist() == [[1, *grid] for grid in grids]
    wanted = expected_ids(source, ids, pixel_values=pixels, image_grid_thw=thw)
    assert engine_ids(engine, ids, images) == wanted
    assert engine_ids(engine, ids, images, chunk=7) == wanted


def test_a_text_prompt_to_the_image_model(vlm: tuple[Path, ee.Engine]) -> None:
    source, engine = vlm
    ids = text(5 * WINDOW, seed=5)
    assert engine_ids(engine, ids) == expected_ids(source, ids)


def test_two_images_with_text_around_them_from_messages(vlm: tuple[Path, ee.Engine]) -> None:
    source, engine = vlm
    images = [picture(8, 12), picture(14, 6, seed=1)]
    parts = [
        {"type": "text", "text": "before"},
        {"type": "image"},
        {"type": "text", "text": "between"},
        {"type": "image"},
    ]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "뒤"}]}]
    prompt = engine.prompt(messages, images)
    assert prompt.image_tokens == 24 + 21
    pixels, thw = (torch.from_numpy(np.concatenate(part)) for part in zip(*patches(engine, images), strict=True))
    wanted = expected_ids(source, list(prompt.token_ids), pixel_values=pixels, image_grid_thw=thw)
    result = engine.generate(messages, images, options=GREEDY, max_new_tokens=COUNT)
    assert result.token_ids == wanted[: len(result.token_ids)]
    assert result.finish_reason == "stop" or len(result.token_ids) == COUNT
    assert result.image_tokens == prompt.image_tokens


@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_bundles_run_and_are_smaller(bundles: Bundles, kind: str, recipe: str) -> None:
    folder = bundles.bundle(kind, recipe)
    manifest, plain = read_manifest(folder), read_manifest(bundles.bundle(kind))
    check_sizes(folder, manifest)
    assert manifest.recipe == recipe
    assert {weight.bits for weight in manifest.weights.values()} <= {0, 4, 8}
    assert manifest.weights["decoder.layers.0.mlp.up_proj"].bits == int(recipe[3:])
    sizes = [sum(info.size for name, info in m.files.items() if name.endswith(".data")) for m in (manifest, plain)]
    assert sizes[0] < sizes[1] / 2
    images = [picture(8, 12)] if kind == "vlm" else []
    with ee.load(folder) as engine:
        result = engine.generate("무엇이 보이나요?", images, options=GREEDY, max_new_tokens=8)
    assert 1 <= len(result.token_ids) <= 8


def test_int8_stays_close_to_float(bundles: Bundles) -> None:
    ids = text(20, seed=3)
    with ee.load(bundles.bundle("vlm")) as plain, ee.load(bundles.bundle("vlm", "int8")) as small:
        a, b = plain.logits(ids), small.logits(ids)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() > 0.98


def test_quantizing_a_bundle_gives_the_bytes_of_quantizing_on_the_way(bundles: Bundles, tmp_path: Path) -> None:
    later = bundles.bundle("hybrid", "int4")
    ee.export(bundles.source("hybrid"), tmp_path / "at once", quantize="int4")
    for name in read_manifest(later).files:
        assert file_sha256(tmp_path / "at once" / name) == file_sha256(later / name), name


def test_exporting_twice_gives_the_same_bytes(bundles: Bundles, tmp_path: Path) -> None:
    ee.export(bundles.source("dense"), tmp_path / "again")
    assert (tmp_path / "again" / "exaone_export.json").read_bytes() == (
        bundles.bundle("dense") / "exaone_export.json"
    ).read_bytes()


def test_one_file_or_shards_make_no_difference(bundles: Bundles, tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", "hybrid", seed=7)
    assert len(list(bundles.source("hybrid").glob("*.safetensors"))) == 3
    ee.export(whole, tmp_path / "out")
    ids = text(23)
    with ee.load(tmp_path / "out") as one, ee.load(bundles.bundle("hybrid")) as other:
        # Weights lie in the order of the source's files; what they compute is the same to the last bit.
        np.testing.assert_array_equal(one.logits(ids), other.logits(ids))


def test_a_bundle_can_be_moved_and_made_read_only(bundles: Bundles, tmp_path: Path) -> None:
    ids = text(9)
    with ee.load(bundles.bundle("vlm", "int4")) as engine:
        wanted = engine.generate_ids(ids, options=GREEDY, max_new_tokens=8).token_ids
    moved = tmp_path / "옮긴 묶음 (2)"
    shutil.copytree(bundles.bundle("vlm", "int4"), moved)
    for path in moved.iterdir():
        path.chmod(0o444)
    moved.chmod(0o555)
    link = tmp_path / "link"
    link.symlink_to(moved)
    try:
        for folder in (moved, link):
            with ee.load(folder) as engine:
                assert engine.generate_ids(ids, options=GREEDY, max_new_tokens=8).token_ids == wanted
    finally:
        moved.chmod(0o755)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "exaone_export", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_command_line_from_checkpoint_to_answer(bundles: Bundles, tmp_path: Path) -> None:
    """Everything once as a user would; the answers are those of the Python API."""
    out = tmp_path / "bundle"
    made = command("export", bundles.source("hybrid"), out, "--quantize", "int8", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["recipe"] == "int8"
    dry = command("generate", out, "Hello", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    answered = command("generate", out, "Hello", "--greedy", "--max-new-tokens", "8", "--json")
    assert answered.returncode == 0, answered.stderr
    result = json.loads(answered.stdout)
    with ee.load(out) as engine:
        prompt = engine.prompt("Hello")
        expected = engine.generate("Hello", options=GREEDY, max_new_tokens=8)
    rendered = json.loads(dry.stdout)
    assert (rendered["prompt"], rendered["prompt_token_ids"]) == (prompt.text, list(prompt.token_ids))
    assert result["token_ids"] == expected.token_ids
    assert result["text"] == expected.text
    assert result["prompt_tokens"] == len(prompt.token_ids)
    assert set(result) >= {"text", "reasoning", "tool_calls", "token_ids", "prompt_tokens", "image_tokens",
                           "finish_reason", "ep", "timings"}  # fmt: skip
    assert result["ep"] == "cpu"
