"""A real bundle in the runtime: the golden checkpoint's own numbers, and faults that come while running."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.export import export_checkpoint
from model.bundle import MANIFEST, file_sha256
from model.errors import BundleError, NumericalError, ResourceError
from runtime import memory
from runtime.engine import Engine
from runtime.options import GenerationOptions
from tests.e2e.conftest import Bundles
from tests.oracle import TINY45

GREEDY = GenerationOptions(do_sample=False)
IMAGE = TINY45 / "noise_300x200.png"
COUNT = 40


@pytest.fixture(scope="module")
def tiny45(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("golden") / "bundle"
    export_checkpoint(TINY45, folder)
    with Engine.load(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(TINY45 / "generate_golden.npz") as stored:
        return {name: stored[name] for name in stored}


def test_golden_image(tiny45: Engine, golden: dict[str, Any]) -> None:
    with Image.open(IMAGE) as image:
        values, grid = tiny45.requests.image_processor(image)
    np.testing.assert_array_equal(values[: len(golden["pixel_values"])], golden["pixel_values"])
    np.testing.assert_array_equal(grid, golden["grid_thw"])
    features = tiny45.graphs.encode(values, grid, 77)
    np.testing.assert_allclose(features, golden["image_features"], atol=1e-4)


def test_golden_logits_and_ids(tiny45: Engine, golden: dict[str, Any]) -> None:
    ids = golden["input_ids"][0].tolist()
    logits = tiny45.logits(ids, [IMAGE])
    assert logits.shape == (len(ids), 160)
    np.testing.assert_allclose(logits[-1], golden["last_logits"], atol=1e-4)
    result = tiny45.generate_ids(ids, [IMAGE], options=GREEDY, max_new_tokens=len(golden["generated"]))
    assert result.token_ids == golden["generated"].tolist()
    assert (result.prompt_tokens, result.image_tokens) == (86, 77)


def test_as_many_ids_as_transformers_gives(tiny45: Engine, golden: dict[str, Any]) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(TINY45, dtype=torch.float32, attn_implementation="eager").eval()
    with Image.open(IMAGE) as image:
        values, grid = tiny45.requests.image_processor(image)
    for seed in (None, 0, 1):
        # The golden prompt, then the same image with other text around it.
        ids = golden["input_ids"][0].tolist()
        if seed is not None:
            words = np.random.default_rng(seed).integers(80, 160, 30).tolist()
            ids = [*words[:11], *ids[3:83], *words[11:]]
        given = torch.tensor([ids])
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=COUNT,
            pixel_values=torch.from_numpy(values), image_grid_thw=torch.from_numpy(grid),
        )  # fmt: skip
        result = tiny45.generate_ids(ids, [IMAGE], options=GREEDY, max_new_tokens=COUNT)
        assert result.token_ids == out[0, len(ids) :].tolist()


def test_a_batch_of_image_and_text_rows(tiny45: Engine, golden: dict[str, Any]) -> None:
    ids = golden["input_ids"][0].tolist()
    rows = [[9], ids, list(range(75, 120)), ids[1:]]
    images = [[], [IMAGE], [], [IMAGE]]
    together = tiny45.generate_ids(rows, images, options=GREEDY, max_new_tokens=20)
    for result, row, group in zip(together, rows, images, strict=True):
        alone = tiny45.generate_ids(row, group, options=GREEDY, max_new_tokens=20)
        assert (result.token_ids, result.finish_reason) == (alone.token_ids, alone.finish_reason)


def test_a_placeholder_that_the_model_writes_is_text(tiny45: Engine) -> None:
    """Whatever ids come out, the loop goes on: no feature row is needed for them."""
    wild = GenerationOptions(do_sample=True, temperature=50.0, seed=1)
    assert len(tiny45.generate_ids([9, 10], options=wild, max_new_tokens=300).token_ids) > 5


def test_plain_images_give_finite_answers(tiny45: Engine) -> None:
    for colour in ("black", "white"):
        picture = Image.new("RGB", (1, 1), colour)
        result = tiny45.generate_ids([1, 67, 67, 67, 67, 99], [picture], options=GREEDY, max_new_tokens=4)
        assert result.image_tokens == 4


def damaged(bundle: Path, tmp_path: Path, graph: str) -> Path:
    """A copy in which all weights of a graph are NaN; sizes are as before."""
    copy = tmp_path / "damaged"
    shutil.copytree(bundle, copy)
    path = copy / f"{graph}.onnx.data"
    np.full(path.stat().st_size // 4, np.nan, np.float32).tofile(path)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][f"{graph}.onnx.data"]["sha256"] = file_sha256(copy / f"{graph}.onnx.data")
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def test_nan_weights_stop_the_run(tiny45: Engine, golden: dict[str, Any], tmp_path: Path) -> None:
    ids = golden["input_ids"][0].tolist()
    with Engine.load(damaged(tiny45.graphs.folder, tmp_path, "vision_encoder")) as engine:
        with pytest.raises(NumericalError, match="image_features: NaN or Inf"):
            engine.generate_ids(ids, [IMAGE], max_new_tokens=2)
        shutil.rmtree(tmp_path / "damaged")
    with Engine.load(damaged(tiny45.graphs.folder, tmp_path, "decoder")) as engine:
        with pytest.raises(NumericalError, match="cannot choose a token"):
            engine.generate_ids([5, 6], max_new_tokens=2)


def test_a_damaged_bundle_is_refused_when_it_is_opened(tiny45: Engine, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny45.graphs.folder, copy)
    with (copy / "decoder.onnx.data").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data"):
        Engine.load(copy)
    (copy / "decoder.onnx.data").unlink()
    with pytest.raises(BundleError, match="missing"):
        Engine.load(copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(BundleError):
        Engine.load(copy)


def test_a_bundle_that_vanishes_before_its_graphs_are_read(bundles: Bundles, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundles.bundle("dense"), copy)
    with Engine.load(copy) as engine:
        shutil.rmtree(copy)
        with pytest.raises(BundleError, match="cannot run|damaged|cannot read"):
            engine.generate_ids([5])


def test_too_little_memory_is_said_before_loading(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.load(bundles.bundle("hybrid")) as engine:
        monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
        with pytest.raises(ResourceError, match="its weights take .* are available"):
            engine.generate_ids([5])
        monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 40)
        engine.open()
        monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
        with pytest.raises(ResourceError, match="tokens fit"):
            engine.generate_ids([5])


def test_passes_that_keep_one_or_all_positions_take_turns(bundles: Bundles) -> None:
    """A pass writes where the one before did, if it keeps one position; what it gives is the same."""
    ids = [3, 9, 4, 11, 8, 5, 7]
    with Engine.load(bundles.bundle("dense")) as engine:
        wanted = engine.logits(ids)
        forward, tokens, read = engine.graphs.forward(1, expected=len(ids)), np.array([ids]), 0
        for count, keep in ((2, 0), (1, 1), (1, 0), (2, 1), (1, 1)):
            stop = read + count
            found = forward(tokens[:, read:stop], np.array([stop]), keep)[0].copy()
            np.testing.assert_allclose(found, wanted[read if keep == 0 else stop - 1 : stop], rtol=1e-4, atol=1e-4)
            read = stop
        # The cache grows over buffers that are bound already.
        many = np.arange(1, 300)[None] % 50
        grown = engine.graphs.forward(1)
        grown(many[:, :250], np.array([250]))
        last = grown(many[:, 250:], np.array([many.shape[1]]))[0, 0]
        np.testing.assert_allclose(last, engine.logits(many[0].tolist())[-1], rtol=1e-3, atol=1e-3)


def test_an_abandoned_stream_leaves_the_engine_usable(bundles: Bundles) -> None:
    with Engine.load(bundles.bundle("dense")) as engine:
        wanted = engine.generate("hello", options=GREEDY, max_new_tokens=6)
        for _ in engine.stream("hello", options=GREEDY, max_new_tokens=50):
            break
        assert engine.generate("hello", options=GREEDY, max_new_tokens=6).token_ids == wanted.token_ids


def test_opening_and_closing_leaves_nothing_behind(bundles: Bundles) -> None:
    def cycle() -> int:
        with Engine.load(bundles.bundle("dense")) as engine:
            engine.generate("hello", max_new_tokens=2)
        return len(os.listdir("/proc/self/fd"))

    cycle()
    before = cycle()
    assert [cycle() for _ in range(8)][-1] <= before
