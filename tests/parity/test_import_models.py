"""Quantized checkpoints of every architecture: images, tied and quantized heads, draft head, recipes on top, shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import exaone_export as ee
from model.load import load_exaone
from quantize.recipe import Recipe, Rule
from tests import tiny
from tests.parity.imported import (
    SHAPES,
    Imported,
    exact_import,
    greedy,
    stored_weight,
    token_ids,
    traced_once,
    transformers_model,
)
from tests.quantized_writers import FORMATS, QuantizedCheckpoint, compressed_integers, make_quantized
from tests.quantized_writers_packing import AnyArray

WINDOW, COUNT = 8, 8
IMAGE = tiny.SPECIAL["<|image_pad|>"]
GRID = (1, 6, 4)


@pytest.fixture(scope="module", autouse=True)
def traced() -> Iterator[None]:
    with traced_once():
        yield


def image_prompt() -> list[int]:
    return [*token_ids(4), *[IMAGE] * (GRID[1] * GRID[2] // 4), *token_ids(5 * WINDOW, seed=1)]


def pixels() -> tuple[AnyArray, AnyArray]:
    values = np.random.default_rng(3).standard_normal((GRID[1] * GRID[2], 1176)).astype(np.float32)
    return values, np.array([GRID])


def bundle_logits(engine: ee.Engine, ids: list[int], features: AnyArray) -> AnyArray:
    forward = engine.graphs.forward(1, features, len(ids))
    found: AnyArray = forward(np.array([ids]), np.array([len(ids)]), keep=0)[0]
    return found


# The official AWQ of EXAONE 4.5; act-order; 8-bit floats


@pytest.mark.parametrize("form", ["compressed-int4-g128", "gptq-int4-g32-asym-actorder", "fp8-block-bf16"])
def test_images_and_text(tmp_path: Path, form: str) -> None:
    case = exact_import(tmp_path, form, "vlm")
    reference = transformers_model(case.checkpoint.plain)
    ids, (patches, grid) = image_prompt(), pixels()
    media = {"pixel_values": torch.from_numpy(patches), "image_grid_thw": torch.from_numpy(grid)}
    with torch.inference_mode():
        features = reference.model.visual(media["pixel_values"], grid_thw=media["image_grid_thw"]).pooler_output
        expected = reference(input_ids=torch.tensor([ids]), **media).logits[0].numpy()
    with ee.Engine.load(case.bundle) as engine:
        found = engine.graphs.encode(patches, grid, ids.count(IMAGE))
        np.testing.assert_allclose(found, features.numpy(), atol=1e-4, rtol=0)
        np.testing.assert_allclose(bundle_logits(engine, ids, found), expected, atol=1e-4, rtol=0)
        text = token_ids(9)
        tokens = engine.generate_ids(text, do_sample=False, max_new_tokens=COUNT).token_ids
        assert tokens == greedy(reference, text, len(tokens))
    untouched = [path for path in case.manifest.weights if path.startswith(("vision_encoder.", "mtp.", "embedding."))]
    assert untouched
    assert not any(case.manifest.weights[path].bits or case.manifest.weights[path].reason for path in untouched)
    assert all(name.startswith("model.language_model.layers.") for name in case.checkpoint.layers)


def test_verify_compares_with_the_quantized_source(tmp_path: Path) -> None:
    case = exact_import(tmp_path, "compressed-int4-g128", "vlm")
    found = ee.verify(case.bundle, source=case.checkpoint.folder)
    assert found.ok, found.problems
    assert found.parity is not None
    assert set(found.parity) == {"vision_encoder", "embedding", "decoder", "mtp"}
    assert all(figures["max_abs_error"] < 1e-3 for figures in found.parity.values())
    card = (case.bundle / "README.md").read_text()
    assert "taken over from the source (compressed-tensors)" in card
    assert "base_model_relation: quantized" in card or "base_model:" not in card
    assert "| positions scored |" in card


KEEP_FLOAT = Recipe("keep", (Rule("*", None),))


@pytest.mark.parametrize("recipe", [None, KEEP_FLOAT])
def test_a_recipe_lets_the_kernels_round_activations(
    tmp_path: Path, recipe: Recipe | None, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = make_quantized(tmp_path, FORMATS["compressed-int4-g128"], "vlm", **SHAPES["vlm"])
    report = ee.export(checkpoint.folder, tmp_path / "bundle", quantize=recipe)
    case = Imported(checkpoint, tmp_path / "bundle")
    assert report.recipe == ("imported" if recipe is None else "keep")
    assert ("computed exactly, which is slow" in caplog.text) == (recipe is None)
    module = "layers.1.mlp.down_proj"
    grid = checkpoint.layers[f"model.language_model.{module}"].grid
    assert grid is not None
    assert np.array_equal(stored_weight(case.decoder, module).codes, grid.codes)
    ids = token_ids(5 * WINDOW)
    with torch.inference_mode():
        expected = transformers_model(checkpoint.plain)(torch.tensor([ids])).logits[0].numpy()
    with ee.Engine.load(case.bundle) as engine:
        found = engine.logits(ids)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if recipe is None:
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.array_equal(found.argmax(-1), expected.argmax(-1))
    else:
        # int8 activations add about half a percent to each product, and there are fourteen in a row.
        assert 1e-5 < error < 0.05
        assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9


# Everything quantized, draft head and vision encoder included


def test_a_checkpoint_with_every_layer_quantized(tmp_path: Path) -> None:
    form = compressed_integers(4, 32, symmetric=False)
    checkpoint = make_quantized(tmp_path, form, "vlm", keep=lambda name: False, **SHAPES["vlm"])
    assert {"lm_head", "mtp.fc", "model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.2"} <= set(
        checkpoint.layers
    )
    report = ee.export(checkpoint.folder, tmp_path / "bundle")
    floats = {path for path, weight in report.weights.items() if not weight.bits}
    assert {path.rpartition(".")[2] for path in floats} == {"embed_tokens", "proj"}  # the table, and the patches
    found = ee.verify(tmp_path / "bundle", source=checkpoint.folder)
    assert found.ok
    assert found.parity is not None
    assert all(figures["cosine"] > 0.99 for figures in found.parity.values())


# Tied embedding


@pytest.mark.parametrize("form", ["awq-g32", "compressed-int8-bytes"])
def test_a_tied_model(tmp_path: Path, form: str) -> None:
    case = exact_import(tmp_path, form, "dense")
    reference = transformers_model(case.checkpoint.plain)
    ids = token_ids(3 * WINDOW)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    with ee.Engine.load(case.bundle) as engine:
        np.testing.assert_allclose(engine.logits(ids), expected, atol=1e-4, rtol=0)
    assert not case.manifest.weights["decoder.embed_tokens"].bits


def test_a_recipe_quantizes_what_is_still_float(tmp_path: Path) -> None:
    checkpoint = make_quantized(tmp_path, FORMATS["awq-g32"], "dense", **SHAPES["dense"])
    report = ee.export(checkpoint.folder, tmp_path / "bundle", quantize="int8")
    weights = report.weights
    assert (weights["decoder.embed_tokens"].bits, weights["decoder.lm_head"].bits) == (8, 8)
    layers = [weight for path, weight in weights.items() if ".layers." in path]
    assert all((weight.bits, weight.method) == (4, "imported:awq") for weight in layers)
    eight = make_quantized(tmp_path / "8", FORMATS["fp8-tensor"], "dense", **SHAPES["dense"])
    report = ee.export(eight.folder, tmp_path / "8" / "bundle", quantize="int8")
    layers = [weight for path, weight in report.weights.items() if ".layers." in path]
    assert all((weight.bits, weight.method) == (8, "rtn") for weight in layers)
    assert all(weight.reason.startswith("dequantized: ") for weight in layers)


# The same checkpoint in other files


def same_model(checkpoint: QuantizedCheckpoint, folder: Path) -> None:
    expected = load_exaone(checkpoint.plain).state_dict()
    found = load_exaone(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_layers_tensors_may_lie_in_several_shards(tmp_path: Path) -> None:
    checkpoint = make_quantized(tmp_path, FORMATS["gptq-int4-g32-asym-actorder"], "dense", **SHAPES["dense"])
    sharded = shutil.copytree(checkpoint.folder, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    tiny.save_tensors(sharded, stored_tensors(checkpoint), shards=5)
    same_model(checkpoint, sharded)
    ee.export(sharded, tmp_path / "bundle")
    case = Imported(checkpoint, tmp_path / "bundle")
    for name, layer in checkpoint.layers.items():
        stored, grid = stored_weight(case.decoder, name.removeprefix("model.")), layer.grid
        assert grid is not None
        assert np.array_equal(stored.codes, grid.codes), name
        assert np.array_equal(stored.scales, grid.scales[:, grid.groups]), name


def stored_tensors(checkpoint: QuantizedCheckpoint) -> dict[str, AnyArray]:
    from safetensors.numpy import load_file

    return dict(load_file(checkpoint.folder / "model.safetensors"))


@pytest.mark.parametrize("place", ["text_config", "compression_config", "quantize_config.json"])
def test_the_configuration_may_stand_elsewhere(tmp_path: Path, place: str) -> None:
    form, kind = {
        "text_config": ("compressed-int4-g128-asym", "vlm"),
        "compression_config": ("compressed-int4-g32", "dense"),
        "quantize_config.json": ("gptq-int4-g128", "dense"),
    }[place]
    checkpoint = make_quantized(tmp_path, FORMATS[form], kind, **SHAPES[kind])
    raw = json.loads((checkpoint.folder / "config.json").read_text())
    quantization = raw.pop("quantization_config")
    if place.endswith(".json"):
        del quantization["quant_method"]
        (checkpoint.folder / place).write_text(json.dumps(quantization))
    elif place == "text_config":
        raw[place]["quantization_config"] = quantization
    else:
        raw[place] = quantization
    (checkpoint.folder / "config.json").write_text(json.dumps(raw))
    same_model(checkpoint, checkpoint.folder)
