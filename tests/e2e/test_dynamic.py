"""Bundles whose products are computed in integers: close to the float ones, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exaone_export as ee
from exporter.export import Policy, rewrite_bundle
from model.bundle import read_manifest
from quantize.apply import Quantizer
from quantize.recipe import load_recipe
from runtime.engine import Engine
from tests import tiny
from tests.e2e.conftest import KINDS, Bundles
from tests.unit.onnx_kernels import Array, relative_error

RECIPE = "int8-dynamic"
IDS = [1, *np.random.default_rng(0).integers(100, 500, 40).tolist()]


def logits(bundle: Path, ids: list[int] = IDS) -> Array:
    with Engine.load(bundle, "cpu") as engine:
        return engine.logits(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_close(bundles: Bundles, kind: str) -> None:
    plain, given = (logits(bundles.bundle(kind, recipe)) for recipe in ("none", RECIPE))
    # A wrong scale of any one layer gives more than 0.2.
    assert 1e-3 < relative_error(given, plain) < 0.06


def test_image_tokens_point_the_same_way(bundles: Bundles) -> None:
    grid = np.array([[1, 10, 6]])
    pixels = np.random.default_rng(1).standard_normal((60, 1176)).astype(np.float32)
    features = []
    for recipe in ("none", RECIPE):
        with Engine.load(bundles.bundle("vlm", recipe), "cpu") as engine:
            features.append(engine.graphs.encode(pixels, grid, 15).astype(np.float64))
    plain, given = features
    cosines = (plain * given).sum(-1) / (np.linalg.norm(plain, axis=-1) * np.linalg.norm(given, axis=-1))
    # Blocks as narrow as these even less out than real ones, of which benchmarks/vision.py tells.
    assert cosines.min() > 0.99


def test_a_token_is_decoded_as_in_its_prompt(bundles: Bundles) -> None:
    folder = bundles.bundle("hybrid", RECIPE)
    whole = logits(folder)
    with Engine.load(folder, "cpu") as engine:
        forward = engine.graphs.forward(1, None, len(IDS))
        steps = [forward(np.array([[token]]), np.array([i + 1]), keep=0)[0][-1].copy() for i, token in enumerate(IDS)]
    # Every row has its own scale; what differs are codes of values that lie half way between two.
    assert relative_error(np.array(steps), whole) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_later_changes_nothing_before_it(bundles: Bundles, kind: str) -> None:
    folder = bundles.bundle(kind, RECIPE)
    # One scale for all tokens of a prompt would let the last one change what the first ones give.
    assert relative_error(logits(folder, IDS[:9]), logits(folder)[:9]) < 1e-3


@pytest.mark.parametrize("kind", ["dense", "vlm"])
def test_a_checkpoint_and_its_float_bundle_give_the_same_bytes(bundles: Bundles, tmp_path: Path, kind: str) -> None:
    ee.export(bundles.source(kind), tmp_path / "out", quantize=RECIPE, threads=2)
    for file in bundles.bundle(kind, RECIPE).glob("*.data"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_an_interrupted_rewrite_goes_on(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, wanted = bundles.bundle("dense"), bundles.bundle("dense", RECIPE)
    broken = Quantizer(load_recipe(RECIPE))
    with monkeypatch.context() as patch:
        count = 0

        def failing(*arguments: Any) -> None:
            nonlocal count
            count += 1
            if count > 5:
                raise KeyboardInterrupt
            original(*arguments)

        from quantize.columns import ColumnWeight

        original = ColumnWeight.write_codes
        patch.setattr(ColumnWeight, "write_codes", failing)
        with pytest.raises(KeyboardInterrupt):
            rewrite_bundle(source, tmp_path / "out", broken, Policy(False, False, True))
    rewrite_bundle(source, tmp_path / "out", broken, Policy(False, True, True))
    for file in wanted.glob("*.data"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_the_manifest_and_the_card_say_so(bundles: Bundles) -> None:
    folder = bundles.bundle("dense", RECIPE)
    manifest = read_manifest(folder)
    up = manifest.weights["decoder.layers.0.mlp.up_proj"]
    assert (up.bits, up.block_size, up.activations) == (8, 64, "int8")
    down = manifest.weights["decoder.layers.0.mlp.down_proj"]
    assert (down.activations, down.rotate, up.rotate) == ("int8", 64, 0)
    assert manifest.weights["decoder.embed_tokens"].activations == "float"
    assert "activations int8, one scale a row |" in (folder / "README.md").read_text()
    assert "activations int8, one scale a row, rotated by 64 |" in (folder / "README.md").read_text()
    listed = json.loads((folder / "exaone_export.json").read_text())["weights"]
    assert [path for path, entry in listed.items() if "rotate" in entry] == [
        path for path in listed if path.endswith(".down_proj")
    ]
    assert any("rotated by 64" in scheme for scheme in ee.inspect(folder).quantized)
    assert "--quantize int8-dynamic" in (folder / "README.md").read_text()


def test_the_tied_table_is_stored_once(bundles: Bundles) -> None:
    sizes = {
        recipe: (bundles.bundle("dense", recipe) / "decoder.onnx.data").stat().st_size for recipe in ("none", RECIPE)
    }
    rows = tiny.VOCABULARY * 64
    assert sizes[RECIPE] < sizes["none"] / 4 + rows / 4
