"""An image to patches: the arithmetic of transformers' Qwen2VLImageProcessorPil, bit for bit, in numpy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.config import VisionConfig
from model.errors import UsageError
from runtime.image_file import check_size, image_refusal, to_rgb
from runtime.processor_config import ConfigReader

PixelValues = npt.NDArray[np.float32]
Grid = npt.NDArray[np.int64]

MAX_RATIO: Final = 200
_KINDS: Final = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size an image is scaled to: both sides multiples of `factor`, area within bounds, proportions nearly kept.

    Sides are rounded half to even; the area test comes after rounding (Qwen2-VL's rule). Proportions over `MAX_RATIO`
    have no meaning here.
    """
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return h, w


def cut_patches(pixels: npt.NDArray[np.uint8], side: int, merge: int) -> npt.NDArray[np.uint8]:
    """[height, width, channels] to [patches, channels, side, side]: merged units together and row by row."""
    height, width, channels = pixels.shape
    unit = side * merge
    split = pixels.reshape(height // unit, merge, side, width // unit, merge, side, channels)
    return split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, side, side)


def other_bounds(low: int, high: int, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """A model's bounds with those that a caller gives; the one not given yields where they would cross.

    Raises:
        UsageError: both are given, and the lower is above the higher.
    """
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise UsageError("bad option", "min_pixels", f"{min_pixels} is more than max_pixels {max_pixels}")
    if min_pixels is not None:
        low, high = min_pixels, max(high, min_pixels)
    if max_pixels is not None:
        low, high = min(low, max_pixels), max_pixels
    return low, high


@dataclass(frozen=True)
class ImageProcessor:
    """Scales, normalises and cuts one image into patches.

    Attributes:
        patch_size, merge_size, temporal_patch_size: pixels per patch side, patches per token side, frames per patch.
        min_pixels, max_pixels: bounds of the scaled area.
        resample: Pillow's number of the filter, or None to leave the size as it is.
        table: float32 [3, 256], what each channel's 8-bit values become.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    resample: Image.Resampling | None
    table: PixelValues

    @classmethod
    def from_config(
        cls, raw: Mapping[str, Any], vision: VisionConfig, file: str = "preprocessor_config.json"
    ) -> ImageProcessor:
        """Reads the configuration that `file` holds.

        Bounds may be spelled min_pixels, max_pixels or size.shortest_edge, size.longest_edge.

        Raises:
            BundleError: a value is unusable, not implemented, or contradicts the vision encoder.
        """
        reader = ConfigReader(raw, file)
        reader.refuse_unknown_steps("image_processor_type", _KINDS)
        layout = reader.layout(vision)
        low, high = reader.bounds(56 * 56, 28 * 28 * 1280)
        return cls(**layout, min_pixels=low, max_pixels=high, resample=reader.resample(), table=reader.image_table())

    def bounded(self, min_pixels: int | None, max_pixels: int | None) -> ImageProcessor:
        """The same with other bounds; None leaves one as it is. See `other_bounds`."""
        low, high = other_bounds(self.min_pixels, self.max_pixels, min_pixels, max_pixels)
        return dataclasses.replace(self, min_pixels=low, max_pixels=high)

    def resized(self, height: int, width: int, name: str = "image") -> tuple[int, int]:
        """Height and width after scaling. Raises UsageError, which names the image, for unusable proportions."""
        if max(height, width) > MAX_RATIO * min(height, width):
            why = f"{width}x{height} pixels: one side is more than {MAX_RATIO} times the other"
            raise image_refusal(name, why, "Crop it first")
        factor = self.patch_size * self.merge_size
        if self.resample is not None:
            return smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        if height % factor or width % factor:
            why = f"{width}x{height} pixels, but this model scales no images and needs multiples of {factor}"
            raise image_refusal(name, why)
        return height, width

    def patch_count(self, height: int, width: int) -> int:
        """Patches that an image of this size is cut into."""
        h, w = self.resized(height, width)
        return (h // self.patch_size) * (w // self.patch_size)

    def token_count(self, scaled: Image.Image) -> int:
        """Tokens that an image which `scaled` has made takes in the prompt.

        Its own size counts: scaling it once more may give another (30x6000 becomes 28x5992, whose proportions are
        over `MAX_RATIO`).
        """
        unit = self.patch_size * self.merge_size
        return (scaled.height // unit) * (scaled.width // unit)

    def scaled(self, image: Image.Image, name: str = "image") -> Image.Image:
        """The RGB image that is cut into patches, of the size that `resized` says.

        Args:
            image: of any size and colour model.
            name: what messages call it.

        Raises:
            UsageError: proportions over `MAX_RATIO`, more than `MAX_PIXELS` pixels, or pixels that cannot become RGB.
        """
        check_size(image, name)
        height, width = self.resized(image.height, image.width, name)
        rgb = to_rgb(image, name)
        return rgb if self.resample is None else rgb.resize((width, height), resample=self.resample)

    def patches(self, scaled: Image.Image) -> tuple[PixelValues, Grid]:
        """Patches of an image that `scaled` has made.

        Returns:
            float32 [patches, 3 * temporal_patch_size * patch_size**2], merged units together and row by row;
            int64 [1, 3]: 1, patches down, patches across.
        """
        units = cut_patches(np.asarray(scaled), self.patch_size, self.merge_size)
        count, channels, side, _ = units.shape
        values = np.empty((count, channels, self.temporal_patch_size, side, side), np.float32)
        for channel in range(channels):
            # A still image is the same in every frame of its patches.
            values[:, channel] = self.table[channel][units[:, channel]][:, None]
        grid = np.array([[1, scaled.height // self.patch_size, scaled.width // self.patch_size]], np.int64)
        return values.reshape(count, -1), grid

    def __call__(self, image: Image.Image) -> tuple[PixelValues, Grid]:
        """Scales and cuts one image; see `scaled` and `patches`."""
        return self.patches(self.scaled(image))
