"""The sums behind `inspect`; how well they predict is measured by benchmarks/running_memory.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from exaone_export.forecast import Weights, forecast
from exaone_export.memory_need import Machine, MemoryNeed, largest_image
from model.config import parse_config
from model.tasks import FEATURE_EXTRACTION, IMAGE_FEATURE_EXTRACTION
from model.weights import expected_tensors
from quantize.scheme import Scheme
from quantize.sizes import part_bytes
from runtime.decode import CHUNK
from runtime.request import PUBLISHED_BOUNDS
from tests.published import EXAONE_45_33B

CONFIG = parse_config(EXAONE_45_33B)
PIXELS = PUBLISHED_BOUNDS["max_pixels"]
CPU, CUDA = Machine("cpu", 4), Machine("cuda", 2)
WEIGHTS = Weights(stored=0, tables=7, codes=100, scales=10, floats=1000, looked_up=10000, largest=500)


def test_the_sum_is_the_most_at_any_one_time() -> None:
    need = MemoryNeed(process=1, weights=10, kv=5, text=6, image=7, loading=8)
    assert need.total == 1 + 10 + 11
    assert dataclasses.replace(need, image=20).total == 31
    assert dataclasses.replace(need, loading=30).total == 41


def test_windows_of_a_device_are_there_as_a_whole() -> None:
    layer = 2 * 8 * 128
    assert CUDA.need(WEIGHTS, CONFIG, 10, PIXELS).kv == 2 * layer * (16 * 256 + 48 * 4096)  # in steps of 256
    assert CUDA.need(WEIGHTS, CONFIG, 513, PIXELS).kv == 2 * layer * (16 * 768 + 48 * 4096)
    most = CONFIG.text.max_position_embeddings
    assert CUDA.need(WEIGHTS, CONFIG, most, PIXELS).kv == 2 * layer * (16 * most + 48 * 4096)
    assert CPU.need(WEIGHTS, CONFIG, 10, PIXELS).kv == 4 * layer * 64 * 10
    full = dataclasses.replace(CPU, window_cache=False)
    assert full.need(WEIGHTS, CONFIG, 10000, PIXELS).kv == 4 * layer * 64 * 10000
    assert CPU.need(WEIGHTS, CONFIG, 10000, PIXELS).kv == 4 * layer * (16 * 10000 + 48 * (4096 + 64))


def test_what_weights_take() -> None:
    """The CPU's kernel has copies of the scales, and tables stay in the file; a device holds everything once."""
    assert CPU.need(WEIGHTS, CONFIG, 10, PIXELS).weights == 100 + 3 * 10 + 1000 + 10 * 128 * 4
    assert CUDA.need(WEIGHTS, CONFIG, 10, PIXELS).weights == 100 + 10 + 1000 + 10000 + 7
    assert (CPU.need(WEIGHTS, CONFIG, 10, PIXELS).loading, CUDA.need(WEIGHTS, CONFIG, 10, PIXELS).loading) == (500, 0)


def test_working_memory_does_not_grow_with_the_context_but_where_the_kernel_keeps_scores() -> None:
    short, long = (CPU.need(WEIGHTS, CONFIG, tokens, PIXELS).text for tokens in (8192, 262144))
    assert short == long > CPU.need(WEIGHTS, CONFIG, 100, PIXELS).text
    halves = Machine("cpu", 2)
    growth = halves.need(WEIGHTS, CONFIG, 262144, PIXELS).text - halves.need(WEIGHTS, CONFIG, 8192, PIXELS).text
    assert growth == 4 * 40 * CHUNK * (262144 - 8192)


def test_a_device_reads_larger_pieces_and_unpacks_a_weight() -> None:
    plain = dataclasses.replace(WEIGHTS, codes=0)
    unpacked = CUDA.need(WEIGHTS, CONFIG, 512, PIXELS).text - CUDA.need(plain, CONFIG, 512, PIXELS).text
    assert unpacked == 2 * 5120 * 27392
    some, piece, more = (CUDA.need(WEIGHTS, CONFIG, tokens, PIXELS).text for tokens in (512, 2048, 2049))
    assert some < piece
    assert piece - more == -2 * 2 * 8 * 128  # one more token of the window beside the piece
    assert CPU.need(WEIGHTS, CONFIG, 512, PIXELS).text == CPU.need(plain, CONFIG, 512, PIXELS).text


def test_images_are_no_larger_than_the_context() -> None:
    some, more, most = (CPU.need(WEIGHTS, CONFIG, tokens, PIXELS).image for tokens in (100, 4096, 262144))
    assert 0 < some < more == most
    assert CPU.need(WEIGHTS, CONFIG, 4096, PIXELS // 2).image < most
    text = dataclasses.replace(CONFIG, vision=None, architecture="", task="")
    assert CPU.need(WEIGHTS, text, 4096, PIXELS).image == 0


def test_tasks_without_a_cache() -> None:
    encoder = dataclasses.replace(CONFIG, task=FEATURE_EXTRACTION)
    one, two = (CPU.need(WEIGHTS, encoder, tokens, PIXELS) for tokens in (1000, 2000))
    assert one.kv == two.kv == 0
    assert two.text == 2 * one.text  # the whole text is one pass
    images = CPU.need(WEIGHTS, dataclasses.replace(CONFIG, task=IMAGE_FEATURE_EXTRACTION), 1, PIXELS)
    assert (images.kv, images.text) == (0, 0)
    assert images.image == CPU.need(WEIGHTS, CONFIG, 4096, PIXELS).image


def test_parts_of_a_bundle() -> None:
    scheme = Scheme(4, 32, symmetric=False)
    assert part_bytes((64, 96), scheme, 2) == {"codes": 64 * 48, "scales": 64 * 3 * 2, "zero_points": 64 * 2}
    weights = Weights(tables=5)
    for path, copy in (("decoder.lm_head", False), ("embedding.embed_tokens", True), ("mtp.fc", False)):
        weights = weights.with_weight(path, {"codes": 10, "scales": 2, "zero_points": 1}, copy=copy)
    assert (weights.stored, weights.total, weights.codes, weights.scales) == (26, 31, 11, 2)
    assert (weights.looked_up, weights.largest) == (13, 10)


def test_bytes_of_the_published_model() -> None:
    """In half precision unquantized, the bundle is the checkpoint and the rotary tables."""
    shapes = expected_tensors(CONFIG, draft=True)
    weights = forecast(CONFIG, shapes, float_bytes=2).recipes["none"]
    assert weights.stored == 2 * 34_350_097_664
    assert weights.tables == 2 * 262144 * 128
    assert weights.looked_up == 2 * 153600 * 5120
    assert weights.floats == weights.stored - weights.looked_up - 2 * 536_110_336  # without embedding and draft head


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"max_pixels": 5000, "size": {"longest_edge": 6000}}, 5000),
        ({"size": {"longest_edge": 6000, "max_pixels": 7000}}, 6000),
        ({"max_pixels": True, "size": 3}, PIXELS),
        ({}, PIXELS),
    ],
)
def test_largest_image(tmp_path: Path, raw: dict[str, object], expected: int) -> None:
    assert largest_image(tmp_path) == PIXELS
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    assert largest_image(tmp_path) == expected
    (tmp_path / "preprocessor_config.json").write_text("{")
    assert largest_image(tmp_path) == PIXELS
