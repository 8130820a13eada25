"""Image files, read as a prompt's are; PNG and BMP are decoded once more here, without Pillow."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.config import parse_config
from runtime.image import ImageProcessor
from runtime.image_file import MAX_PIXELS, load_image, to_rgb
from tests.fuzz.mutators import strict_json
from tests.fuzz.pictures import good_images, png_chunks, spoiled_image
from tests.fuzz.target import Target

Pixels = npt.NDArray[np.uint8]
_COMPARED = 1 << 20  # pixels; larger ones would take more memory here than where they are used


class Picture(Target):
    """An image of any accepted format."""

    name, codes = "image", frozenset({2})
    long = 120_000

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._good = good_images()
        vision = parse_config(strict_json((corpus / "vision" / "config.json").read_bytes())).vision
        assert vision is not None
        self._processor = ImageProcessor.from_config({"min_pixels": 784, "max_pixels": 40_000}, vision)
        for raw in self._good.values():
            self.run(raw)

    def mutant(self, random: Random) -> bytes:
        name = random.choice(list(self._good))
        return spoiled_image(name, self._good[name], random)

    def run(self, data: bytes) -> tuple[Image.Image, Pixels | None]:
        path = self.scratch / "image"
        path.write_bytes(data)
        image = load_image(path)
        self._processor.scaled(image)
        return image, np.asarray(to_rgb(image)) if image.width * image.height <= _COMPARED else None

    def judge(self, data: bytes, accepted: tuple[Image.Image, Pixels | None]) -> str:
        image, pixels = accepted
        if image.width * image.height > MAX_PIXELS:
            return f"{image.size} pixels"
        if pixels is None:
            return ""
        if pixels.shape != (image.height, image.width, 3):
            return f"{image.size}, pixels {pixels.shape}"
        if data.startswith(b"\x89PNG"):
            return _wrong_png(data, image, pixels)
        stated = _stated_size(data)
        turned = (image.height, image.width)
        if stated is not None and stated not in (image.size, turned):
            return f"{image.size}, the file says {stated}"
        own = _bmp_pixels(data)
        return "" if own is None or np.array_equal(own, pixels) else "other pixels"


def _stated_size(data: bytes) -> tuple[int, int] | None:
    if data.startswith(b"GIF8"):
        return None  # the first frame may be larger than the screen
    if data.startswith(b"BM") and len(data) > 26 and data[14:18] == b"\x28\0\0\0":
        width, height = struct.unpack("<ii", data[18:26])
        return width, abs(height)
    return None


def _bmp_pixels(data: bytes) -> Pixels | None:
    """Pixels of a BMP of 24 bits from below upwards; None for any other."""
    if not data.startswith(b"BM") or len(data) < 54 or data[14:18] != b"\x28\0\0\0":
        return None
    offset = int.from_bytes(data[10:14], "little")
    width, height, _, bits, compression = struct.unpack("<iiHHI", data[18:34])
    row = (3 * width + 3) // 4 * 4
    if bits != 24 or compression or width < 1 or height < 1 or offset < 54 or len(data) < offset + row * height:
        return None
    rows = np.frombuffer(data, np.uint8, row * height, offset).reshape(height, row)[::-1, : 3 * width]
    return rows.reshape(height, width, 3)[:, :, ::-1]


def _wrong_png(data: bytes, image: Image.Image, pixels: Pixels) -> str:
    chunks = png_chunks(data)
    header = next((content for kind, content in chunks if kind == b"IHDR"), b"")
    if len(header) < 13:
        return "there is no header"
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    if sum(kind == b"IHDR" for kind, _ in chunks) > 1 or any(
        kind in (b"eXIf", b"acTL", b"fcTL", b"zTXt") for kind, _ in chunks
    ):
        return ""  # turned, animated, or with a second header
    if (width, height) != image.size:
        return f"{image.size}, the file says {(width, height)}"
    if (depth, colour, interlaced) != (8, 2, 0) or any(kind == b"tRNS" for kind, _ in chunks):
        return ""
    own = _png_pixels(chunks, width, height)
    return "" if own is not None and np.array_equal(own, pixels) else "other pixels, or not all of them"


def _png_pixels(chunks: list[tuple[bytes, bytes]], width: int, height: int) -> Pixels | None:
    """Pixels of a PNG with 8 bits RGB, not interlaced; None where it does not hold them."""
    unpacker, row = zlib.decompressobj(), 1 + 3 * width
    try:
        # What is behind the last row, a wrong checksum included, changes no pixel.
        raw = unpacker.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"), row * height)
    except zlib.error:
        return None
    if len(raw) < row * height:
        return None
    above, rows = bytearray(3 * width), []
    for y in range(height):
        kind, line = raw[y * row], bytearray(raw[y * row + 1 : (y + 1) * row])
        for x in range(3 * width):
            left, up, corner = (line[x - 3] if x > 2 else 0), above[x], (above[x - 3] if x > 2 else 0)
            line[x] = (line[x] + _predicted(kind, left, up, corner)) & 255
        rows.append(bytes(line))
        above = line
    return np.frombuffer(b"".join(rows), np.uint8).reshape(height, width, 3)


def _predicted(kind: int, left: int, up: int, corner: int) -> int:
    if kind == 4:
        paeth = left + up - corner
        distances = (abs(paeth - left), abs(paeth - up), abs(paeth - corner))
        return (left, up, corner)[distances.index(min(distances))]
    return {1: left, 2: up, 3: (left + up) // 2}.get(kind, 0)
