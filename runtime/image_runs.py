"""Which images of a request go through the vision encoder together.

Together they see no more of each other than alone: attention stays inside an image. Weights are read and kernels
started once for all, which counts for thumbnails only; from some hundred patches on, several are a tenth slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from PIL import Image

from runtime.image import ImageProcessor

# Patches of one run, every image counted as large as the run's largest: that much room the encoder's tiles take.
TOGETHER: Final = 256


def image_runs(images: Sequence[Image.Image], processor: ImageProcessor) -> Iterator[list[Image.Image]]:
    """Neighbouring images that are encoded together, in order; a large one is alone.

    Args:
        images: of `ImageProcessor.scaled`.
        processor: that cuts them.
    """
    run: list[Image.Image] = []
    largest = 0
    for image in images:
        patches = processor.token_count(image) * processor.merge_size**2
        if run and (len(run) + 1) * max(largest, patches) > TOGETHER:
            yield run
            run, largest = [], 0
        run.append(image)
        largest = max(largest, patches)
    if run:
        yield run
