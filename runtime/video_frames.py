"""Videos given as frames: a folder of images, a list of images, an array."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtime.image_file import check_size, display_name, from_array, load_image, to_rgb, upright
from runtime.video import Frame, video_refusal
from runtime.video_file import VideoFile

MAX_FRAMES: Final = 1 << 20
_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")

FrameInput = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]
FrameSource = str | os.PathLike[str] | Sequence[FrameInput] | npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Frames:
    """A video as frames, with the rate that they were taken at.

    Attributes:
        source: a folder of images, which are taken in the order of their names ("2" before "10"), a list of paths,
            Pillow images and uint8 arrays [height, width, 3], or one array [frames, height, width, 3].
        fps: frames a second; None where that is unknown.
    """

    source: FrameSource
    fps: float | None = None


VideoInput = FrameSource | Frames


class OpenVideo(Protocol):
    """Where frames come from; `runtime.video_file.VideoFile` has it too.

    Attributes:
        name: what messages call it.
        frames: how many there are.
        rate: of them a second, or None.
        height, width: of the first, in pixels.
    """

    name: str
    frames: int
    rate: float | None
    height: int
    width: int

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """The frames of these numbers, which rise: uint8 [height, width, 3]."""

    def close(self) -> None:
        """Frees what it holds."""


class FrameList:
    """Frames that are images; only those that are read are loaded."""

    def __init__(self, frames: Sequence[FrameInput], rate: float | None, name: str) -> None:
        if not 0 < len(frames) <= MAX_FRAMES:
            raise video_refusal(name, f"{len(frames)} frames" if len(frames) else "it has no frames")
        self.name, self.frames, self.rate = name, len(frames), rate
        self._frames = frames
        first = self._load(0)
        self.height, self.width = first.shape[:2]

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """As `OpenVideo`; raises UsageError for a frame that is no image, or of another size than the first."""
        for index in indices:
            frame = self._load(index)
            if frame.shape[:2] != (self.height, self.width):
                size = f"{frame.shape[1]}x{frame.shape[0]}, the first one {self.width}x{self.height}"
                raise video_refusal(self.name, f"frame {index} has {size} pixels", "Bring all frames to one size")
            yield frame

    def close(self) -> None:
        """Nothing is held."""

    def _load(self, index: int) -> Frame:
        frame: Any = self._frames[index]
        name = f"{self.name}[{index}]"
        if isinstance(frame, (str, os.PathLike)):
            image, name = load_image(frame), display_name(os.fspath(frame))
        elif isinstance(frame, np.ndarray):
            image = from_array(frame)
        elif isinstance(frame, Image.Image):
            image = upright(frame, name)
        else:
            why = f"frame {index} is a {type(frame).__name__}"
            raise video_refusal(self.name, why, "Give paths, Pillow images or uint8 arrays")
        check_size(image, name)
        return np.asarray(to_rgb(image, name))


def open_video(video: VideoInput, name: str) -> OpenVideo:
    """Opens a video of any form.

    Args:
        video: a file, a folder, a list, an array, or `Frames`.
        name: what messages call it where it has no name of its own.

    Raises:
        UsageError: it cannot be used.
        EnvironmentFault: it is a file, and PyAV is not installed.
    """
    rate, source = (video.fps, video.source) if isinstance(video, Frames) else (None, video)
    if isinstance(source, (str, os.PathLike)):
        if not _is_folder(source):
            return VideoFile(source)
        return FrameList(_images_in(Path(source)), rate, display_name(os.fspath(source)))
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise video_refusal(name, f"{source.dtype} {list(source.shape)}", "Give uint8 [frames, height, width, 3]")
        return FrameList(list(source), rate, name)
    if isinstance(source, (list, tuple)):
        return FrameList(source, rate, name)
    why = f"it is a {type(source).__name__}"
    raise video_refusal(name, why, "Give a file, a folder of images, or a list of frames")


def _is_folder(path: str | os.PathLike[str]) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def _images_in(folder: Path) -> list[FrameInput]:
    """A folder's images in the order of their names, numbers in them counted as numbers."""
    shown = display_name(os.fspath(folder))
    try:
        names = [path.name for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.name[0] != "."]
    except OSError as reason:
        raise video_refusal(shown, (reason.strerror or "unreadable").lower(), "Check the path") from None
    if not names:
        raise video_refusal(shown, "there are no images in the folder", "Give a folder of PNG, JPEG or WebP frames")
    return [folder / name for name in sorted(names, key=_by_number)]


def _by_number(name: str) -> tuple[list[tuple[int, int, str]], str]:
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(piece[:18]), "") if "0" <= piece[0] <= "9" else (1, 0, piece) for piece in pieces], name
