from __future__ import annotations

import hashlib
import io
import logging
import mmap
import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.config import VisionConfig
from model.errors import BundleError, UsageError
from runtime import image_file
from runtime.image import ImageProcessor, smart_resize
from runtime.image_file import from_array, load_image, to_rgb
from runtime.quiet_tiff import silence_libtiff

DATA = Path(__file__).parents[1] / "data"
VISION = VisionConfig(
    depth=1, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, patch_size=14, spatial_merge_size=2,
    temporal_patch_size=2, window_size=112, fullatt_block_indexes=(0,), out_hidden_size=64, in_channels=3,
    rope_theta=1e4,
)  # fmt: skip
CONFIG = {"size": {"shortest_edge": 3136, "longest_edge": 200704}}


def noise(mode: str, height: int, width: int) -> Image.Image:
    """The same picture on every machine and numpy version."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    count = np.arange(height * width * channels, dtype=np.uint64)
    values = ((count * np.uint64(2654435761) + np.uint64(12345)) >> np.uint64(13)) & np.uint64(255)
    array = values.astype(np.uint8).reshape(height, width, channels)
    return Image.fromarray(array[:, :, 0] if channels == 1 else array)


def processor(**changes: Any) -> ImageProcessor:
    return ImageProcessor.from_config({**CONFIG, **changes}, VISION)


def test_golden_values_of_transformers() -> None:
    golden = np.load(DATA / "image_qwen2vl.npz")
    run = processor()
    for i, mode in enumerate(golden["modes"]):
        values, grid = run(noise(str(mode), *map(int, golden["sizes"][i])))
        assert grid.tolist() == [golden["grids"][i].tolist()]
        np.testing.assert_array_equal(values[:2, :32], golden["rows"][i])
        assert hashlib.sha256(values.tobytes()).hexdigest() == golden["sha256"][i]


@pytest.mark.parametrize(
    ("height", "width", "scaled", "tokens"),
    [
        (200, 300, (196, 308), 77),
        (70, 98, (56, 112), 8),
        (33, 20, (84, 56), 6),
        (2500, 3000, (1624, 1960), 4060),
        (14, 14, (56, 56), 4),
        (10, 1000, (28, 560), 20),
        (1, 1, (56, 56), 4),
        (27, 27, (56, 56), 4),
        (28, 28, (56, 56), 4),
        (1, 200, (28, 812), 29),
        (30, 6000, (28, 5992), 214),
    ],
)
def test_size_and_tokens(height: int, width: int, scaled: tuple[int, int], tokens: int) -> None:
    assert smart_resize(height, width, 28, 3136, 3211264) == scaled
    run = processor(size={"shortest_edge": 3136, "longest_edge": 3211264})
    made = run.scaled(Image.new("RGB", (width, height)))
    assert (made.height, made.width) == scaled
    assert run.token_count(made) == tokens


@pytest.mark.parametrize(("height", "width"), [(1, 201), (20000, 10)])
def test_extreme_proportions_are_refused(height: int, width: int) -> None:
    with pytest.raises(UsageError, match="200 times"):
        processor()(Image.new("RGB", (width, height)))


def test_both_spellings_of_the_bounds() -> None:
    for config in (
        {"min_pixels": 784, "max_pixels": 1568},
        {"size": {"shortest_edge": 784, "longest_edge": 1568}},
        {"size": {"min_pixels": 784, "max_pixels": 1568}},
        {"min_pixels": 784, "max_pixels": 1568, "size": {"shortest_edge": 1, "longest_edge": 2}},
    ):
        run = ImageProcessor.from_config(config, VISION)
        assert (run.min_pixels, run.max_pixels) == (784, 1568)
    plain = ImageProcessor.from_config({}, VISION)
    assert (plain.min_pixels, plain.max_pixels) == (3136, 1003520)


def test_steps_can_be_switched_off() -> None:
    picture = noise("RGB", 56, 84)
    raw, _ = processor(do_rescale=False, do_normalize=False)(picture)
    assert raw.min() >= 0
    assert raw.max() > 200
    unscaled = processor(do_resize=False)
    assert unscaled(picture)[1].tolist() == [[1, 4, 6]]
    with pytest.raises(UsageError, match="multiples of 28"):
        unscaled(noise("RGB", 57, 84))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"patch_size": 16}, "patch_size"),
        ({"patch_size": "14"}, "patch_size"),
        ({"min_pixels": 10, "max_pixels": 5}, "min_pixels"),
        ({"max_pixels": -1}, "max_pixels"),
        ({"size": [3, 4]}, "size"),
        ({"resample": 17}, "resample"),
        ({"image_mean": [1, 2]}, "image_mean"),
        ({"image_mean": [1, 2, float("nan")]}, "image_mean"),
        ({"image_std": [1, 1, 0]}, "image_std"),
        ({"rescale_factor": "x"}, "rescale_factor"),
        ({"do_resize": 1}, "do_resize"),
        ({"do_pad": True}, "do_pad"),
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type"),
    ],
)
def test_unusable_configuration_names_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(BundleError, match=key):
        processor(**change)


# Files


def saved(tmp_path: Path, image: Image.Image, name: str, **options: Any) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif", "a.tif"])
def test_every_format_loads(tmp_path: Path, name: str) -> None:
    picture = load_image(saved(tmp_path, noise("RGB", 40, 60), name))
    assert picture.size == (60, 40)
    values, _ = processor()(picture)
    assert np.isfinite(values).all()


def test_lossless_formats_keep_every_value(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "a.tif"):
        loaded = load_image(saved(tmp_path, noise("RGB", 40, 60), name))
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(noise("RGB", 40, 60)))


@pytest.mark.parametrize(
    "content",
    [
        b"\x89P", b"plain text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"PK\x03\x04" + bytes(60),
        b"<!DOCTYPE html><html></html>", b"SIMPLE  =                    T" + bytes(2880), b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"8BPS\x00\x01" + bytes(40), b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0};",
        b"\x89PNG\r\n\x1a\n" + bytes(40), b"\xff\xd8\xff\xe0" + bytes(10), b"GIF89a", b"BM" + bytes(60), b"RIFF",
        b"P6\n1 1\n255\nabc",
    ],
)  # fmt: skip
def test_what_is_no_allowed_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.png"):
        load_image(path)


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    empty = tmp_path / "empty.png"
    empty.touch()
    for path in (fifo, tmp_path, empty, Path("/dev/zero"), Path("/proc/self/mem"), tmp_path / "missing.png"):
        with pytest.raises(UsageError, match="cannot read image"):
            load_image(path)
    with pytest.raises(UsageError, match="not a usable file name"):
        load_image("a\0b.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif", "a.gif"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_truncated_files_are_refused(tmp_path: Path, name: str, share: float) -> None:
    path = saved(tmp_path, noise("RGB", 200, 300), name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UsageError, match=r"a\.\w+: "):
        load_image(path)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))]
    parts += [chunk(*c) for c in chunks]
    rows = zlib.compress(bytes((width + 1) * min(height, 64)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [(50_000, 50_000), (13_000, 13_000), (10_000, 10_000), (8_001, 8_000)])
def test_bombs_are_refused_by_their_header(tmp_path: Path, side: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*side))
    tracemalloc.start()
    with pytest.raises(UsageError, match="pixels allowed|allowed"):
        load_image(path)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_text_bombs_are_refused_or_skipped(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(200 << 20), 9)
    for kind, head in ((b"zTXt", b"key\0\0"), (b"iCCP", b"profile\0\0")):
        path = tmp_path / "bomb.png"
        path.write_bytes(png(60, 60, (kind, head + bomb)))
        try:
            assert load_image(path).size == (60, 60)
        except UsageError as error:
            assert "damaged" in error.why


def test_libtiff_is_found_beside_files_of_any_name(tmp_path: Path) -> None:
    """Among what a process has mapped are a bundle's weights."""
    path = tmp_path / os.fsdecode(b"\xff.data")
    path.write_bytes(bytes(4096))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        silence_libtiff.__wrapped__()


