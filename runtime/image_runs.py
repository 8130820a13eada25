"""Which images, and which pieces of videos, go through the vision encoder together.

Together they see no more of each other than alone: attention stays inside an image. Weights are read and kernels
started once for all, which counts for thumbnails only; from some hundred patches on, several are a tenth slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from runtime.media import Piece

# Patches of one run, every image counted as large as the run's largest: that much room the encoder's tiles take.
TOGETHER: Final = 256


def image_runs(images: Sequence[Piece], patch_size: int) -> Iterator[list[Piece]]:
    """Neighbouring images that are encoded together, in order; a large one is alone.

    Args:
        images: of `MediaReader.pieces`.
        patch_size: pixels along a patch's side.
    """
    run: list[Piece] = []
    largest = 0
    for image in images:
        height, width = image.shape[1:3] if isinstance(image, np.ndarray) else (image.height, image.width)
        patches = (height // patch_size) * (width // patch_size)
        if run and (len(run) + 1) * max(largest, patches) > TOGETHER:
            yield run
            run, largest = [], 0
        run.append(image)
        largest = max(largest, patches)
    if run:
        yield run
