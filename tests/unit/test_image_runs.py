from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from runtime.image_runs import TOGETHER, image_runs
from runtime.media import Piece


def runs(*sizes: tuple[int, int]) -> list[list[tuple[int, int]]]:
    images: list[Piece] = [Image.new("RGB", size) for size in sizes]
    return [[sizes_of(image) for image in run] for run in image_runs(images, 14)]


def sizes_of(image: Piece) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40])
def test_small_images_share_runs(count: int) -> None:
    side = 14 * 4  # 16 patches
    found = runs(*[(side, side)] * count)
    assert sum(map(len, found)) == count
    assert all(len(run) == (TOGETHER // 16) for run in found[:-1])
    assert len(found) == -(-count // (TOGETHER // 16))


def test_order_is_kept_and_a_large_image_is_alone() -> None:
    small, large = (56, 28), (1036, 1036)
    assert runs(small, small, large, small, large, large) == [
        [small, small], [large], [small], [large], [large],
    ]  # fmt: skip


def test_a_run_has_room_for_as_many_images_of_its_largest_size() -> None:
    small, middle = (28, 28), (14 * 8, 14 * 8)  # 4 and 64 patches
    assert [len(run) for run in runs(*[small] * 50, middle)] == [50, 1]
    assert len(runs(middle, *[small] * 50)[0]) == TOGETHER // 64


def test_frames_of_a_video_share_runs_too() -> None:
    pair = np.zeros((2, 56, 56, 3), np.uint8)
    assert [len(run) for run in image_runs([pair] * 20, 14)] == [16, 4]
