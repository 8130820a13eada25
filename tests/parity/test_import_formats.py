"""Every quantized format, as an independent writer writes it: the bundle holds its codes and computes its model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import exaone_export as ee
from model.load import load_exaone
from tests.parity.imported import (
    Imported,
    exact_import,
    greedy,
    stored_weight,
    token_ids,
    traced_once,
    transformers_model,
)
from tests.quantized_writers import FORMATS

WINDOW, COUNT = 8, 8
METHODS = {"compressed": "imported:compressed-tensors", "awq": "imported:awq", "gptq": "imported:gptq"}


@pytest.fixture(scope="module")
def traced() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest, traced: None, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return exact_import(tmp_path_factory.mktemp("case"), request.param, "hybrid")


def form_of(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["case"])


def test_the_manifest_says_what_was_repacked(case: Imported, request: pytest.FixtureRequest) -> None:
    form, manifest = form_of(request), case.manifest
    assert len(case.checkpoint.layers) == 14
    for name, layer in case.checkpoint.layers.items():
        weight = manifest.weights[name.replace("model.", "decoder.", 1)]
        if layer.grid is None:
            assert (weight.bits, weight.method) == (0, "")
            assert weight.reason.startswith("dequantized: ")
            assert "f8_e4m3" in weight.reason
        else:
            assert (weight.bits, weight.method) == (layer.grid.bits, METHODS[form.partition("-")[0]])
            ordered = ", its columns in the order of their groups" if form.endswith("actorder") else ""
            assert weight.reason == f"repacked exactly{ordered}"
    assert manifest.weights["decoder.lm_head"].bits == 0
    assert not manifest.weights["decoder.lm_head"].reason
    repacked = any(layer.grid for layer in case.checkpoint.layers.values())
    assert manifest.recipe == ("imported" if repacked else "none")
    assert manifest.source["quantization"]


def test_the_bundle_holds_what_was_written(case: Imported) -> None:
    for name, layer in case.checkpoint.layers.items():
        module = name.removeprefix("model.")
        if layer.grid is None:
            found = case.decoder.weight(f"{module}.weight")
            assert found is not None
            assert np.array_equal(found.T, layer.weight), name
            continue
        grid, stored = layer.grid, stored_weight(case.decoder, module)
        assert case.decoder.weight(f"{module}.weight") is None
        assert np.array_equal(stored.codes, grid.codes), name
        assert np.array_equal(stored.scales, grid.scales[:, grid.groups]), name
        assert np.array_equal(stored.zero_points, grid.zero_points[:, grid.groups]), name


def test_columns_are_put_in_order_once_for_all_that_read_them(case: Imported, request: pytest.FixtureRequest) -> None:
    form = form_of(request)
    plain = 3  # the graph has its own: the embedding and the last positions
    # Two layers: in front of query, key and value; of the output; of gate and up; of down.
    assert case.decoder.count("Gather") == plain + (2 * 4 if form.endswith("actorder") else 0)


def test_the_eager_model_has_the_dequantized_weights(case: Imported) -> None:
    found = load_exaone(case.checkpoint.folder).state_dict()
    expected = load_exaone(case.checkpoint.plain).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_it_computes_what_the_dequantized_weights_do(case: Imported) -> None:
    reference = transformers_model(case.checkpoint.plain)
    ids = token_ids(5 * WINDOW)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    with ee.Engine.load(case.bundle) as engine:
        np.testing.assert_allclose(engine.logits(ids), expected, atol=1e-4, rtol=0)
        found = engine.generate_ids(ids, do_sample=False, max_new_tokens=COUNT)
    assert found.token_ids == greedy(reference, ids, len(found.token_ids))
