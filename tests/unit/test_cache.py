from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from model.bundle import WINDOW_CACHE, GraphInfo, TensorInfo
from model.errors import BundleError, ResourceError, UsageError
from model.memory import CacheSize
from runtime import memory
from runtime.cache import CacheLayout, KVCache

LAYOUT = CacheLayout(layers=2, kv_heads=3, head_dim=4, dtype=np.float32)
WINDOWED = CacheLayout(2, 3, 4, np.float32, frozenset({0}), window=5)


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.outputs[name] = value

    def bind_input(self, name: str, *place: Any) -> None:
        self.inputs[name] = place

    def bind_output(self, name: str, *place: Any) -> None:
        self.outputs[name] = place


def bound(kv: KVCache) -> dict[str, Any]:
    binding = Binding()
    kv.bind(binding)
    for layer in range(2):
        for part in ("key", "value"):
            past = binding.inputs[f"past_key_values.{layer}.{part}"]
            assert past is binding.outputs[f"present.{layer}.{part}"]  # the same buffer
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
    assert kv.capacity == 257 + 256
    for number, value in enumerate(bound(kv).values()):
        assert value.shape() == [2, 3, 257 + 256, 4]
        assert (value.numpy()[:, :, :7] == number + 1).all()
        assert (value.numpy()[:, :, 7:] == 0).all()
    assert kv.reserve(4999)
    assert kv.capacity == 5000
    assert not kv.reserve(5000)


def test_single_tokens_grow_by_an_eighth_and_prompts_by_a_half() -> None:
    kv = KVCache(LAYOUT, rows=1, limit=50_000)
    kv.reserve(4000, expected=4000)
    assert kv.capacity == 4000
    kv.reserve(4001)
    assert kv.capacity == 4001 + 4001 // 8
    kv.reserve(6000)
    assert kv.capacity == 9000


def test_first_room_is_what_is_expected_but_no_more_than_the_context() -> None:
    kv = KVCache(LAYOUT, rows=1, limit=1000)
    kv.reserve(10, expected=700)
    assert kv.capacity == 700
    kv = KVCache(LAYOUT, rows=1, limit=100)
    kv.reserve(10, expected=700)
    assert kv.capacity == 100
    with pytest.raises(UsageError, match="the model takes 100"):
        kv.reserve(101)


def test_windows_neither_grow_nor_move() -> None:
    kv = KVCache(WINDOWED, rows=2, limit=5000, slack=3)
    kv.reserve(10)
    before = bound(kv)
    assert before["past_key_values.0.key"].shape() == [2, 3, 8, 4]
    assert before["past_key_values.1.key"].shape() == [2, 3, 256, 4]
    kv.lengths = np.array([7, 250])
    assert kv.reserve(300)
    after = bound(kv)
    assert after["past_key_values.0.value"] is before["past_key_values.0.value"]
    assert after["past_key_values.1.value"].shape() == [2, 3, 300 + 256, 4]
    assert KVCache(WINDOWED, 1, 100).buffer == 5 + 64
    assert KVCache(WINDOWED, 1, 100, slack=0).buffer == 5
    only = KVCache(CacheLayout(1, 3, 4, np.float32, frozenset({0}), 5), 1, 5000)
    only.reserve(10)
    assert only.reserve(3000)


def test_one_row_of_the_buffers() -> None:
    kv = KVCache(WINDOWED, rows=3, limit=100, slack=0)
    kv.reserve(1)
    whole, one = Binding(), Binding()
    kv.bind(whole)
    kv.bind(one, row=1)
    assert one.inputs.keys() == whole.inputs.keys()
    for name, tokens in (("past_key_values.0.key", 5), ("past_key_values.1.value", 100)):
        start = whole.inputs[name].data_ptr() + 3 * tokens * 4 * 4
        assert one.inputs[name] == ("cpu", 0, np.float32, (1, 3, tokens, 4), start)
        assert one.outputs[name.replace("past_key_values", "present")] == one.inputs[name]


def test_windows_cannot_be_rewound_beyond_what_they_hold() -> None:
    kv = KVCache(WINDOWED, rows=1, limit=100, slack=3)
    # After 8 tokens a buffer of 8 has all of them, after 9 the last 5, after 12 the last 8.
    for there, back in ((8, 3), (8, 0), (9, 9), (12, 9), (13, 13), (30, 0)):
        kv.lengths = np.array([there])
        assert kv.can_rewind([back])
        kv.rewind([back])
        assert kv.lengths.tolist() == [back]
    for there, back in ((9, 8), (13, 12), (12, 8), (30, 5)):
        kv.lengths = np.array([there])
        assert not kv.can_rewind([back])
        with pytest.raises(ValueError, match="windows before are gone"):
            kv.rewind([back])


