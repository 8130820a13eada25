"""I01 to I14: images that are refused, and how, and images that are accepted, and as what.

Numbers are those of the table of faults that the toolkit is tried against. What is accepted equals transformers' image
processor (`tests/parity/test_image_parity.py`); here it is that the file becomes the picture that it shows. I15 is in
`tests/e2e/test_video.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from model.config import load_config
from model.errors import UsageError
from runtime.image_file import load_image, to_rgb
from runtime.media import MediaReader
from runtime.media_key import media_key
from runtime.options import GenerationOptions
from tests.peak import peak_growth
from tests.tiny import make_config, write_assets
from tests.unit.test_image import noise, png

Make = Callable[[Path], object]
SIZE = (40, 60)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> MediaReader:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "config.json").write_text(json.dumps(make_config("vlm", max_position_embeddings=262144)))
    write_assets(folder, vision=True)
    return MediaReader(folder, load_config(folder))


def content(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cut(kind: str, share: float) -> Make:
    data = saved(noise("RGB", 200, 300), kind)
    return content(data[: int(len(data) * share)])


FLOATS = saved(Image.fromarray(np.linspace(0, 1, 2400, dtype=np.float32).reshape(SIZE)), "TIFF")
REFUSED: dict[str, Make] = {
    "i01 empty": content(b""),
    "i01 two bytes": content(b"\x89P"),
    "i01 text": content(b"plain text"),
    "i01 svg": content(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "i01 pdf": content(b"%PDF-1.7\n"),
    "i01 zip": content(b"PK\x03\x04" + bytes(60)),
    "i01 html": content(b"<!DOCTYPE html><html></html>"),
    "i02 a tenth of a jpeg": cut("JPEG", 0.1),
    "i02 60 percent of a jpeg": cut("JPEG", 0.6),
    "i02 99 percent of a jpeg": cut("JPEG", 0.99),
    "i02 half a webp": cut("WEBP", 0.5),
    "i04 50000x50000": content(png(50_000, 50_000)),
    "i04 13000x13000": content(png(13_000, 13_000)),
    "i04 100 megapixels": content(png(10_000, 10_000)),
    "i06 0x0": content(png(0, 0)),
    "i06 1x10000": content(saved(Image.new("L", (1, 10_000)), "PNG")),
    "i06 20000x10": content(saved(Image.new("L", (20_000, 10)), "PNG")),
    "i06 201 to 1": content(saved(Image.new("L", (201, 1)), "PNG")),
    "i07 floats": content(FLOATS),
    "i07 32 bits": content(saved(Image.fromarray(np.full(SIZE, 1 << 20, np.int32)), "TIFF")),
    "i13 a folder": lambda path: path.mkdir(),
    "i13 a pipe": lambda path: os.mkfifo(path),
    "i13 a device": lambda path: path.symlink_to("/dev/zero"),
    "i13 a process": lambda path: path.symlink_to("/proc/self/mem"),
    "i13 a link to a folder": lambda path: path.symlink_to(path.parent),
    "i13 a link to nothing": lambda path: path.symlink_to("nothing"),
    "i13 nothing": lambda path: None,
    "i14 fits": content(b"SIMPLE  =                    T" + bytes(2880)),
    "i14 eps": content(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "i14 tga": content(bytes([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 4, 0, 24, 0]) + bytes(48)),
    "i14 hdf5": content(b"\x89HDF\r\n\x1a\n" + bytes(60)),
    "i14 mpeg": content(b"\0\0\x01\xb3\x14\0\xf0\x13" + bytes(60)),
    "i14 xbm": content(b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0};"),
    "i14 ppm": content(b"P6\n1 1\n255\nabc"),
    "i14 psd": content(b"8BPS\x00\x01" + bytes(40)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, reader: MediaReader, tmp_path: Path) -> None:
    path = tmp_path / "그림 a.png"
    REFUSED[name](path)
    with peak_growth() as growth, pytest.raises(UsageError) as caught:
        reader.scaled([path])
    assert growth() < 50 << 20
    text = str(caught.value)
    assert "그림 a.png" in text
    assert (re.search(r"pixels allowed|, more than the \d+ allowed", text) is not None) is name.startswith("i04")
    assert "\n" not in text
    assert re.search(r"0x[0-9a-f]{6,}", text) is None
    assert len(text) < 300 + len(str(path))


def test_i03_flipped_bytes_that_still_decode(tmp_path: Path) -> None:
    whole = saved(noise("RGB", 200, 300), "JPEG")
    path, accepted = tmp_path / "a.jpg", 0
    for at in range(len(whole) // 2, len(whole) - 2, 997):
        data = bytearray(whole)
        data[at] ^= 0x10
        path.write_bytes(data)
        with contextlib.suppress(UsageError):
            accepted += load_image(path).size == (300, 200)
    assert accepted > 5


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"eXIf"])
def test_i05_bombs_beside_the_picture(tmp_path: Path, kind: bytes) -> None:
    heads = {b"zTXt": b"key\0\0", b"iCCP": b"profile\0\0", b"eXIf": b"MM\0*\0\0\0\x08\xff\xff"}
    path = tmp_path / "a.png"
    path.write_bytes(png(60, 60, (kind, heads[kind] + zlib.compress(bytes(200 << 20), 9))))
    with peak_growth() as growth:
        try:
            assert load_image(path).size == (60, 60)
        except UsageError as error:
            assert "damaged" in error.why
        assert growth() < 100 << 20


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(1, 1, 4), (27, 27, 4), (28, 28, 4), (200, 1, 29), (56, 56, 4), (55, 57, 4), (1792, 1792, 4096),
     (1793, 1791, 4096), (1820, 1792, 64 * 63)],
)  # fmt: skip
def test_i06_sizes_at_the_bounds(reader: MediaReader, width: int, height: int, tokens: int) -> None:
    (scaled,) = reader.scaled([Image.new("RGB", (width, height))])
    assert reader.tokens(scaled) == tokens
    values, grid = reader.patches(reader.pieces(scaled)[0])
    assert len(values) == grid.prod() == 4 * tokens


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SHOWN: dict[str, tuple[str, Image.Image, dict[str, Any]]] = {
    "i07 grey": ("PNG", noise("RGB", *SIZE).convert("L"), {}),
    "i07 grey and alpha": ("PNG", noise("RGB", *SIZE).convert("LA"), {}),
    "i07 one bit": ("PNG", noise("RGB", *SIZE).convert("1"), {}),
    "i07 palette": ("PNG", noise("RGB", *SIZE).convert("P"), {}),
    "i07 cmyk": ("TIFF", noise("RGB", *SIZE).convert("CMYK"), {}),
    "i07 progressive": ("JPEG", Image.linear_gradient("L").convert("RGB"), {"progressive": True}),
    "i07 profile": ("PNG", noise("RGB", *SIZE), {"icc_profile": PROFILE}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_i07_colour_models(name: str, tmp_path: Path) -> None:
    kind, image, options = SHOWN[name]
    path = tmp_path / "a"
    path.write_bytes(saved(image, kind, **options))
    found = np.asarray(to_rgb(load_image(path))).astype(int)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(found - expected).mean() < 1.5


def test_i07_inverted_cmyk_of_adobe(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    red = Image.new("RGB", (32, 32), (255, 0, 0)).convert("CMYK")
    path.write_bytes(saved(red, "JPEG", quality=95))
    assert b"Adobe" in path.read_bytes()  # inverted in the file, as Adobe's programs do it
    found = to_rgb(load_image(path)).getpixel((16, 16))
    assert isinstance(found, tuple)
    assert found[0] > 240
    assert max(found[1:]) < 15


def test_i07_interlaced(tmp_path: Path) -> None:
    rows = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    pixels = np.asarray(noise("L", 16, 16))
    lines = [b"\0" + row.tobytes() for y, dy, x, dx in rows for row in pixels[y::dy, x::dx]]
    head = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 1)
    (tmp_path / "a.png").write_bytes(png_of(head, b"".join(lines)))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), pixels)


def test_i07_transparent_pixels_hide_their_colours(tmp_path: Path) -> None:
    hidden = Image.merge("RGBA", [*noise("RGB", *SIZE).split(), Image.new("L", SIZE[::-1], 0)])
    hidden.save(tmp_path / "a.png")
    assert np.asarray(to_rgb(load_image(tmp_path / "a.png"))).min() == 255
    palette = Image.new("P", SIZE[::-1], 3)
    palette.putpalette([i for i in range(256) for _ in range(3)])
    palette.save(tmp_path / "p.png", transparency=3)
    assert np.asarray(to_rgb(load_image(tmp_path / "p.png"))).min() == 255


def test_i07_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(SIZE)
    (tmp_path / "grey.png").write_bytes(saved(Image.fromarray(ramp), "PNG"))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "grey.png")), ramp >> 8)
    (tmp_path / "rgb.png").write_bytes(deep_rgb(ramp))
    np.testing.assert_array_equal(np.asarray(to_rgb(load_image(tmp_path / "rgb.png")))[:, :, 1], ramp >> 8)


def deep_rgb(values: np.ndarray[Any, np.dtype[np.uint16]]) -> bytes:
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    return png_of(struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0), rows)


def png_of(head: bytes, rows: bytes) -> bytes:
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


TURNS: dict[int, Image.Transpose | None] = {
    0: None, 1: None, 9: None, 77: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNS)
def test_i08_orientation(tmp_path: Path, orientation: int) -> None:
    upright, exif, turn = noise("RGB", *SIZE), Image.Exif(), TURNS[orientation]
    exif[0x0112] = orientation
    stored = upright if turn is None else upright.transpose(turn)
    (tmp_path / "a.png").write_bytes(saved(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(upright))


def test_i08_an_image_that_the_caller_has_opened(reader: MediaReader, tmp_path: Path) -> None:
    """A file shows the same whoever opens it, alone or as a frame."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(saved(noise("RGB", *SIZE), "PNG", exif=exif))
    opened = Image.open(tmp_path / "a.png")
    forms: list[Any] = [tmp_path / "a.png", opened, opened.convert("RGBA")]
    alone = [media_key(reader.scaled([one])[0]) for one in forms]
    moving = [media_key(reader.scaled((), [[one] * 3])[0]) for one in forms]
    assert (len(set(alone)), len(set(moving))) == (1, 1)
    (tmp_path / "b.jpg").write_bytes(saved(noise("RGB", *SIZE), "JPEG", exif=exif)[:-300])
    with Image.open(tmp_path / "b.jpg") as damaged, pytest.raises(UsageError, match=r"images\[0\]: damaged"):
        reader.scaled([damaged])


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"])
def test_i08_unreadable_exif(tmp_path: Path, exif: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(saved(noise("RGB", *SIZE), "JPEG", exif=exif))
    assert load_image(tmp_path / "a.jpg").size == SIZE[::-1]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_i09_the_first_of_several_frames(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    red, blue = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    (tmp_path / "a").write_bytes(saved(red, kind, save_all=True, append_images=[blue], **options))
    with caplog.at_level(logging.WARNING, "exaone_export.runtime"):
        assert to_rgb(load_image(tmp_path / "a")).getpixel((5, 5)) == (255, 0, 0)
    assert "the first one is used" in caplog.text


@pytest.mark.parametrize("colour", ["black", "white", None])
def test_i10_extreme_pictures_have_finite_patches(reader: MediaReader, colour: str | None) -> None:
    image = noise("RGB", 90, 90) if colour is None else Image.new("RGB", (90, 90), colour)
    values, _ = reader.patches(reader.pieces(reader.scaled([image])[0])[0])
    assert np.isfinite(values).all()
    assert np.abs(values).max() < 3


def test_i11_same_bytes_in_another_shape_are_another_picture() -> None:
    image = noise("RGB", *SIZE)
    others = [
        Image.frombytes("RGB", SIZE, image.tobytes()),
        Image.frombytes("L", (SIZE[1] * 3, SIZE[0]), image.tobytes()),
    ]
    assert len({media_key(one) for one in (image, image.copy(), *others)}) == 3


def test_i12_any_number_until_the_context_is_full(reader: MediaReader) -> None:
    assert reader.scaled([]) == ()
    one = Image.new("RGB", (56, 56))
    assert len(reader.scaled([one] * 65)) == 65
    large = Image.new("RGB", (8000, 1000))  # eight of them: 64 megapixels
    assert sum(map(reader.tokens, reader.scaled([large] * 8))) < 8 * 4096
    small = GenerationOptions(max_total_pixels=65 * 56 * 56 - 1)
    with pytest.raises(UsageError, match=r"images\[64\]: .*max_total_pixels"):
        reader.scaled([one] * 65, options=small)
    with pytest.raises(UsageError, match=r"the context holds 262144"):
        reader.scaled([one] * 70_000, options=GenerationOptions())


def test_i13_a_file_that_goes_between_check_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "본 그림.png", tmp_path / "링크"
    path.write_bytes(saved(noise("RGB", *SIZE), "PNG"))
    link.symlink_to(path.name)
    assert load_image(link).size == SIZE[::-1]
    status = os.fstat

    def gone(descriptor: int) -> os.stat_result:
        path.unlink(missing_ok=True)
        return status(descriptor)

    monkeypatch.setattr(os, "fstat", gone)
    assert load_image(link).size == SIZE[::-1]  # what was judged is what is read
