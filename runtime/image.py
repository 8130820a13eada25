"""An image to patches: the arithmetic of transformers' Qwen2VLImageProcessorPil, bit for bit, in numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.config import VisionConfig
from model.errors import BundleError
from runtime.image_file import check_size, image_refusal, to_rgb

PixelValues = npt.NDArray[np.float32]
Grid = npt.NDArray[np.int64]

MAX_RATIO: Final = 200


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
    def from_config(cls, raw: Mapping[str, Any], vision: VisionConfig) -> ImageProcessor:
        """Reads a ``preprocessor_config.json``.

        Bounds may be spelled min_pixels, max_pixels or size.shortest_edge, size.longest_edge.

        Raises:
            BundleError: a value is unusable, not implemented, or contradicts the vision encoder.
        """
        reader = _ConfigReader(raw)
        reader.refuse_unknown_steps()
        layout = {
            name: reader.positive_integer(name, default)
            for name, default in (("patch_size", 14), ("merge_size", 2), ("temporal_patch_size", 2))
        }
        expected = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, vision.in_channels)
        if (*layout.values(), 3) != expected:
            raise reader.fail("patch_size", f"{(*layout.values(), 3)} contradicts the vision encoder's {expected}")
        low, high = reader.bounds()
        return cls(
            **layout, min_pixels=low, max_pixels=high, resample=reader.resample(), table=reader.normalisation_table()
        )

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
        units = self._cut(np.asarray(scaled))
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

    def _cut(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """[height, width, channels] to [patches, channels, patch_size, patch_size] in the vision encoder's order."""
        height, width, channels = pixels.shape
        side, merge = self.patch_size, self.merge_size
        unit = side * merge
        split = pixels.reshape(height // unit, merge, side, width // unit, merge, side, channels)
        return split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, side, side)


class _ConfigReader:
    """Typed access to a preprocessor_config.json; every complaint names the key."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def fail(self, key: str, why: str) -> BundleError:
        return BundleError("unusable image preprocessing", f"preprocessor_config.json: {key}", why, "Export again")

    def refuse_unknown_steps(self) -> None:
        kind = self.raw.get("image_processor_type", "Qwen2VLImageProcessor")
        if kind not in ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil"):
            raise self.fail("image_processor_type", f"{str(kind)[:60]!r} is not implemented")
        for key in ("do_center_crop", "do_pad"):
            if self.raw.get(key):
                raise self.fail(key, "this step is not implemented")

    def positive_integer(self, key: str, default: int, source: Mapping[str, Any] | None = None) -> int:
        value = (self.raw if source is None else source).get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 31:
            raise self.fail(key, f"a positive whole number is needed, not {str(value)[:40]!r}")
        return value

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, f"true or false is needed, not {str(value)[:40]!r}")
        return value is not False

    def bounds(self) -> tuple[int, int]:
        size = self.raw.get("size")
        if size is not None and not isinstance(size, Mapping):
            raise self.fail("size", "an object with shortest_edge and longest_edge is needed")
        size = size or {}
        # The spellings from weakest to strongest, as transformers ranks them; defaults are the class's.
        low, high = 56 * 56, 28 * 28 * 1280
        for low_key, high_key, source in (
            ("min_pixels", "max_pixels", size), ("shortest_edge", "longest_edge", size),
            ("min_pixels", "max_pixels", self.raw),
        ):  # fmt: skip
            low = self.positive_integer(low_key, low, source)
            high = self.positive_integer(high_key, high, source)
        if low > high:
            raise self.fail("min_pixels", f"{low} is more than max_pixels {high}")
        return low, high

    def resample(self) -> Image.Resampling | None:
        if not self.flag("do_resize"):
            return None
        value = self.raw.get("resample", Image.Resampling.BICUBIC)
        try:
            return Image.Resampling(value)
        except ValueError:
            raise self.fail("resample", f"{str(value)[:40]!r} is no resampling filter") from None

    def numbers(self, key: str, default: tuple[float, ...]) -> npt.NDArray[np.float32]:
        value = self.raw.get(key, default)
        if not isinstance(value, (list, tuple)) or len(value) != 3:
            raise self.fail(key, "three numbers are needed")
        for number in value:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= 1e6:
                raise self.fail(key, f"a number is needed, not {str(number)[:40]!r}")
        return np.array(value, np.float32)

    def normalisation_table(self) -> PixelValues:
        """Rescaling in float64 rounded to float32, then normalisation in float32: transformers' order and widths."""
        table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
        if self.flag("do_rescale"):
            factor = self.raw.get("rescale_factor", 1 / 255)
            if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
                raise self.fail("rescale_factor", f"a number above 0 and at most 1 is needed, not {str(factor)[:40]!r}")
            table = (table.astype(np.float64) * factor).astype(np.float32)
        if self.flag("do_normalize"):
            mean = self.numbers("image_mean", (0.48145466, 0.4578275, 0.40821073))
            deviation = self.numbers("image_std", (0.26862954, 0.26130258, 0.27577711))
            if not (deviation > 0).all():
                raise self.fail("image_std", "a value is not above 0")
            table = (table - mean[:, None]) / deviation[:, None]
        return table
