"""A video to patches: which frames, at which size; the arithmetic of transformers' Qwen2VLVideoProcessor in numpy."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.config import VisionConfig
from model.errors import UsageError
from runtime.image import MAX_RATIO, Grid, PixelValues, cut_patches, other_bounds, smart_resize
from runtime.processor_config import ConfigReader
from runtime.video_resize import resize_bicubic

Frame = npt.NDArray[np.uint8]

# Of a file for which nobody says how many frames to take: so many are taken whole, of more USUAL_FPS a second.
WHOLE_FRAMES: Final = 64
USUAL_FPS: Final = 2.0

_KINDS: Final = ("Qwen2VLVideoProcessor",)
_log = logging.getLogger("exaone_export.runtime")


@dataclass(frozen=True, eq=False)
class Clip:
    """A video ready to be cut into patches.

    Attributes:
        frames: uint8 [frames, height, width, 3], sampled and scaled.
    """

    frames: Frame


@dataclass(frozen=True)
class Sampling:
    """How many frames of a video to take; at most one of the two is set.

    Attributes:
        fps: so many a second.
        num_frames: so many in all, rounded to whole temporal patches.
    """

    fps: float | None = None
    num_frames: int | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.fps is not None or self.num_frames is not None


@dataclass(frozen=True)
class VideoProcessor:
    """Samples, scales, normalises and cuts a video.

    Attributes:
        patch_size, merge_size, temporal_patch_size: pixels per patch side, patches per token side, frames per patch.
        min_pixels, max_pixels: bounds of a frame's scaled area.
        resizes: whether frames are scaled at all.
        table: float32 [3, 256], what each channel's 8-bit values become.
        sampling: what the model's source asks for.
        min_frames, max_frames: bounds of sampling by rate.
        total_pixels: of all frames together; None is no bound.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    resizes: bool
    table: PixelValues
    sampling: Sampling
    min_frames: int
    max_frames: int
    total_pixels: int | None

    @classmethod
    def from_config(cls, raw: Mapping[str, Any], vision: VisionConfig, file: str) -> VideoProcessor:
        """Reads the configuration that `file` holds.

        Raises:
            BundleError: a value is unusable, not implemented, or contradicts the vision encoder.
        """
        reader = ConfigReader(raw, file)
        reader.refuse_unknown_steps("video_processor_type", _KINDS)
        layout = reader.layout(vision)
        low, high = reader.bounds(128 * 28 * 28, 768 * 28 * 28)
        resample = reader.resample()
        if resample not in (None, Image.Resampling.BICUBIC):
            raise reader.fail("resample", f"{resample.name.lower()} is not implemented for videos")
        sampling = Sampling()
        if reader.flag("do_sample_frames", default=False):
            count = reader.positive_integer("num_frames", 0) or None
            sampling = Sampling(None if count else reader.positive_number("fps"), count)
        total = None
        if reader.flag("cap_pixels_per_frame", default=False):
            # Nine tenths of so many tokens, as the reference that the model family was trained with has it.
            total = int(reader.positive_integer("max_video_tokens", 128000) * _unit(layout) ** 2 * 0.9)
        return cls(
            **layout,
            min_pixels=low,
            max_pixels=high,
            resizes=resample is not None,
            table=reader.video_table(),
            sampling=sampling,
            min_frames=reader.positive_integer("min_frames", 4),
            max_frames=reader.positive_integer("max_frames", 768),
            total_pixels=total,
        )

    def bounded(self, min_pixels: int | None, max_pixels: int | None) -> VideoProcessor:
        """The same with other bounds; None leaves one as it is. See `runtime.image.other_bounds`."""
        low, high = other_bounds(self.min_pixels, self.max_pixels, min_pixels, max_pixels)
        return dataclasses.replace(self, min_pixels=low, max_pixels=high)

    def indices(self, total: int, rate: float | None, wish: Sampling, name: str) -> list[int]:
        """Which frames of a video to take, in order.

        Args:
            total: frames it has, at least one.
            rate: of them a second; None where that is unknown.
            wish: of the caller; nothing in it means the model's own.
            name: what messages call the video.

        Raises:
            UsageError: more frames are asked for than there are, or frames per second of a video without a rate.
        """
        wish = wish if wish.wanted else self.sampling
        step = self.temporal_patch_size
        if wish.num_frames is not None:
            count = max(step, round(wish.num_frames / step) * step)
            if count > total:
                why = f"{count} frames are asked for, it has {total}"
                raise video_refusal(name, why, "Ask for fewer frames")
        elif wish.fps is not None:
            if rate is None or not math.isfinite(rate) or rate <= 0:
                raise video_refusal(name, "its frames per second are unknown", "Ask for a number of frames instead")
            most = min(self.max_frames, total) // step * step
            count = math.floor(min(max(total / rate * wish.fps, self.min_frames), most, total) / step) * step
        else:
            return list(range(total))
        if count < 1:  # a video shorter than one temporal patch
            return list(range(total))
        stride = total / count
        # The width matters: transformers counts in float32 and cuts off what is behind the point.
        return [min(int(np.float32(i * stride)), total - 1) for i in range(count)]

    def usual(self, total: int, rate: float | None, wish: Sampling, name: str) -> Sampling:
        """What to do with a file where neither the caller nor the model says: `WHOLE_FRAMES` and `USUAL_FPS`."""
        if wish.wanted or self.sampling.wanted or total <= WHOLE_FRAMES:
            return wish
        if rate is None or not math.isfinite(rate) or rate <= 0:
            found = Sampling(num_frames=WHOLE_FRAMES)
        else:
            found = Sampling(fps=USUAL_FPS)
        count = len(self.indices(total, rate, found, name))
        _log.warning("%s has %d frames; %d of them are used (fps and num_frames say otherwise)", name, total, count)
        return found

    def resized(self, height: int, width: int, frames: int, name: str) -> tuple[int, int]:
        """Height and width of each of `frames` frames after scaling. Raises UsageError for unusable proportions."""
        factor = self.patch_size * self.merge_size
        if max(height, width) > MAX_RATIO * min(height, width):
            why = f"{width}x{height} pixels: one side is more than {MAX_RATIO} times the other"
            raise video_refusal(name, why, "Crop it first")
        if self.resizes:
            most = self.max_pixels
            if self.total_pixels is not None:
                share = self.total_pixels * self.temporal_patch_size // frames
                most = max(min(most, share), int(self.min_pixels * 1.05))
            return smart_resize(height, width, factor, self.min_pixels, most)
        if height % factor or width % factor:
            why = f"{width}x{height} pixels, but this model scales no videos and needs multiples of {factor}"
            raise video_refusal(name, why)
        return height, width

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Temporal patches, patches down and patches across of so many frames of a scaled size."""
        return -(-frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens that so many frames of a scaled size take in the prompt."""
        return math.prod(self.grid(frames, height, width)) // self.merge_size**2

    def token_count(self, clip: Clip) -> int:
        """Tokens that a clip takes in the prompt."""
        return self.tokens(*clip.frames.shape[:3])

    def scaled(self, frame: Frame, size: tuple[int, int]) -> Frame:
        """One frame at the size that `resized` says."""
        return resize_bicubic(frame, *size)

    def slices(self, clip: Clip) -> list[Frame]:
        """A clip's frames, those of one temporal patch together; the last frame is repeated to make the last full."""
        step = self.temporal_patch_size
        parts = [clip.frames[i : i + step] for i in range(0, len(clip.frames), step)]
        missing = step - len(parts[-1])
        parts[-1] = np.concatenate([parts[-1], *[parts[-1][-1:]] * missing])
        return parts

    def patches(self, frames: Frame) -> tuple[PixelValues, Grid]:
        """Patches of one of `slices`.

        Args:
            frames: uint8 [temporal_patch_size, height, width, 3].

        Returns:
            float32 [patches, 3 * temporal_patch_size * patch_size**2]; int64 [1, 3]: 1, patches down, patches across.
        """
        units = np.stack([cut_patches(frame, self.patch_size, self.merge_size) for frame in frames], axis=2)
        values = np.empty(units.shape, np.float32)
        for channel in range(units.shape[1]):
            values[:, channel] = self.table[channel][units[:, channel]]
        return values.reshape(len(values), -1), np.array([self.grid(*frames.shape[:3])], np.int64)

    def __call__(self, frames: Sequence[Frame]) -> tuple[PixelValues, Grid]:
        """Patches of all of a video's frames, all of one size, and its grid [1, 3]; scales and cuts."""
        height, width = frames[0].shape[:2]
        size = self.resized(height, width, len(frames), "video")
        clip = Clip(np.stack([self.scaled(frame, size) for frame in frames]))
        values, grids = zip(*map(self.patches, self.slices(clip)), strict=True)
        return np.concatenate(values), np.array([[len(values), *grids[0][0, 1:]]], np.int64)


def video_refusal(shown: str, why: str, remedy: str = "") -> UsageError:
    """The error for a video that cannot be used; `shown` names it."""
    return UsageError("cannot read video", shown, why, remedy)


def _unit(layout: Mapping[str, int]) -> int:
    return layout["patch_size"] * layout["merge_size"]
