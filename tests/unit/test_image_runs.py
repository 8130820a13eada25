from __future__ import annotations

import pytest
from PIL import Image

from model.config import VisionConfig
from runtime.image import ImageProcessor
from runtime.image_runs import TOGETHER, image_runs
from tests.unit.test_memory import VISION


def runs(*sizes: tuple[int, int]) -> list[list[tuple[int, int]]]:
    vision: VisionConfig = VISION
    processor = ImageProcessor.from_config({}, vision)
    images = [Image.new("RGB", size) for size in sizes]
    return [[image.size for image in run] for run in image_runs(images, processor)]


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
