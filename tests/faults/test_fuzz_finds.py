"""What fuzzing has found, each with the smallest input that showed it."""

from __future__ import annotations

import contextlib
import io
import json
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from exaone_export.batching.journal import Journal, journal_path
from exporter import journal as parts_journal
from model.bundle import bundle_path
from model.errors import BundleError, CheckpointError, UsageError
from model.limits import fault
from model.shards import INDEX, open_shards
from quantize.recipe import load_recipe
from runtime.image_file import load_image
from runtime.tokenizer import Tokenizer
from tests.fuzz.pictures import good_images, png_chunks, png_of, spoiled_image
from tests.fuzz.saved import checked
from tests.tiny import make_checkpoint

RULE = 'name = "x"\n[[rule]]\nmatch = "*"\nbits = 4\n'


def test_a_file_name_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\ud800b", "x" * 3000):
        with pytest.raises(BundleError, match="no file can have"):
            bundle_path(tmp_path, name)


@pytest.mark.parametrize(
    "text",
    [
        RULE + "a" * 5000 + " = 1",
        RULE + "block_size = " + "9" * 5000,
        RULE + "[verify]\nmean_kld = 1" + "0" * 400,
        f'name = {{{"a" * 5000} = 1}}\n[[rule]]\nmatch = "*"\nbits = 4',
    ],
)
def test_a_recipe_with_much_too_much(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UsageError) as refused:
        load_recipe(tmp_path / "recipe.toml")
    assert len(refused.value.why) < 300


def test_a_limit_beyond_all_numbers() -> None:
    assert "a number from 0 on" in fault("mean_kld", 10**400)
    assert not fault("mean_kld", 10**9)


def test_journals_whose_checksums_somebody_has_made_to_fit(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    journal_path(out).write_bytes(checked(json.dumps({"format": 1, "header": {"k" * 5000: "v"}}).encode()))
    with pytest.raises(UsageError) as refused:
        Journal(out, {})
    assert len(refused.value.why) < 100
    for text in (b"[" * 100_000, b'{"half', b"\xff", b"7"):
        (tmp_path / parts_journal.FILE).write_bytes(checked(text))
        assert parts_journal.Journal.reopen(tmp_path / parts_journal.FILE) is None


def cut(image: Image.Image, more: int, interlaced: bool = False) -> bytes:
    """A PNG whose header promises `more` rows than there are."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    chunks = [
        (kind, data) for kind, data in png_chunks(stream.getvalue()) if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND")
    ]
    kind, data = chunks[0]
    height = (image.height + more).to_bytes(4, "big")
    chunks[0] = kind, data[:4] + height + data[8:12] + bytes([interlaced])
    return png_of(chunks)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_a_png_without_its_last_rows(tmp_path: Path, mode: str) -> None:
    """Pillow leaves them black where the compressed data end as they should."""
    path = tmp_path / "image.png"
    for shade in (0, 255):
        for height in (1, 2, 9):
            image = Image.new("L", (23, height), shade).convert(mode)
            path.write_bytes(cut(image, 0))
            assert np.array_equal(np.asarray(load_image(path)), np.asarray(image))
            path.write_bytes(cut(image, 1))
            with pytest.raises(UsageError, match="truncated PNG"):
                load_image(path)


@pytest.mark.parametrize("shade", [0, 255])
def test_an_interlaced_png_without_its_last_bytes(tmp_path: Path, shade: int) -> None:
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    path = tmp_path / "image.png"
    for width, height in ((1, 1), (1, 9), (9, 1), (5, 2), (8, 8), (13, 7), (6, 11)):
        rows = [
            b"\0" + bytes([shade]) * (3 * len(range(x, width, dx)))
            for x, y, dx, dy in passes
            for _ in range(y, height, dy)
            if x < width
        ]
        header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 1])
        for missing in (0, 1):
            data = zlib.compress(b"".join(rows)[: len(b"".join(rows)) - missing])
            path.write_bytes(png_of([(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]))
            if not missing:
                assert set(np.asarray(load_image(path)).reshape(-1)) == {shade}
                continue
            with pytest.raises(UsageError, match="truncated PNG"):
                load_image(path)


def test_a_message_names_what_has_no_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", "hybrid", sharded=2)
    index = tmp_path / "source" / INDEX
    raw = json.loads(index.read_text())
    raw["weight_map"][""] = next(iter(raw["weight_map"].values()))
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="cannot read checkpoint: '': "):
        open_shards(tmp_path / "source")


def test_a_token_whose_id_would_take_gigabytes(tmp_path: Path) -> None:
    """Writing the vocabulary, as it is done to encode plain text, has a place for every id below the highest."""
    make_checkpoint(tmp_path / "source", "hybrid")
    path = tmp_path / "source" / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["<|unused_20|>"] = 2**31 - 1
    for text in (json.dumps(raw), json.dumps(raw, separators=(",", ":"))):
        path.write_text(text)
        with pytest.raises(BundleError, match="a token of the id 2147483647"):
            Tokenizer.load(tmp_path / "source")


def test_an_added_token_of_three_thousand_letters(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", "hybrid")
    path = tmp_path / "source" / "tokenizer_config.json"
    added = {"500": {"content": "x" * 3000}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
    with pytest.raises(BundleError, match="cannot be id 500") as refused:
        Tokenizer.load(tmp_path / "source")
    assert len(refused.value.why) < 200


def test_a_webp_of_a_kilobyte_that_would_take_a_gigabyte(tmp_path: Path) -> None:
    raw = bytearray(good_images()["webp-animated"])
    assert raw[12:16] == b"VP8X"
    raw[24:30] = (7999).to_bytes(3, "little") * 2
    (tmp_path / "image.webp").write_bytes(raw)
    with pytest.raises(UsageError, match="8000x8000 pixels, more than the 32000000 allowed of a WebP file"):
        load_image(tmp_path / "image.webp")


def test_libraries_do_not_write_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = {name: raw for name, raw in good_images().items() if name.startswith("tiff")}
    for index in range(150):
        random = Random(index)
        name = random.choice(list(good))
        (tmp_path / "image.tiff").write_bytes(spoiled_image(name, good[name], random))
        with contextlib.suppress(UsageError):
            load_image(tmp_path / "image.tiff")
    assert capfd.readouterr() == ("", "")
