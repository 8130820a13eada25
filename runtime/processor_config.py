"""Reads what a model's source says of preparing images and videos; every complaint names the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.config import VisionConfig
from model.errors import BundleError
from model.jsonfile import read_json_object

Floats = npt.NDArray[np.float32]

IMAGE_FILE: Final = "preprocessor_config.json"
VIDEO_FILE: Final = "video_preprocessor_config.json"
JOINT_FILE: Final = "processor_config.json"  # where transformers 5 writes both
# What images of EXAONE 4.5 were published with: 4 to 4096 tokens.
PUBLISHED_BOUNDS: Final = {"min_pixels": 56 * 56, "max_pixels": 4096 * 28 * 28}
_IMAGE_ALONE: Final = ("image_processor_type", "min_pixels", "max_pixels", "size")


def image_config(folder: Path) -> tuple[Mapping[str, Any], str]:
    """A bundle's configuration of images, and the file it is from.

    A checkpoint may lack it; export notes that, and images are then prepared as EXAONE 4.5 was published.

    Raises:
        BundleError: a file cannot be read.
    """
    joint = _section(folder, "image_processor")
    return (joint, JOINT_FILE) if joint is not None else (_read(folder, IMAGE_FILE) or PUBLISHED_BOUNDS, IMAGE_FILE)


def video_config(folder: Path) -> tuple[Mapping[str, Any], str]:
    """A bundle's configuration of videos, and the file it is from.

    Where there is none of their own, frames are normalised as images are, and keep the bounds of transformers' video
    processor: those of images are meant for one picture, not for hundreds.

    Raises:
        BundleError: a file cannot be read.
    """
    joint = _section(folder, "video_processor")
    if joint is not None:
        return joint, JOINT_FILE
    own = _read(folder, VIDEO_FILE)
    if own is not None:
        return own, VIDEO_FILE
    raw, file = image_config(folder)
    return {key: value for key, value in raw.items() if key not in _IMAGE_ALONE}, file


def _section(folder: Path, name: str) -> Mapping[str, Any] | None:
    found = (_read(folder, JOINT_FILE) or {}).get(name)
    if found is not None and not isinstance(found, Mapping):
        raise BundleError("unusable preprocessing", f"{JOINT_FILE}: {name}", "it is no object", "Export again")
    return found


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / name
    return read_json_object(path, BundleError, "cannot open bundle") if path.exists() else None


class ConfigReader:
    """Typed access to such a configuration.

    Args:
        raw: what `file` holds.
        file: for messages.
    """

    def __init__(self, raw: Mapping[str, Any], file: str) -> None:
        self.raw, self.file = raw, file

    def fail(self, key: str, why: str) -> BundleError:
        """The error for a value that cannot be used."""
        return BundleError("unusable preprocessing", f"{self.file}: {key}", why, "Export again")

    def refuse_unknown_steps(self, type_key: str, known: tuple[str, ...]) -> None:
        """Refuses another processor than those of `known`, and steps that none of them takes."""
        kind = self.raw.get(type_key, known[0])
        if kind not in known:
            raise self.fail(type_key, f"{str(kind)[:60]!r} is not implemented")
        for key in ("do_center_crop", "do_pad"):
            if self.raw.get(key):
                raise self.fail(key, "this step is not implemented")

    def layout(self, vision: VisionConfig) -> dict[str, int]:
        """patch_size, merge_size and temporal_patch_size, which must be the vision encoder's."""
        layout = {
            name: self.positive_integer(name, default)
            for name, default in (("patch_size", 14), ("merge_size", 2), ("temporal_patch_size", 2))
        }
        expected = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, vision.in_channels)
        if (*layout.values(), 3) != expected:
            raise self.fail("patch_size", f"{(*layout.values(), 3)} contradicts the vision encoder's {expected}")
        return layout

    def positive_integer(self, key: str, default: int, source: Mapping[str, Any] | None = None) -> int:
        """A number from `source`, by default the whole configuration; `default` where it is absent or null."""
        value = (self.raw if source is None else source).get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 31:
            raise self.fail(key, f"a positive whole number is needed, not {str(value)[:40]!r}")
        return value

    def positive_number(self, key: str) -> float | None:
        """A number above 0; None where it is absent or null."""
        value = self.raw.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e6:
            raise self.fail(key, f"a number above 0 is needed, not {str(value)[:40]!r}")
        return float(value)

    def flag(self, key: str, default: bool = True) -> bool:
        """True or false; `default` where it is absent or null."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, f"true or false is needed, not {str(value)[:40]!r}")
        return default if value is None else value

    def bounds(self, low: int, high: int) -> tuple[int, int]:
        """Fewest and most pixels after scaling; `low` and `high` where it does not say."""
        size = self.raw.get("size")
        if size is not None and not isinstance(size, Mapping):
            raise self.fail("size", "an object with shortest_edge and longest_edge is needed")
        size = size or {}
        # The spellings from weakest to strongest, as transformers ranks them.
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
        """Pillow's filter; None where sizes are left as they are."""
        if not self.flag("do_resize"):
            return None
        value = self.raw.get("resample", Image.Resampling.BICUBIC)
        try:
            return Image.Resampling(value)
        except ValueError:
            raise self.fail("resample", f"{str(value)[:40]!r} is no resampling filter") from None

    def numbers(self, key: str, default: tuple[float, ...]) -> Floats:
        """One number for each channel."""
        value = self.raw.get(key, default)
        if not isinstance(value, (list, tuple)) or len(value) != 3:
            raise self.fail(key, "three numbers are needed")
        for number in value:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= 1e6:
                raise self.fail(key, f"a number is needed, not {str(number)[:40]!r}")
        return np.array(value, np.float32)

    def rescale_factor(self) -> float | None:
        """What 8-bit values are multiplied by; None where they stay."""
        if not self.flag("do_rescale"):
            return None
        factor = self.raw.get("rescale_factor", 1 / 255)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
            raise self.fail("rescale_factor", f"a number above 0 and at most 1 is needed, not {str(factor)[:40]!r}")
        return factor

    def normalisation(self) -> tuple[Floats, Floats] | None:
        """Mean and deviation of each channel; None where values are not normalised."""
        if not self.flag("do_normalize"):
            return None
        mean = self.numbers("image_mean", (0.48145466, 0.4578275, 0.40821073))
        deviation = self.numbers("image_std", (0.26862954, 0.26130258, 0.27577711))
        if not (deviation > 0).all():
            raise self.fail("image_std", "a value is not above 0")
        return mean, deviation

    def image_table(self) -> Floats:
        """What each channel's 8-bit values become, [3, 256].

        Rescaling in float64 rounded to float32, then normalisation in float32: the order and the widths of
        transformers' image processor.
        """
        table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
        factor, normalisation = self.rescale_factor(), self.normalisation()
        if factor is not None:
            table = (table.astype(np.float64) * factor).astype(np.float32)
        if normalisation is not None:
            table = (table - normalisation[0][:, None]) / normalisation[1][:, None]
        return table

    def video_table(self) -> Floats:
        """As `image_table`, but mean and deviation are rescaled, not the values: transformers' video processor."""
        table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
        factor, normalisation = self.rescale_factor(), self.normalisation()
        if normalisation is None:
            return table if factor is None else table * np.float32(factor)
        scale = np.float32(1.0 if factor is None else 1.0 / factor)
        return (table - (normalisation[0] * scale)[:, None]) / (normalisation[1] * scale)[:, None]
