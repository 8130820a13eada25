"""Images of every accepted format, and damage that leaves lengths and checksums right, so that it reaches decoders."""

from __future__ import annotations

import io
import struct
import zlib
from random import Random
from typing import Any, Final

import numpy as np
from PIL import Image, PngImagePlugin

from tests.fuzz.mutators import INTEGERS, spoiled

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_KINDS: Final = (
    b"IHDR",
    b"PLTE",
    b"IDAT",
    b"IEND",
    b"tRNS",
    b"iCCP",
    b"zTXt",
    b"tEXt",
    b"eXIf",
    b"acTL",
    b"fcTL",
    b"gAMA",
)


def good_images() -> dict[str, bytes]:
    """Small images by name: formats, colour models and compressions."""
    rng = np.random.default_rng(5)
    rgb = Image.fromarray(rng.integers(0, 255, (18, 23, 3), np.uint8))
    smooth = rgb.resize((40, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 40, zip=True)
    found: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, form: str, **options: Any) -> None:
        stream = io.BytesIO()
        image.save(stream, form, **options)
        found[name] = stream.getvalue()

    add("png", rgb, "PNG")
    add("png-text", rgb.convert("RGBA"), "PNG", pnginfo=text, exif=exif)
    add("png-palette", rgb.convert("P"), "PNG", transparency=3)
    add("png-1", rgb.convert("1"), "PNG")
    add("png-16", Image.fromarray(rng.integers(0, 65535, (9, 11), np.uint16)), "PNG")
    add("png-animated", rgb, "PNG", save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)])
    add("jpeg", smooth, "JPEG", quality=80, exif=exif)
    add("jpeg-progressive", smooth, "JPEG", progressive=True, quality=60)
    add("jpeg-cmyk", smooth.convert("CMYK"), "JPEG")
    add("jpeg-grey", smooth.convert("L"), "JPEG", restart_marker_blocks=2)
    add("webp", smooth, "WEBP", quality=60, exif=exif)
    add("webp-lossless", rgb.convert("RGBA"), "WEBP", lossless=True)
    add("webp-animated", rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)])
    add("bmp", rgb, "BMP")
    add("bmp-palette", rgb.convert("P"), "BMP")
    add("gif", rgb.convert("P"), "GIF")
    add(
        "gif-animated",
        rgb.convert("P"),
        "GIF",
        save_all=True,
        append_images=[rgb.rotate(90).convert("P")],
        transparency=1,
    )
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        add(f"tiff-{compression}", rgb, "TIFF", compression=compression)
    add("tiff-fax", rgb.convert("1"), "TIFF", compression="group4")
    add("tiff-16", Image.fromarray(rng.integers(0, 65535, (9, 11), np.uint16)), "TIFF")
    return found


def spoiled_image(name: str, raw: bytes, random: Random) -> bytes:
    """One image, damaged."""
    chance = random.random()
    if chance < 0.25:
        return spoiled(raw, random)
    if chance < 0.4:
        return spoiled(raw, random, end=min(len(raw), 64))
    kind = name.partition("-")[0]
    change = {"png": _png, "jpeg": _jpeg, "webp": _webp, "tiff": _tiff}.get(kind)
    return change(raw, random) if change is not None else _numbers(raw, random, min(len(raw), 120))


def _numbers(raw: bytes, random: Random, end: int) -> bytes:
    data = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 3))):
        size = random.choice((1, 2, 4))
        at = random.randrange(max(1, end - size))
        data[at : at + size] = (random.choice(INTEGERS) % (1 << (8 * size))).to_bytes(size, "little")
    return bytes(data)


