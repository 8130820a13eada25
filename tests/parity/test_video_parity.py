"""Bit for bit the patches of transformers' Qwen2VLVideoProcessor, where torchvision is there to run it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.video import Sampling, VideoProcessor
from tests.unit.test_image import VISION

pytest.importorskip("torchvision")
oracle = pytest.importorskip("transformers.models.qwen2_vl.video_processing_qwen2_vl")

CONFIGS: list[dict[str, Any]] = [
    {},
    {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
    {"size": {"shortest_edge": 3136, "longest_edge": 100000}, "do_normalize": False},
    {"do_rescale": False},
    {"cap_pixels_per_frame": True, "max_video_tokens": 700},
    {"image_mean": [0.5, 0.4, 0.3], "rescale_factor": 1 / 127},
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("size", [(1, 48, 64), (5, 48, 64), (2, 300, 201), (3, 28, 28), (7, 33, 20)])
def test_patches(config: dict[str, Any], size: tuple[int, int, int]) -> None:
    frames = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = oracle.Qwen2VLVideoProcessor(**config)([frames], return_tensors="np")
    values, grid = VideoProcessor.from_config(config, VISION, "x")(list(frames))
    np.testing.assert_array_equal(grid, expected["video_grid_thw"])
    np.testing.assert_array_equal(values, expected["pixel_values_videos"])


def test_sampling() -> None:
    from transformers.video_utils import VideoMetadata

    theirs, ours = oracle.Qwen2VLVideoProcessor(), VideoProcessor.from_config({}, VISION, "x")
    for total in (2, 3, 4, 5, 17, 34, 49, 100, 901):
        for count in range(2, min(total, 60) + 1, 3):
            if 2 * round(count / 2) > total:
                continue
            metadata = VideoMetadata(total_num_frames=total, fps=1.0)
            expected = theirs.sample_frames(metadata, num_frames=count).tolist()
            # Rounding may give one number too many there, behind the last frame.
            assert ours.indices(total, None, Sampling(num_frames=count), "x") == [i for i in expected if i < total]
