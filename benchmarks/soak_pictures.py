"""Pictures and videos of the soak: pages in every form a caller may give, and things that are no pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
from PIL import Image

from exaone_export.demo.render import Page, render_page
from tests.videos import write_video

# Forms by which a page is given: in memory, or as a file.
FORMS: Final = ("array", "pillow", "png", "jpeg", "cmyk", "palette", "16 bits", "turned", "alpha", "webp")
BAD_FORMS: Final = ("truncated", "text", "missing", "folder", "wide", "float", "bomb", "empty", "number")
# Width and height that no grid of 28 pixels has; the processor scales them.
ODD_SIZES: Final = (
    (131, 77), (29, 333), (333, 29), (640, 480), (97, 97), (1001, 63), (57, 200), (15, 15), (480, 640), (211, 85),
)  # fmt: skip
_TURNED: Final = 6  # EXIF's number for "turn right by 90 degrees"
_ORIENTATION: Final = 0x0112


@dataclass(frozen=True)
class Picture:
    """A page as it is given.

    Attributes:
        page: what it shows.
        form: one of `FORMS` or `BAD_FORMS`.
        size: width and height in pixels where they are not the page's.
    """

    page: Page
    form: str = "array"
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Video:
    """Pages as frames; of a file where `coded` says so."""

    pages: tuple[Page, ...]
    size: tuple[int, int]
    coded: bool = False


class Pictures:
    """Draws pictures when they are asked for; files are written once.

    Args:
        folder: for files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def image(self, picture: Picture) -> Any:
        """What `Engine.generate` takes, good or bad."""
        if picture.form in BAD_FORMS:
            return self._bad(picture)
        drawn = render_page(picture.page)
        if picture.size is not None:
            drawn = drawn.resize(picture.size)
        if picture.form == "array":
            return np.array(drawn)
        if picture.form in ("pillow", "alpha"):
            return drawn.convert("RGBA" if picture.form == "alpha" else "RGB")
        path = self._path(picture, {"jpeg": "jpg", "cmyk": "jpg", "turned": "jpg", "webp": "webp"})
        if not path.exists():
            _write(drawn, path, picture.form)
        return str(path)

    def video(self, video: Video) -> Any:
        """Frames, or the path of a file with them."""
        frames = [np.array(render_page(page).resize(video.size)) for page in video.pages]
        if not video.coded:
            return frames
        path = self._path(video, {}, ".mp4")
        if not path.exists():
            write_video(path, frames)
        return str(path)

    def _path(self, shown: Picture | Video, endings: dict[str, str], ending: str = ".png") -> Path:
        if isinstance(shown, Picture) and shown.form in endings:
            ending = f".{endings[shown.form]}"
        return self._folder / (Random(repr(shown)).randbytes(8).hex() + ending)

    def _bad(self, picture: Picture) -> Any:
        drawn = render_page(picture.page)
        in_memory: dict[str, Any] = {
            "missing": str(self._folder / "missing.png"),
            "folder": str(self._folder),
            "wide": drawn.resize((600, 2)),
            "float": np.zeros((28, 28, 3), np.float32),
            "empty": np.zeros((0, 28, 3), np.uint8),
            "number": 7,
        }
        if picture.form in in_memory:
            return in_memory[picture.form]
        path = self._path(picture, {})
        if not path.exists():
            drawn.save(path)
            data = path.read_bytes()
            if picture.form == "bomb":  # a header that promises more than there is
                data = data[:16] + (60_000).to_bytes(4, "big") * 2 + data[24:]
            path.write_bytes(b"no picture" if picture.form == "text" else data[: len(data) * 2 // 3])
        return str(path)


def _write(image: Image.Image, path: Path, form: str) -> None:
    if form == "cmyk":
        image.convert("CMYK").save(path, quality=95)
    elif form == "palette":
        image.quantize(16).save(path)
    elif form == "16 bits":
        Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257).save(path)
    elif form == "turned":
        exif = Image.Exif()
        exif[_ORIENTATION] = _TURNED
        image.rotate(90, expand=True).save(path, quality=95, exif=exif)
    else:
        image.save(path, **({"lossless": True} if form == "webp" else {}))


def odd_size(number: int) -> tuple[int, int]:
    """One of `ODD_SIZES`, in turn."""
    return ODD_SIZES[number % len(ODD_SIZES)]


def forms(number: int, of: Sequence[str] = FORMS) -> str:
    """One of the forms, in turn."""
    return of[number % len(of)]
