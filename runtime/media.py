"""Images and videos of a prompt: loading, scaling, counting their tokens, cutting them into patches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.config import ExaoneConfig
from model.errors import UsageError
from runtime.image import Grid, ImageProcessor, PixelValues
from runtime.image_file import display_name, from_array, load_image, upright
from runtime.options import GenerationOptions
from runtime.processor_config import image_config, video_config
from runtime.video import Clip, Frame, Sampling, VideoProcessor
from runtime.video_file import VideoFile
from runtime.video_frames import VideoInput, open_video

__all__ = ["ImageInput", "MediaReader", "Medium", "Piece", "VideoInput", "in_order"]

ImageInput = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]
Medium = Image.Image | Clip  # scaled
Piece = Image.Image | npt.NDArray[np.uint8]  # an image, or the frames of one temporal patch

_NO_OPTIONS: Final = GenerationOptions()


class MediaReader:
    """Prepares what a model sees, as one bundle wants it.

    Args:
        folder: the bundle.
        config: the bundle's.
    """

    def __init__(self, folder: Path, config: ExaoneConfig) -> None:
        self._folder, self._config = folder, config

    @cached_property
    def images(self) -> ImageProcessor:
        """What turns images into patches. Raises UsageError for a text model, BundleError for a damaged bundle."""
        if self._config.vision is None:
            raise UsageError("cannot use images", "images", "this model reads text only", "Leave the images out")
        raw, file = image_config(self._folder)
        return ImageProcessor.from_config(raw, self._config.vision, file)

    @cached_property
    def videos(self) -> VideoProcessor:
        """What turns videos into patches. Raises as `images`."""
        if self._config.vision is None or self._config.video_token_id is None:
            raise UsageError("cannot use videos", "videos", "this model reads no videos", "Leave the videos out")
        raw, file = video_config(self._folder)
        return VideoProcessor.from_config(raw, self._config.vision, file)

    def scaled(
        self,
        images: Sequence[ImageInput] = (),
        videos: Sequence[VideoInput] = (),
        options: GenerationOptions = _NO_OPTIONS,
        before: Sequence[Medium] = (),
    ) -> tuple[Medium, ...]:
        """Loads and scales images, then videos; one large image, or one frame, is in memory at a time.

        Args:
            images: paths, Pillow images or uint8 arrays.
            videos: files, folders, lists of frames, arrays or `Frames`.
            options: min_pixels, max_pixels, max_total_pixels, fps and num_frames hold here.
            before: what earlier turns showed; it counts where they are too large together.

        Raises:
            UsageError: one cannot be used, they are too large together, or the model takes none.
            EnvironmentFault: a video file is given, and PyAV is not installed.
        """
        clips = listed(videos, "video")
        room = _Room(self._config, options.max_total_pixels)
        for medium in before:
            room.count(_pixels(medium), self.tokens(medium))
        pictures = self.scaled_images(images, options, room)
        return (*pictures, *(self._clip(video, f"videos[{i}]", options, room) for i, video in enumerate(clips)))

    def scaled_images(
        self, images: Sequence[ImageInput], options: GenerationOptions = _NO_OPTIONS, room: _Room | None = None
    ) -> tuple[Image.Image, ...]:
        """As `scaled`, for images alone."""
        room = room or _Room(self._config, options.max_total_pixels)
        found = []
        for i, image in enumerate(listed(images, "image")):
            scaled = self._image(image, f"images[{i}]", options)
            room.take(scaled.width * scaled.height, self.images.token_count(scaled), f"images[{i}]", "image")
            found.append(scaled)
        return tuple(found)

    def _image(self, image: object, name: str, options: GenerationOptions) -> Image.Image:
        processor = self.images.bounded(options.min_pixels, options.max_pixels)
        if isinstance(image, (str, os.PathLike)):
            return processor.scaled(load_image(image), display_name(os.fspath(image)))
        if isinstance(image, np.ndarray):
            return processor.scaled(from_array(image), name)
        if isinstance(image, Image.Image):
            return processor.scaled(upright(image, name), name)
        why = f"it is a {type(image).__name__}"
        raise UsageError("cannot use images", name, why, "Give a path, a Pillow image or a uint8 array")

    def _clip(self, video: VideoInput, name: str, options: GenerationOptions, room: _Room) -> Clip:
        processor = self.videos.bounded(options.min_pixels, options.max_pixels)
        with closing(open_video(video, name)) as opened:
            wish = Sampling(options.fps, options.num_frames)
            if isinstance(opened, VideoFile):  # frames given as such are meant to be taken
                wish = processor.usual(opened.frames, opened.rate, wish, opened.name)
            indices = processor.indices(opened.frames, opened.rate, wish, opened.name)
            size = processor.resized(opened.height, opened.width, len(indices), opened.name)
            # Judged before a frame is decoded.
            room.take(len(indices) * size[0] * size[1], processor.tokens(len(indices), *size), opened.name, "video")
            frames: Frame = np.empty((len(indices), *size, 3), np.uint8)
            for place, frame in enumerate(opened.read(indices)):
                frames[place] = processor.scaled(frame, size)
        return Clip(frames)

    def tokens(self, medium: Medium) -> int:
        """Tokens that one of `scaled` takes in the prompt."""
        return self.videos.token_count(medium) if isinstance(medium, Clip) else self.images.token_count(medium)

    def pieces(self, medium: Medium) -> list[Piece]:
        """The parts that the vision encoder may see apart: of a video, the frames of each temporal patch.

        No attention goes from one temporal patch to another, and positions are those inside a frame.
        """
        return list(self.videos.slices(medium)) if isinstance(medium, Clip) else [medium]

    def patches(self, piece: Piece) -> tuple[PixelValues, Grid]:
        """Patches and grid [1, 3] of one of `pieces`."""
        return self.images.patches(piece) if isinstance(piece, Image.Image) else self.videos.patches(piece)


class _Room:
    """What is left for images and videos, which are refused before more of them are loaded than can be used."""

    def __init__(self, config: ExaoneConfig, pixels: int | None) -> None:
        self._context, self._most = config.text.max_position_embeddings, pixels
        self._tokens = self._pixels = 0

    def count(self, pixels: int, tokens: int) -> None:
        """Counts one that is there already."""
        self._pixels += pixels
        self._tokens += tokens

    def take(self, pixels: int, tokens: int, name: str, kind: str) -> None:
        """Counts one. Raises UsageError if it is too much."""
        self.count(pixels, tokens)
        fewer = "Set a lower max_pixels" + (", fps or num_frames" if kind == "video" else ", or give fewer images")
        if self._most is not None and self._pixels > self._most:
            why = f"with it, {self._pixels} pixels are to be seen, max_total_pixels is {self._most}"
            raise UsageError(f"cannot use {kind}", name, why, fewer)
        if self._tokens >= self._context:
            why = f"with it, images and videos take {self._tokens} tokens and the context holds {self._context}"
            raise UsageError(f"cannot use {kind}", name, why, fewer)


def listed(given: Iterable[Any] | None, kind: str) -> list[Any]:
    """Images or videos as a caller gives them, None for none.

    Raises:
        UsageError: it is one alone, or no list.
    """
    if given is None:
        return []
    if isinstance(given, (str, bytes, os.PathLike, np.ndarray, Mapping)) or not isinstance(given, Iterable):
        raise UsageError(f"cannot use {kind}s", f"{kind}s", "a list is needed", f"Put the {kind} into a list")
    return list(given)


def _pixels(medium: Medium) -> int:
    if isinstance(medium, Clip):
        return medium.frames.size // 3
    return medium.width * medium.height


def in_order(
    media: Iterable[Medium], ids: Sequence[int], tokens: Sequence[int], video_id: int | None, image_id: int | None
) -> tuple[Medium, ...]:
    """Images and videos in the order of their placeholders.

    Args:
        media: images in their order and videos in theirs, however mixed.
        ids: of the prompt, placeholders expanded.
        tokens: that each of `media` takes.
        video_id, image_id: the placeholders.
    """
    pairs = list(zip(media, tokens, strict=True))
    waiting = {
        image_id: iter([pair for pair in pairs if not isinstance(pair[0], Clip)]),
        video_id: iter([pair for pair in pairs if isinstance(pair[0], Clip)]),
    }
    found: list[Medium] = []
    place = 0
    while place < len(ids):
        pair = next(waiting[ids[place]], None) if ids[place] in waiting else None
        if pair is not None:
            found.append(pair[0])
        place += pair[1] if pair is not None else 1
    return tuple(found)
