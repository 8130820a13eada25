from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from model import memory as probe
from model.bundle import FileInfo, GraphInfo, Manifest
from model.config import RopeConfig, TextConfig, VisionConfig
from model.errors import ResourceError
from runtime import memory

TEXT = TextConfig(
    vocab_size=153600, hidden_size=5120, intermediate_size=27392, num_layers=64, num_heads=40, num_kv_heads=8,
    head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=262144, tie_word_embeddings=False, sliding_window=4096,
    layer_types=(*("sliding_attention",) * 3, "full_attention") * 16, rope=RopeConfig(1e6),
)  # fmt: skip
VISION = VisionConfig(
    depth=28, hidden_size=2048, intermediate_size=5120, num_heads=32, num_kv_heads=8, patch_size=14,
    spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=(6,), out_hidden_size=5120,
    in_channels=3, rope_theta=1e4,
)  # fmt: skip


def manifest() -> Manifest:
    graphs = tuple(GraphInfo(name, f"{name}.onnx", ("shared.data",), (), ()) for name in ("a", "b"))
    sizes = {"a.onnx": 10, "b.onnx": 20, "shared.data": 3_000_000_000}
    files = {name: FileInfo(size, "0" * 64) for name, size in sizes.items()}
    return Manifest("1", {}, {}, "exaone4", "text-generation", "fp32", "cpu", "none", graphs, {}, files)


def test_this_machine_has_some_memory() -> None:
    there = probe.available_bytes()
    assert there is None or 0 < there < 1 << 50


def test_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = manifest()
    assert probe.weight_bytes(bundle, bundle.graphs) == 3_000_000_030
    monkeypatch.setattr(memory, "available_bytes", lambda: 3_000_000_030)
    memory.check_weights(bundle, bundle.graphs)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2_000_000_000)
    with pytest.raises(ResourceError, match=r"3\.00 GB, 2\.00 GB"):
        memory.check_weights(bundle, bundle.graphs)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    memory.check_weights(bundle, bundle.graphs)


def test_cache_of_the_published_model() -> None:
    """64 KiB a token over the 16 full layers at fp16, and 4 KiB for each of 48 windows of 4096 tokens."""
    size = probe.cache_size(TEXT, 2, window_cache=True, slack=0)
    assert size == probe.CacheSize(64 << 10, 48 * (4 << 10), 4096)
    assert size.of(262144) == (64 << 10) * 262144 + 48 * 4096 * (4 << 10)
    assert round(size.of(262144) / 1e9, 1) == 18.0
    assert size.of(100) == 100 * (256 << 10)
    assert round(probe.cache_size(TEXT, 2, window_cache=False, slack=0).of(262144) / 1e9) == 69
    # A window of the whole context is no smaller than a full cache.
    wide = dataclasses.replace(TEXT, sliding_window=262144)
    assert probe.cache_size(wide, 4, window_cache=True, slack=64) == probe.CacheSize(512 << 10)


@pytest.mark.parametrize("size", [probe.CacheSize(10), probe.CacheSize(10, 30, 7), probe.CacheSize(0, 30, 7)])
def test_tokens_that_fit(size: probe.CacheSize) -> None:
    for given in (0, 9, 40, 279, 280, 281, 1000):
        fitting = size.fitting(given)
        if size.per_token or fitting < size.window_tokens:
            assert size.of(fitting) <= given < size.of(fitting + 1)
        else:
            assert size.of(fitting) <= given


def test_context_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    size = probe.CacheSize(10)
    memory.check_cache(size, 2, 50)
    with pytest.raises(ResourceError, match="At most 50 tokens fit"):
        memory.check_cache(size, 2, 51)
    memory.check_cache(size, 2, 51, held=20)
    with pytest.raises(ResourceError, match="At most 29 tokens fit"):
        memory.check_cache(probe.CacheSize(10, 30, 7), 2, 30)


def test_image_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest image of the published bounds: no score matrix of 16384 x 16384 x 32 heads (34 GB) may be needed.
    assert 2.1e9 < memory.vision_bytes(VISION, 16384) < 2.4e9
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    memory.check_image(VISION, 1000)
    with pytest.raises(ResourceError, match="16384 patches"):
        memory.check_image(VISION, 16384)


def test_limits_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert probe.available_bytes() is None


@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [("max", "5", "", None), ("100", "30", "", 70), ("100", "30", "anon 3\ninactive_file 10\n", 80)],
)
def test_control_group(monkeypatch: pytest.MonkeyPatch, limit: str, used: str, stat: str, expected: int | None) -> None:
    texts = {"memory.max": limit, "memory.current": used, "memory.stat": stat}
    monkeypatch.setattr(Path, "read_text", lambda path: texts[path.name])
    assert probe._cgroup_available() == expected
