"""Whether a PNG file holds all the rows that its header promises.

Pillow takes compressed data that ends early, and leaves the rest black. Counting what the data come to would cost a
second decompression, so only files whose last rows came out black are counted.
Format: https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import IO, Final

from PIL import Image

_SIGNATURE: Final = 8
_PIECE: Final = 1 << 16
_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Of each pass of an interlaced file: first column and row, and how far the next ones are.
_PASSES: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def rows_are_missing(stream: IO[bytes], image: Image.Image) -> bool:
    """Whether a PNG's data end before its last row, or its header is not where it has to be.

    Args:
        stream: the file; read from its beginning.
        image: decoded from it.
    """
    stream.seek(_SIGNATURE + 4)
    if stream.read(4) != b"IHDR":
        return True
    if not _ends_black(image):
        return False
    header = stream.read(13)
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (0, 4))
    needed = _data_bytes(width, height, header[8] * _CHANNELS.get(header[9], 1), interlaced=header[12] != 0)
    unpacker = zlib.decompressobj()
    found = 0
    try:
        for piece in _data(stream):
            while piece and found < needed:
                found += len(unpacker.decompress(piece, _PIECE))
                piece = unpacker.unconsumed_tail
    except zlib.error:
        return True
    return found < needed


def _ends_black(image: Image.Image) -> bool:
    """Whether all of the last row is 0, or all of the last one that the last pass of an interlaced file writes."""
    rows = {image.height - 1, (image.height // 2) * 2 - 1} - {-1}
    extrema = [image.crop((0, row, image.width, row + 1)).getextrema() for row in rows]
    return any(_highest(one) == 0 for one in extrema)


def _highest(extrema: object) -> float:
    """Of one channel (lowest, highest), or of several."""
    if isinstance(extrema, tuple) and extrema and isinstance(extrema[0], tuple):
        return max(map(_highest, extrema))
    return float(extrema[1]) if isinstance(extrema, tuple) else 0.0


def _data_bytes(width: int, height: int, bits: int, *, interlaced: bool) -> int:
    """What the rows come to, each with the byte of its filter."""
    sizes = [(width, height)]
    if interlaced:
        sizes = [
            (-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _PASSES if x < width and y < height
        ]
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes)


def _data(stream: IO[bytes]) -> Iterator[bytes]:
    """The compressed data, in pieces."""
    stream.seek(_SIGNATURE)
    while len(start := stream.read(8)) == 8:
        left = int.from_bytes(start[:4], "big")
        if start[4:] == b"IEND":
            return
        if start[4:] == b"IDAT":
            while left and (piece := stream.read(min(left, _PIECE))):
                left -= len(piece)
                yield piece
        stream.seek(left + 4, 1)
