"""Images from files and arrays, guarded: a file is judged by its header before a pixel is decoded.

Every refusal is worded here; a decoder's own messages are never passed on.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import IO, Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from model.errors import UsageError
from runtime.png_rows import rows_are_missing
from runtime.quiet_tiff import silence_libtiff

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_FILE_BYTES: Final = 256 * 1024 * 1024
MAX_PIXELS: Final = 64 * 1000 * 1000
# The decoder of WebP takes 16 bytes a pixel, four times as many as the others, from files of a kilobyte too.
MAX_WEBP_PIXELS: Final = 32 * 1000 * 1000

_SHOWN_FORMATS: Final = "PNG, JPEG, WebP, BMP, GIF or TIFF"
_ORIENTATION_TAG: Final = 0x0112
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders are known to raise on damaged files.
_DECODER_FAULTS: Final = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, AssertionError,
    OverflowError, MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# warnings.catch_warnings changes global state; two threads must not do so at once.
_header_lock = threading.Lock()
_log = logging.getLogger("exaone_export.runtime")
# Without a handler, Python would print what Pillow logs of damaged files.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads an image file as a decoded image of 8-bit values, upright.

    The first frame of an animation or page of a document is taken, with a logged warning. The EXIF orientation
    is applied (transformers leaves that to the caller). 16-bit grey is scaled to 8 bits, not clipped. Colour
    profiles are ignored.

    Args:
        path: an ordinary file, at most `MAX_FILE_BYTES` long, in one of `FORMATS`, of at most `MAX_PIXELS` pixels, or
            `MAX_WEBP_PIXELS`.

    Raises:
        UsageError: anything else, or damaged or truncated data; the message names the file.
    """
    shown = display_name(os.fspath(path))
    with open_ordinary(path, shown, image_refusal, MAX_FILE_BYTES) as stream:
        image = _read_header(stream, shown)
        check_size(image, shown)
        kind = image.format
        try:
            if image.format != "MPO" and getattr(image, "is_animated", False):
                _log.warning("%s has several frames or pages; the first one is used", shown)
                image.seek(0)
            if image.format == "TIFF":
                silence_libtiff()
            with _header_lock, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of faults beside the pixels
                image.load()
            whole = image.format != "PNG" or not rows_are_missing(stream, image)
            if image.format == "WEBP":
                image = image.copy()  # without the decoder, which keeps half of its memory
        except _DECODER_FAULTS:
            whole = False
        if not whole:
            raise image_refusal(shown, f"damaged or truncated {kind} data", "Use an intact file")
        return _upright(_eight_bit(image, shown), shown)


def display_name(name: str | bytes) -> str:
    """A file name fit for a message: control characters and undecodable bytes are escaped, 200 characters at most."""
    text = os.fsdecode(name)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= 200 else "…" + text[-199:]


def image_refusal(shown: str, why: str, remedy: str = "") -> UsageError:
    """The error for an image that cannot be used; `shown` names it."""
    return UsageError("cannot read image", shown, why, remedy)


def open_ordinary(
    path: str | os.PathLike[str], shown: str, refusal: Callable[[str, str, str], UsageError], most: int
) -> BinaryIO:
    """Opens once and judges what was opened, so that nothing can be swapped in between.

    Args:
        path: of a file.
        shown: what messages call it.
        refusal: makes the error of `shown`, a reason and a remedy.
        most: bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as reason:
        why = getattr(reason, "strerror", None) or "not a usable file name"
        raise refusal(shown, why.lower(), "Check the path") from None
    status = os.fstat(descriptor)
    why = ""
    if not stat.S_ISREG(status.st_mode):
        why = "it is not an ordinary file"
    elif status.st_size == 0:
        why = "the file is empty"
    elif status.st_size > most:
        why = f"{status.st_size} bytes, more than the {most} allowed"
    if why:
        os.close(descriptor)
        raise refusal(shown, why, "")
    return os.fdopen(descriptor, "rb")


def _read_header(stream: IO[bytes], shown: str) -> Image.Image:
    with _header_lock, warnings.catch_warnings():
        # Pillow only warns of up to twice its own limit; ours is lower and is checked by the caller.
        warnings.simplefilter("ignore")
        try:
            return Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError:
            raise image_refusal(shown, f"not a readable {_SHOWN_FORMATS} file", "Convert it first") from None
        except Image.DecompressionBombError:
            raise image_refusal(shown, f"more than the {MAX_PIXELS} pixels allowed", "Scale it down first") from None
        except _DECODER_FAULTS:
            raise image_refusal(shown, "damaged image header", "Use an intact file") from None


def check_size(image: Image.Image, shown: str) -> None:
    """Refuses an image of no pixels or of too many, by its header. Raises UsageError."""
    width, height = image.size
    if width < 1 or height < 1:
        raise image_refusal(shown, f"{width}x{height} pixels")
    most, of_what = (MAX_WEBP_PIXELS, " of a WebP file") if image.format == "WEBP" else (MAX_PIXELS, "")
    if width * height > most:
        why = f"{width}x{height} pixels, more than the {most} allowed{of_what}"
        raise image_refusal(shown, why, "Scale it down first")


def _eight_bit(image: Image.Image, shown: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        high_bytes = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(high_bytes)
    if image.mode in ("F", "I"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise image_refusal(shown, f"{kind} pixels have no agreed range", "Convert it to 8 or 16 bits per channel")
    return image


def upright(image: Image.Image, shown: str) -> Image.Image:
    """An image that the caller has opened, turned as its EXIF data say; from a file, `load_image` does so.

    Raises:
        UsageError: it is too large, or cannot be decoded; `shown` names it.
    """
    check_size(image, shown)
    try:
        return _upright(image, shown)
    except _DECODER_FAULTS:
        raise image_refusal(shown, "damaged or truncated data", "Use an intact image") from None


def _upright(image: Image.Image, shown: str) -> Image.Image:
    try:
        with _header_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged data; ours says the same
            orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DECODER_FAULTS:
        _log.warning("%s has unreadable EXIF data, which is ignored", shown)
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info.pop("exif", None)
    return turned


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """An RGB image; what is transparent lies on white, as in transformers. `name` is for messages.

    Raises:
        UsageError: the colour model cannot be converted, or the pixels are not of 8 bits.
    """
    image = _eight_bit(image, name)
    try:
        if "A" not in image.getbands() and image.info.get("transparency") is None:
            return image.convert("RGB")
        flat = Image.new("RGB", image.size)
        rows = max(1, (1 << 22) // image.width)
        # In strips, because a whole image in RGBA, twice, would be the largest thing in memory.
        for top in range(0, image.height, rows):
            box = (0, top, image.width, min(top + rows, image.height))
            strip = image.crop(box).convert("RGBA")
            white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
            flat.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    except _DECODER_FAULTS:
        why = f"pixels of mode {image.mode!r} cannot be converted to RGB"
        raise image_refusal(name, why, "Convert it first") from None
    return flat


def from_array(array: npt.NDArray[Any]) -> Image.Image:
    """An image of a uint8 array [height, width], [height, width, 3] or [height, width, 4] (RGB, RGBA).

    Raises:
        UsageError: another type or shape.
    """
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise image_refusal("array", f"{array.dtype} {list(array.shape)}", "Give uint8 [height, width, 3]")
    if array.size == 0:
        raise image_refusal("array", f"no pixels in {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))
