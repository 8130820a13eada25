from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from model.bundle import GraphInfo, TensorInfo
from model.errors import BundleError, ResourceError, UsageError
from runtime import memory
from runtime.cache import CacheLayout, KVCache

LAYOUT = CacheLayout(layers=2, kv_heads=3, head_dim=4, dtype=np.float32)


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.outputs[name] = value


def bound(kv: KVCache) -> dict[str, Any]:
    binding = Binding()
    kv.bind(binding)
    for layer in range(2):
        for part in ("key", "value"):
            past = binding.inputs[f"past_key_values.{layer}.{part}"]
            assert past is binding.outputs[f"present.{layer}.{part}"]
    return binding.inputs


def test_room_grows_and_what_was_there_stays() -> None:
    kv = KVCache(LAYOUT, rows=2, limit=5000)
    assert kv.reserve(10)
    assert kv.capacity == 256
    assert not kv.reserve(256)
    for number, value in enumerate(bound(kv).values()):
        value.numpy()[:, :, :7] = number + 1
        # On the CPU the buffer is the array: no copy.
        assert (value.numpy()[:, :, :7] == number + 1).all()
    kv.lengths = np.array([7, 3])
    assert kv.reserve(257)
    assert kv.capacity == 512
    for number, value in enumerate(bound(kv).values()):
        assert value.shape() == [2, 3, 512, 4]
        assert (value.numpy()[:, :, :7] == number + 1).all()
        assert (value.numpy()[:, :, 7:] == 0).all()
    assert kv.reserve(4999)
    assert kv.capacity == 4999
    assert kv.reserve(5000)
    assert kv.capacity == 5000


def test_first_room_is_what_is_expected_but_no_more_than_the_context() -> None:
    kv = KVCache(LAYOUT, rows=1, limit=1000)
    kv.reserve(10, expected=700)
    assert kv.capacity == 700
    kv = KVCache(LAYOUT, rows=1, limit=100)
    kv.reserve(10, expected=700)
    assert kv.capacity == 100
    with pytest.raises(UsageError, match="the model takes 100"):
        kv.reserve(101)


def test_rewind() -> None:
    kv = KVCache(LAYOUT, rows=2, limit=100)
    kv.lengths = np.array([7, 3])
    kv.rewind([5, 3])
    assert kv.lengths.tolist() == [5, 3]
    for bad in ([6, 3], [-1, 3], [5]):
        with pytest.raises(ValueError, match="cannot rewind"):
            kv.rewind(bad)


def test_too_little_memory_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: LAYOUT.bytes_per_token * 2 * 300)
    kv = KVCache(LAYOUT, rows=2, limit=5000)
    kv.reserve(300)
    with pytest.raises(ResourceError, match="At most 450 tokens"):
        kv.reserve(600)


def test_no_memory_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "zeros", fail)
    kv = KVCache.__new__(KVCache)
    kv.layout, kv.rows, kv.limit, kv.capacity, kv._device = LAYOUT, 1, 1000, 0, "cpu"
    kv.lengths = np.array([0])
    with pytest.raises(ResourceError, match="cannot be allocated"):
        kv.reserve(5)


def decoder(*shape: int | str, dtype: str = "float32") -> GraphInfo:
    inputs = [TensorInfo("input_ids", "int64", ("batch", "sequence"))]
    for layer in range(2):
        inputs += [TensorInfo(f"past_key_values.{layer}.{part}", dtype, shape) for part in ("key", "value")]
    return GraphInfo("decoder", "decoder.onnx", (), tuple(inputs), ())


def test_layout_from_the_graph() -> None:
    assert CacheLayout.of(decoder("batch", 3, "past", 4)) == LAYOUT
    assert CacheLayout.of(decoder("batch", 3, "past", 4, dtype="float16")).bytes_per_token == 2 * 2 * 3 * 4 * 2
    for graph in (decoder("batch", "heads", "past", 4), decoder(3), decoder("batch", 3, "past", 4, dtype="int4")):
        with pytest.raises(BundleError, match="no known type and size"):
            CacheLayout.of(graph)