def test_integers_have_scales_beside_them() -> None:
    codes = dataclasses.replace(WINDOWED, dtype=np.uint8)
    assert codes.size(6) == CacheSize(2 * 3 * (4 + 4), 2 * 3 * (4 + 4), 6)
    kv = KVCache(codes, rows=2, limit=100)
    kv.reserve(20)
    binding = Binding()
    kv.bind(binding, row=1)
    assert len(binding.inputs) == 2 * 4
    assert binding.inputs["past_key_values.1.key"][2:4] == (np.uint8, (1, 3, 100, 4))
    assert binding.inputs["past_key_values.0.value_scale"][2:4] == (np.float32, (1, 3, 69, 1))
    assert kv.reserve(100) is False


def test_rings_cannot_be_rewound_beyond_what_they_hold() -> None:
    kv = KVCache(dataclasses.replace(WINDOWED, dtype=np.uint8), rows=1, limit=100, slack=3)
    # Seven slots: after 12 tokens the last 7 of them are there, from position 5 on, and a token sees itself and 4 more.
    for there, back, possible in (
        (7, 1, True),
        (8, 5, True),
        (8, 4, False),
        (12, 9, True),
        (12, 8, False),
        (12, 0, True),
    ):
        kv.lengths = np.array([there])
        assert kv.can_rewind([back]) is possible


def test_rewind() -> None:
    kv = KVCache(LAYOUT, rows=2, limit=100)
    kv.lengths = np.array([7, 3])
    kv.rewind([5, 3])
    assert kv.lengths.tolist() == [5, 3]
    for bad in ([6, 3], [-1, 3], [5]):
        with pytest.raises(ValueError, match="cannot rewind"):
            kv.rewind(bad)


def test_too_little_memory_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: LAYOUT.size(0).of(300) * 2)
    kv = KVCache(LAYOUT, rows=2, limit=5000)
    kv.reserve(300)
    with pytest.raises(ResourceError, match="At most 450 tokens"):
        kv.reserve(600)


def test_no_memory_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "zeros", fail)
    kv = KVCache.__new__(KVCache)
    kv.layout, kv.rows, kv.limit, kv.capacity, kv.buffer = LAYOUT, 1, 1000, 0, 0
    kv.lengths = np.array([0])
    with pytest.raises(ResourceError, match="cannot be allocated"):
        kv.reserve(5)


def decoder(*shape: int | str, dtype: str = "float32") -> GraphInfo:
    inputs = [TensorInfo("input_ids", "int64", ("batch", "sequence"))]
    for layer in range(2):
        inputs += [TensorInfo(f"past_key_values.{layer}.{part}", dtype, shape) for part in ("key", "value")]
    return GraphInfo("decoder", "decoder.onnx", (), tuple(inputs), ())


def test_layout_from_the_graph() -> None:
    assert CacheLayout.of(decoder("batch", 3, "past", 4), 5) == LAYOUT
    half = CacheLayout.of(decoder("batch", 3, "past", 4, dtype="float16"), None)
    assert half.size(0).per_token == 2 * 2 * 3 * 4 * 2
    windows = decoder("batch", 3, WINDOW_CACHE, 4)
    assert CacheLayout.of(windows, 5) == dataclasses.replace(WINDOWED, window_layers=frozenset({0, 1}))
    with pytest.raises(BundleError):
        CacheLayout.of(windows, None)
    for graph in (decoder("batch", "heads", "past", 4), decoder(3), decoder("batch", 3, "past", 4, dtype="int4")):
        with pytest.raises(BundleError, match="no known type and size"):
            CacheLayout.of(graph, None)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("slack", [0, 3, 7])
def test_what_can_be_forgotten_again(dtype: type, slack: int) -> None:
    kv = KVCache(dataclasses.replace(WINDOWED, dtype=dtype), rows=1, limit=100, slack=slack)
    seen = set()
    for there in range(1, 60):
        kv.lengths = np.array([there])
        tokens = kv.forgettable(9)
        seen.add(tokens)
        for back in range(tokens + 1):
            kv.lengths = np.array([there + tokens])
            assert kv.can_rewind([there + back])
    spare = dtype is np.uint8  # a slot of a ring
    assert max(seen) == min(9, kv.buffer - 1 - spare)
    assert slack or seen == set(range(5 - spare))
    assert KVCache(LAYOUT, rows=1, limit=100).forgettable(9) == 9
