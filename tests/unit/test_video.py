"""Which frames, which size, which patches: transformers' Qwen2VLVideoProcessor."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import BundleError, UsageError
from runtime.processor_config import video_config
from runtime.video import Clip, Sampling, VideoProcessor
from runtime.video_resize import resize_bicubic
from tests.unit.test_image import VISION, noise

DATA = Path(__file__).parents[1] / "data"


def processor(**raw: Any) -> VideoProcessor:
    return VideoProcessor.from_config(raw, VISION, "video_preprocessor_config.json")


def frames_of(count: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(noise("RGB", count * height, width)).reshape(count, height, width, 3)


def test_golden_values_of_transformers() -> None:
    golden = np.load(DATA / "video_qwen2vl.npz")
    run = processor()
    for i, (count, height, width) in enumerate(golden["sizes"].tolist()):
        values, grid = run(list(frames_of(count, height, width)))
        assert grid.tolist() == [golden["grids"][i].tolist()]
        np.testing.assert_array_equal(values[:2, ::32], golden["rows"][i])
        assert hashlib.sha256(values.tobytes()).hexdigest() == golden["sha256"][i]


def test_golden_frames_of_transformers() -> None:
    golden = np.load(DATA / "video_qwen2vl.npz")
    run = processor()
    cases = zip(golden["totals"].tolist(), golden["rates"].tolist(), golden["indices"].tolist(), strict=True)
    for total, (rate, fps), expected in cases:
        found = run.indices(total, rate, Sampling(fps=fps), "a video")
        assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == expected, (total, rate, fps)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_scaling_is_that_of_torch(height: int, width: int, down: int, across: int, harsh: bool) -> None:
    import torch

    pixels = np.asarray(noise("RGB", height, width))
    if harsh:
        pixels = (pixels > 127).astype(np.uint8) * 255
    size = (14 * down, 14 * across)
    batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(batch, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(resize_bicubic(pixels, *size), expected.numpy())


def test_a_frame_of_the_right_size_is_left_alone() -> None:
    pixels = np.asarray(noise("RGB", 28, 56))
    np.testing.assert_array_equal(resize_bicubic(pixels, 28, 56), pixels)


@pytest.mark.parametrize(
    ("total", "rate", "wish", "count"),
    [
        (5, 10.0, Sampling(), 5),
        (900, 30.0, Sampling(fps=2.0), 60),
        (30, 30.0, Sampling(fps=2.0), 4),  # never below min_frames
        (3, 30.0, Sampling(fps=2.0), 2),  # but no more than there are, in pairs
        (1, 30.0, Sampling(fps=2.0), 1),
        (100_000, 30.0, Sampling(fps=30.0), 768),  # never above max_frames
        (100, 1e9, Sampling(fps=1.0), 4),
        (100, 1e-9, Sampling(fps=1.0), 100),
        (100, None, Sampling(num_frames=7), 8),
        (100, None, Sampling(num_frames=5), 4),  # halves are rounded to even
        (100, None, Sampling(num_frames=1), 2),
        (2, None, Sampling(num_frames=2), 2),
    ],
)
def test_how_many_frames(total: int, rate: float | None, wish: Sampling, count: int) -> None:
    found = processor().indices(total, rate, wish, "a video")
    assert len(found) == count
    assert found == sorted(set(found))
    assert 0 <= found[0] <= found[-1] < total


def test_sampling_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="8 frames are asked for, it has 5"):
        processor().indices(5, 10.0, Sampling(num_frames=8), "a.mp4")
    for rate in (None, 0.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="frames per second are unknown"):
            processor().indices(50, rate, Sampling(fps=1.0), "a.mp4")


def test_long_files_are_sampled_and_short_ones_are_not(caplog: pytest.LogCaptureFixture) -> None:
    run = processor()
    assert run.usual(64, 30.0, Sampling(), "a.mp4") == Sampling()
    assert run.usual(900, 30.0, Sampling(num_frames=4), "a.mp4") == Sampling(num_frames=4)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "exaone_export.runtime"):
        assert run.usual(900, 30.0, Sampling(), "a.mp4") == Sampling(fps=2.0)
        assert run.usual(900, None, Sampling(), "a.mp4") == Sampling(num_frames=64)
    assert "a.mp4 has 900 frames; 60 of them are used" in caplog.text
    own = processor(do_sample_frames=True, num_frames=6)
    assert own.usual(900, 30.0, Sampling(), "a.mp4") == Sampling()
    assert len(own.indices(900, 30.0, Sampling(), "a.mp4")) == 6
    assert len(own.indices(900, 30.0, Sampling(fps=1.0), "a.mp4")) == 30


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_an_odd_number_of_frames_repeats_the_last(count: int) -> None:
    run = processor(min_pixels=784, max_pixels=784 * 4)
    frames = frames_of(count, 28, 56)
    clip = Clip(frames)
    assert run.token_count(clip) == -(-count // 2) * 2
    slices = run.slices(clip)
    assert [part.shape for part in slices] == [(2, 28, 56, 3)] * -(-count // 2)
    np.testing.assert_array_equal(np.concatenate(slices)[:count], frames)
    np.testing.assert_array_equal(slices[-1][-1], frames[-1])
    values, grid = run(list(frames))
    assert grid.tolist() == [[-(-count // 2), 2, 4]]
    assert len(values) == 4 * run.token_count(clip)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(48, 64, (280, 392)), (1080, 1920, (560, 1008)), (28, 28, (336, 336)), (320, 320, (336, 336)),
     (2160, 3840, (560, 1008))],
)  # fmt: skip
def test_bounds_of_a_frame(height: int, width: int, size: tuple[int, int]) -> None:
    run = processor()
    assert run.resized(height, width, 8, "a video") == size
    assert size[0] * size[1] * 1.1 >= 128 * 784
    assert size[0] * size[1] <= 768 * 784


def test_bounds_that_a_caller_sets() -> None:
    run = processor().bounded(None, 784 * 16)
    assert (run.min_pixels, run.max_pixels) == (784 * 16, 784 * 16)
    assert processor().bounded(784, 784 * 9).resized(1080, 1920, 8, "x") == (56, 112)
    with pytest.raises(UsageError, match="min_pixels"):
        processor().bounded(2, 1)


def test_a_budget_for_all_frames() -> None:
    run = processor(cap_pixels_per_frame=True, max_video_tokens=2000)
    assert run.resized(1080, 1920, 2, "x") == processor().resized(1080, 1920, 2, "x")
    assert run.resized(1080, 1920, 100, "x") == (224, 420)  # 1.05 times the least


def test_unusable_proportions() -> None:
    with pytest.raises(UsageError, match="200 times"):
        processor().resized(10, 2001, 2, "x")
    with pytest.raises(UsageError, match="multiples of 28"):
        processor(do_resize=False).resized(30, 56, 2, "x")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"patch_size": 16}, "patch_size"),
        ({"resample": 2}, "resample"),
        ({"do_sample_frames": "yes"}, "do_sample_frames"),
        ({"do_sample_frames": True, "fps": -1}, "fps"),
        ({"do_sample_frames": True, "num_frames": 2.5}, "num_frames"),
        ({"max_frames": 0}, "max_frames"),
        ({"video_processor_type": "LlavaVideoProcessor"}, "video_processor_type"),
        ({"do_center_crop": True}, "do_center_crop"),
    ],
)
def test_unusable_configuration_names_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(BundleError, match=rf"video_preprocessor_config\.json: {key}"):
        processor(**change)


def test_where_the_configuration_is_from(tmp_path: Path) -> None:
    assert video_config(tmp_path)[0] == {}
    image = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 1, "max_pixels": 2, "image_mean": [0, 0, 0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    # The bounds of a picture are not those of hundreds of frames.
    assert video_config(tmp_path) == ({"image_mean": [0, 0, 0]}, "preprocessor_config.json")
    (tmp_path / "video_preprocessor_config.json").write_text('{"fps": 1}')
    assert video_config(tmp_path) == ({"fps": 1}, "video_preprocessor_config.json")
    (tmp_path / "processor_config.json").write_text('{"video_processor": {"fps": 3}}')
    assert video_config(tmp_path) == ({"fps": 3}, "processor_config.json")
    (tmp_path / "processor_config.json").write_text('{"video_processor": [3]}')
    with pytest.raises(BundleError, match="video_processor"):
        video_config(tmp_path)
