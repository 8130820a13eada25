"""The key/value cache in a device's memory: as large as the rows need, grown without a way through the host."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from model.bundle import WINDOW_CACHE, WINDOW_SLACK, GraphInfo, TensorInfo
from model.errors import BundleError, ResourceError
from model.memory import CacheSize, shown
from runtime.cache import CacheLayout, KVCache
from runtime.device import Device, Tensor
from runtime.protobuf import ELEMENTS

_PAST: Final = "past_key_values."
_PRESENT: Final = "present."
_STEP: Final = 256


@dataclass(frozen=True)
class Slot:
    """One buffer of each row: past input and present output are the same memory.

    Attributes:
        past, present: their names.
        layer: whose.
        dtype, heads, width: of what is stored for a token.
        fixed: whether it holds a window only and never grows.
    """

    past: str
    present: str
    layer: int
    dtype: str
    heads: int
    width: int
    fixed: bool

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.heads * self.width * ELEMENTS[self.dtype][1]


def cache_slots(graph: GraphInfo) -> tuple[Slot, ...]:
    """All buffers of a decoder or draft head.

    Raises:
        BundleError: a cache input has no known type and size.
    """
    return tuple(_slot(graph, tensor) for tensor in graph.inputs if tensor.name.startswith(_PAST))


def _slot(graph: GraphInfo, tensor: TensorInfo) -> Slot:
    rest = tensor.name.removeprefix(_PAST)
    layer, shape = rest.partition(".")[0], tensor.shape
    if len(shape) == 4 and layer.isdecimal() and tensor.dtype in ELEMENTS:
        heads, width = shape[1], shape[3]
        if isinstance(heads, int) and isinstance(width, int) and heads * width > 0:
            fixed = shape[2] == WINDOW_CACHE
            return Slot(tensor.name, _PRESENT + rest, int(layer), tensor.dtype, heads, width, fixed)
    why = f"its cache input {tensor.name[:60]!r} has no known type and size"
    raise BundleError("cannot run graph", graph.file, why, "Export the model again")


class DeviceCache(KVCache):
    """A cache whose buffers lie where their layers compute.

    Room doubles when it is needed, as far as the memory allows; a buffer is copied while only one of each is there
    twice. Buffers of window layers stay what and where they are.

    Args:
        graph: the decoder.
        layout: its layout, see `runtime.cache.CacheLayout.of`.
        rows: sequences side by side.
        limit: tokens a row may have at most (the model's context).
        device: where layers compute.
        host_layers: those that compute on the CPU instead.
        budget: bytes that the device has for the cache, asked whenever it grows; None where nobody can tell. What the
            cache itself holds is not counted as taken.
    """

    def __init__(
        self,
        graph: GraphInfo,
        layout: CacheLayout,
        rows: int,
        limit: int,
        device: Device,
        host_layers: Collection[int] = (),
        budget: Callable[[int], int | None] = lambda held: None,
    ) -> None:
        super().__init__(layout, rows, limit, WINDOW_SLACK[device.name])
        self._slots = cache_slots(graph)
        self._host = Device()
        self._devices = [self._host if slot.layer in host_layers else device for slot in self._slots]
        self._device_there = device
        self._budget = budget
        self._tensors: list[Tensor | None] = [None] * len(self._slots)

    @property
    def windows_full(self) -> bool:
        """Whether one more token evicts another from a window: doing a step twice is not the same as doing it once."""
        return bool(self.buffer and (self.lengths >= self.buffer).any())

    @property
    def on_host(self) -> bool:
        """False: the buffers cannot be had as arrays."""
        return False

    @property
    def held_bytes(self) -> int:
        """Bytes taken on the device."""
        return self._bytes(self.capacity) if self.capacity else 0

    def _size(self) -> CacheSize:
        """Bytes of one row on the device; of a cache that lies on the host, of all of it."""
        on = [slot for slot, device in zip(self._slots, self._devices, strict=True) if device is self._device_there]
        growing = sum(slot.token_bytes for slot in on if not slot.fixed)
        return CacheSize(growing, sum(slot.token_bytes for slot in on if slot.fixed), self.buffer)

    def _bytes(self, tokens: int) -> int:
        size = self._size()
        return self.rows * (tokens * size.per_token + size.window_tokens * size.window_per_token)

    def _room(self, tokens: int, expected: int) -> int:
        wanted = max(tokens, 2 * self.capacity if self.capacity else expected, _STEP)
        wanted = min(-(-wanted // _STEP) * _STEP, max(self.limit, tokens))
        there = self._budget(self.held_bytes)
        if there is None:
            return wanted
        size = self._size()
        fixed = self.rows * size.window_tokens * size.window_per_token
        # The largest buffer is there twice while it is copied.
        most = max((slot.token_bytes for slot in self._slots if not slot.fixed), default=0)
        each = self.rows * (size.per_token + (most if self.capacity else 0))
        fitting = wanted if not each else max(0, there - fixed) // each
        if fitting < tokens:
            why = f"{self.rows} x {tokens} tokens take {shown(self._bytes(tokens))} of cache, {shown(there)} are there"
            remedy = f"At most {fitting} tokens fit: shorten the prompt, or allow more with gpu_memory"
            raise ResourceError("cannot hold context", "device memory", why, remedy)
        return min(wanted, fitting)

    def _allocate(self, capacity: int) -> None:
        for index, (slot, device) in enumerate(zip(self._slots, self._devices, strict=True)):
            old = self._tensors[index]
            if slot.fixed and old is not None:
                continue
            tokens = self.buffer if slot.fixed else capacity
            shape = (self.rows, slot.heads, tokens, slot.width)
            self._tensors[index] = device.grown(old, shape, slot.dtype)
        self.capacity = capacity

    def bind(self, binding: Any, row: int | None = None, count: int = 1) -> None:
        """Binds each layer's buffers, or `count` rows of them, to the decoder's past inputs and present outputs."""
        for slot, device, tensor in zip(self._slots, self._devices, self._tensors, strict=True):
            if tensor is None:
                raise ValueError("nothing is reserved")
            bound = tensor if row is None else tensor.part(row, count)
            device.bind_input(binding, slot.past, bound)
            device.bind_output(binding, slot.present, bound)

    def saved_windows(self) -> list[tuple[Tensor, Tensor]]:
        """Copies of the buffers that lose tokens with every step, beside the originals. Raises ResourceError."""
        return [
            (tensor, device.twin(tensor))
            for slot, device, tensor in zip(self._slots, self._devices, self._tensors, strict=True)
            if slot.fixed and tensor is not None
        ]

    def restore(self, saved: list[tuple[Tensor, Tensor]]) -> None:
        """Puts back what `saved_windows` copied."""
        for tensor, twin in saved:
            tensor.value.update_inplace(twin.value)

    def clear(self) -> None:
        """Forgets all tokens and keeps the room."""
        self.lengths = np.zeros(self.rows, np.int64)