def png_chunks(raw: bytes) -> list[tuple[bytes, bytes]]:
    """Kinds and contents, the last one as far as it goes; checksums are not looked at."""
    at, found = len(_PNG), []
    while at + 12 <= len(raw):
        size = int.from_bytes(raw[at : at + 4], "big")
        found.append((raw[at + 4 : at + 8], raw[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A file with the right checksums."""
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return _PNG + b"".join(parts)


def _png(raw: bytes, random: Random) -> bytes:
    chunks = png_chunks(raw)
    for _ in range(random.choice((1, 1, 2))):
        place = random.randrange(len(chunks))
        kind, data = chunks[place]
        change = random.randrange(7)
        if change == 0:
            del chunks[place]
        elif change == 1:
            chunks.insert(random.randrange(len(chunks) + 1), (random.choice(_KINDS), data))
        elif change == 2:
            bomb = zlib.compress(bytes(random.choice((1000, 3_000_000))), 9)
            chunks.insert(1, (b"zTXt", b"a\0\0" + bomb) if random.random() < 0.5 else (b"iCCP", b"a\0\0" + bomb))
        elif kind == b"IDAT" and change < 5:
            try:
                pixels = zlib.decompress(data)
            except zlib.error:
                pixels = data
            chunks[place] = kind, zlib.compress(spoiled(pixels, random) if pixels else b"\0")
        elif kind == b"IHDR" and len(data) >= 8 and change < 5:
            numbers = [
                random.choice(INTEGERS) % (1 << 32) if random.random() < 0.3 else n
                for n in struct.unpack(">II", data[:8])
            ]
            rest = bytes(
                random.choice((0, 1, 2, 3, 4, 6, 8, 16, 255)) if random.random() < 0.3 else b for b in data[8:]
            )
            chunks[place] = kind, struct.pack(">II", *numbers) + rest
        else:
            chunks[place] = kind, spoiled(data or b"\0", random)
        if not chunks:
            return _PNG
    return png_of(chunks)


def _jpeg(raw: bytes, random: Random) -> bytes:
    """A change in one segment, whose length is corrected."""
    at, places = 2, []
    while at + 4 <= len(raw) and raw[at] == 0xFF and raw[at + 1] != 0xDA:
        size = int.from_bytes(raw[at + 2 : at + 4], "big")
        places.append((at, at + 2 + size))
        at += 2 + size
    if not places or random.random() < 0.3:
        return spoiled(raw, random, start=min(at, len(raw) - 1))
    start, end = random.choice(places)
    marker, content = raw[start : start + 2], spoiled(raw[start + 4 : end] or b"\0", random)
    if random.random() < 0.15:
        marker = bytes([0xFF, random.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xDB, 0xDD, 0xE1, 0xEE, 0xFE))])
    new = marker + ((len(content) + 2) % 65536).to_bytes(2, "big") + content
    again = raw[start:end] if random.random() < 0.1 else b""
    return raw[:start] + new + again + raw[end:]


def _webp(raw: bytes, random: Random) -> bytes:
    """A change in one chunk, with sizes that fit."""
    at, chunks = 12, []
    while at + 8 <= len(raw):
        size = int.from_bytes(raw[at + 4 : at + 8], "little")
        chunks.append((raw[at : at + 4], raw[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    place = random.randrange(len(chunks))
    kind, content = chunks[place]
    change = random.randrange(6)
    if change == 0:
        del chunks[place]
    elif change == 1:
        chunks.insert(place, random.choice(chunks))
    elif change == 2:
        chunks[place] = random.choice((b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF", b"ICCP")), content
    else:
        chunks[place] = (
            kind,
            spoiled(content or b"\0", random, end=min(len(content) or 1, random.choice((16, 1 << 20)))),
        )
    body = b"".join(k + struct.pack("<I", len(c)) + c + b"\0" * (len(c) % 2) for k, c in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _tiff(raw: bytes, random: Random) -> bytes:
    """A change in one entry of the first directory."""
    data = bytearray(raw)
    order = "little" if raw[:2] == b"II" else "big"
    start = int.from_bytes(raw[4:8], order)  # type: ignore[arg-type]
    count = int.from_bytes(raw[start : start + 2], order)  # type: ignore[arg-type]
    for _ in range(random.choice((1, 1, 2))):
        entry = start + 2 + 12 * random.randrange(max(1, count))
        offset, size = random.choice(((0, 2), (2, 2), (4, 4), (8, 4), (8, 2)))
        own = int.from_bytes(data[entry + offset : entry + offset + size], order)  # type: ignore[arg-type]
        near = (
            own + 1,
            own - 1,
            own * 2,
            random.choice((254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 317, 338, 34665)),
        )
        value = random.choice(near) if random.random() < 0.5 else random.choice(INTEGERS)
        data[entry + offset : entry + offset + size] = (value % (1 << (8 * size))).to_bytes(size, order)  # type: ignore[arg-type]
    return bytes(data)
