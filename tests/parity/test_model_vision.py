"""The vision encoder and the merge against transformers, on grids that no window divides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.exaone import Exaone
from tests import oracle

TOLERANCE = 1e-4
Grids = list[tuple[int, int, int]]
GRIDS: dict[str, Grids] = {
    "smallest": [(1, 2, 2)],
    "8x12": [(1, 8, 12)],
    "tall": [(1, 34, 10)],
    "14x22": [(1, 14, 22)],
    "exact_windows": [(1, 16, 24)],
    "two_images": [(1, 8, 12), (1, 14, 22)],
    "three_images": [(1, 2, 2), (1, 34, 10), (1, 4, 18)],
    "video": [(2, 6, 10)],
    "video_and_image": [(3, 10, 8), (1, 4, 6)],
}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Exaone]:
    reference = oracle.reference(oracle.VLM)
    return reference, oracle.ours(reference, oracle.VLM)


@pytest.fixture(scope="module", params=["grouped", "equal_heads", "wide_windows", "all_windows"])
def vision_pair(request: pytest.FixtureRequest) -> tuple[Any, Exaone]:
    changes: dict[str, dict[str, Any]] = {
        "grouped": {},
        "equal_heads": {"num_key_value_heads": 4},
        "wide_windows": {"window_size": 168, "hidden_size": 96},  # 12 patches, 6 merged units
        "all_windows": {"fullatt_block_indexes": []},
    }
    raw = oracle.VLM | {"vision_config": oracle.VISION | changes[request.param]}
    reference = oracle.reference(raw, seed=1)
    return reference, oracle.ours(reference, raw)


@pytest.mark.parametrize("name", GRIDS)
def test_image_features(vision_pair: tuple[Any, Exaone], name: str) -> None:
    reference, model = vision_pair
    assert model.vision_encoder is not None
    pixels, grid = oracle.random_pixels(GRIDS[name])
    expected = reference.model.visual(pixels, grid_thw=grid).pooler_output
    torch.testing.assert_close(model.vision_encoder(pixels, grid), expected, atol=TOLERANCE, rtol=0)


def test_an_image_does_not_change_with_its_neighbours(pair: tuple[Any, Exaone]) -> None:
    _, model = pair
    assert model.vision_encoder is not None
    pixels, grid = oracle.random_pixels([(1, 14, 22), (1, 8, 12)])
    both = model.vision_encoder(pixels, grid)
    alone = model.vision_encoder(pixels[14 * 22 :], grid[1:])
    torch.testing.assert_close(both[14 * 22 // 4 :], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["smallest", "8x12", "tall", "14x22", "two_images"])
def test_prompt_with_images(pair: tuple[Any, Exaone], name: str) -> None:
    reference, model = pair
    pixels, grid = oracle.random_pixels(GRIDS[name])
    pieces = [oracle.random_ids(5, seed=1)]
    for i, size in enumerate(GRIDS[name]):
        pieces += [torch.full((1, oracle.placeholders(size)), oracle.IMAGE_TOKEN), oracle.random_ids(3 + i, seed=i)]
    ids = torch.cat(pieces, dim=1)
    expected = reference(input_ids=ids, pixel_values=pixels, image_grid_thw=grid).logits
    torch.testing.assert_close(model(ids, pixels, grid)[0], expected, atol=TOLERANCE, rtol=0)


def test_prompt_with_a_video(pair: tuple[Any, Exaone]) -> None:
    reference, model = pair
    size = (2, 6, 10)
    pixels, grid = oracle.random_pixels([size])
    frames = torch.full((1, oracle.placeholders(size)), oracle.VIDEO_TOKEN)
    ids = torch.cat([oracle.random_ids(4), frames, oracle.random_ids(4, seed=2)], dim=1)
    expected = reference(input_ids=ids, pixel_values_videos=pixels, video_grid_thw=grid).logits
    torch.testing.assert_close(model(ids, pixels, grid)[0], expected, atol=TOLERANCE, rtol=0)


def test_a_text_prompt_needs_no_image(pair: tuple[Any, Exaone]) -> None:
    reference, model = pair
    ids = oracle.random_ids(9)
    torch.testing.assert_close(model(ids)[0], reference(input_ids=ids).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"window_size": 56}, {"fullatt_block_indexes": [1]}], ids=lambda wrong: next(iter(wrong))
)
def test_the_comparison_notices_a_wrong_model(pair: tuple[Any, Exaone], wrong: dict[str, Any]) -> None:
    reference, _ = pair
    changed = oracle.ours(reference, oracle.VLM | {"vision_config": oracle.VISION | wrong}).vision_encoder
    assert changed is not None
    pixels, grid = oracle.random_pixels([(1, 14, 22)])
    expected = reference.model.visual(pixels, grid_thw=grid).pooler_output
    assert (changed(pixels, grid) - expected).abs().max() > 10 * TOLERANCE


def test_golden_image_features() -> None:
    golden = np.load(oracle.TINY45 / "generate_golden.npz")
    model = oracle.tiny45()
    assert model.vision_encoder is not None
    pixels = oracle.golden_pixels()
    np.testing.assert_allclose(pixels[: len(golden["pixel_values"])], golden["pixel_values"], atol=1e-6)
    features = model.vision_encoder(torch.from_numpy(pixels), torch.from_numpy(golden["grid_thw"]))
    np.testing.assert_allclose(features.numpy(), golden["image_features"], atol=TOLERANCE)
