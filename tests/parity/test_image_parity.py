"""Bit for bit the patches of transformers' Qwen2VLImageProcessorPil."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.config import VisionConfig
from runtime.image import ImageProcessor

oracle = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

VISION = VisionConfig(
    depth=1, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, patch_size=14, spatial_merge_size=2,
    temporal_patch_size=2, window_size=112, fullatt_block_indexes=(0,), out_hidden_size=64, in_channels=3,
    rope_theta=1e4,
)  # fmt: skip
SIZES = [
    (1, 1), (1, 2), (1, 200), (200, 1), (13, 2600), (27, 27), (28, 28), (29, 29), (41, 43), (42, 42), (55, 57),
    (56, 56), (70, 98), (98, 70), (126, 154), (200, 300), (223, 225), (333, 77), (448, 448), (449, 447),
    (500, 501), (640, 1000), (1003, 997), (20, 1601),
]  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {"size": {"shortest_edge": 3136, "longest_edge": 200704}},
    {"min_pixels": 784, "max_pixels": 50176},
    {"size": {"shortest_edge": 3136, "longest_edge": 200704}, "resample": 2, "image_mean": [0.5, 0.4, 0.3]},
    {"size": {"shortest_edge": 3136, "longest_edge": 200704}, "do_normalize": False},
    {"size": {"shortest_edge": 3136, "longest_edge": 200704}, "do_rescale": False, "rescale_factor": 0.25},
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_every_size(config: dict[str, Any]) -> None:
    random = np.random.default_rng(5)
    theirs, ours = oracle.Qwen2VLImageProcessorPil(**config), ImageProcessor.from_config(config, VISION)
    for height, width in SIZES:
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = theirs(picture, return_tensors="np")
        values, grid = ours(picture)
        np.testing.assert_array_equal(grid, expected["image_grid_thw"])
        np.testing.assert_array_equal(values, expected["pixel_values"], err_msg=f"{height}x{width}")
        assert values.dtype == expected["pixel_values"].dtype
        assert ours.patch_count(height, width) == theirs.get_number_of_image_patches(height, width)


def test_the_published_bounds() -> None:
    config = {"min_pixels": 3136, "max_pixels": 3211264}
    random = np.random.default_rng(6)
    picture = Image.fromarray(random.integers(0, 256, (1900, 1800, 3), dtype=np.uint8))
    expected = oracle.Qwen2VLImageProcessorPil(**config)(picture, return_tensors="np")
    values, grid = ImageProcessor.from_config(config, VISION)(picture)
    np.testing.assert_array_equal(grid, expected["image_grid_thw"])
    np.testing.assert_array_equal(values, expected["pixel_values"])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_colour_model(mode: str) -> None:
    random = np.random.default_rng(7)
    picture = Image.fromarray(random.integers(0, 256, (90, 120, 4), dtype=np.uint8)).convert(mode)
    if mode == "P":
        picture.info["transparency"] = 3
    expected = oracle.Qwen2VLImageProcessorPil(**CONFIGS[0])(picture, return_tensors="np")
    np.testing.assert_array_equal(ImageProcessor.from_config(CONFIGS[0], VISION)(picture)[0], expected["pixel_values"])