def test_orientation_is_applied(tmp_path: Path) -> None:
    upright = noise("RGB", 40, 60)
    turned = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation, turn in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright if turn is None else upright.transpose(turn)
        loaded = load_image(saved(tmp_path, stored, "a.png", exif=exif))
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(upright))
    for orientation in (0, 9, 77):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert load_image(saved(tmp_path, upright, "a.png", exif=exif)).size == upright.size
    assert load_image(saved(tmp_path, upright, "a.jpg", exif=b"Exif\0\0garbage")).size == upright.size


def test_first_frame_of_several_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    red, blue = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
        path = saved(tmp_path, red, name, save_all=True, append_images=[blue], **options)
        with caplog.at_level(logging.WARNING, "exaone_export.runtime"):
            caplog.clear()
            first = to_rgb(load_image(path))
        assert "first one" in caplog.text
        assert first.getpixel((5, 5)) == (255, 0, 0), name


def test_sixteen_bit_grey_is_scaled_and_float_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 3600).astype(np.uint16).reshape(60, 60)
    for name in ("a.png", "a.tif"):
        loaded = load_image(saved(tmp_path, Image.fromarray(ramp), name))
        np.testing.assert_array_equal(np.asarray(loaded), ramp >> 8)
    path = saved(tmp_path, Image.fromarray(ramp.astype(np.float32)), "a.tif")
    with pytest.raises(UsageError, match="floating-point"):
        load_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_colour_models_become_rgb(mode: str) -> None:
    assert to_rgb(noise("RGB", 40, 60).convert(mode)).mode == "RGB"


def test_transparent_pixels_are_white(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noise("RGBA", 3000, 1500)
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    expected = Image.alpha_composite(white, picture).convert("RGB")
    np.testing.assert_array_equal(np.asarray(to_rgb(picture)), np.asarray(expected))
    palette = Image.new("P", (30, 30))
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    monkeypatch.setattr(image_file, "MAX_PIXELS", 100)
    with pytest.raises(UsageError, match="allowed"):
        processor()(picture)


def test_arrays() -> None:
    pixels = np.zeros((30, 40, 3), np.uint8)
    assert from_array(pixels).size == (40, 30)
    for bad in (pixels.astype(np.float32), pixels[:, :, :2], pixels[:0], pixels[0, 0]):
        with pytest.raises(UsageError):
            from_array(bad)


def test_message_shows_no_control_characters(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_image(tmp_path / "no\n\x1b[31m한글.png")
    assert "\n" not in str(caught.value)
    assert "한글" in str(caught.value)


def test_an_open_file_is_not_left_behind(tmp_path: Path) -> None:
    path = saved(tmp_path, noise("RGB", 40, 60), "a.png")
    before = len(os.listdir("/proc/self/fd"))
    load_image(path)
    stream = io.BytesIO(path.read_bytes())
    assert Image.open(stream).size == (60, 40)
    assert len(os.listdir("/proc/self/fd")) == before
