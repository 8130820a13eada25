"""Keys and values of every layer, in buffers that a pass reads and extends in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from model.bundle import GraphInfo, past_key, past_value, present_key, present_value
from model.errors import BundleError, ResourceError, UsageError
from runtime.memory import check_cache
from runtime.providers import onnxruntime

_NUMPY_TYPES: Final = {"float32": np.float32, "float": np.float32, "float16": np.float16}
_SMALLEST: Final = 256


@dataclass(frozen=True)
class CacheLayout:
    """What one layer stores: [rows, kv_heads, capacity, head_dim] of `dtype`, twice."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: npt.DTypeLike

    @classmethod
    def of(cls, graph: GraphInfo) -> CacheLayout:
        """Reads the layout off a decoder's inputs.

        Raises:
            BundleError: the graph has no cache inputs of a known type and fixed size.
        """
        keys = [tensor for tensor in graph.inputs if tensor.name.endswith(".key")]
        for tensor in keys[:1]:
            dtype = _NUMPY_TYPES.get(tensor.dtype.removeprefix("tensor(").removesuffix(")").lower())
            heads, head_dim = (tensor.shape[1], tensor.shape[3]) if len(tensor.shape) == 4 else (0, 0)
            if dtype is not None and isinstance(heads, int) and isinstance(head_dim, int) and heads * head_dim > 0:
                return cls(len(keys), heads, head_dim, dtype)
        why = "its cache inputs have no known type and size"
        raise BundleError("cannot run graph", graph.file, why, "Export the model again")

    @property
    def bytes_per_token(self) -> int:
        """Of one row, all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * np.dtype(self.dtype).itemsize


class KVCache:
    """A cache of several rows that grows as they do.

    Past and present of a layer are one buffer of `capacity` tokens, so a pass copies nothing. Growing copies; it
    doubles, so that a token is copied twice on average. What lies beyond a row's length has no meaning.

    Args:
        layout: of the decoder.
        rows: sequences side by side.
        limit: tokens a row may have at most (the model's context).
        device: "cpu", where the buffers are numpy arrays, or "cuda".

    Attributes:
        lengths: int64 [rows], valid tokens of each row.
    """

    def __init__(self, layout: CacheLayout, rows: int, limit: int, device: str = "cpu") -> None:
        self.layout = layout
        self.rows = rows
        self.limit = limit
        self.capacity = 0
        self.lengths = np.zeros(rows, np.int64)
        self._device = device
        self._buffers: list[Any] = []
        self._arrays: list[npt.NDArray[Any]] = []

    def reserve(self, tokens: int, expected: int = 0) -> bool:
        """Makes room for `tokens` in every row; returns whether the buffers are new and must be bound again.

        Args:
            tokens: needed now.
            expected: tokens the rows are likely to reach, room for which is made if there is none at all yet.

        Raises:
            UsageError: more than `limit`.
            ResourceError: more than the memory holds.
        """
        if tokens > self.limit:
            raise UsageError("context exceeded", "cache", f"{tokens} tokens, the model takes {self.limit}")
        if tokens <= self.capacity:
            return False
        wanted = max(tokens, 2 * self.capacity if self.capacity else expected, _SMALLEST)
        self._allocate(min(wanted, self.limit))
        return True

    def _allocate(self, capacity: int) -> None:
        layout = self.layout
        one_layer = layout.bytes_per_token * self.rows * self.capacity // layout.layers
        held = one_layer * (layout.layers - 1)
        check_cache(layout.bytes_per_token, self.rows, capacity, held)
        shape = (self.rows, layout.kv_heads, capacity, layout.head_dim)
        used = int(self.lengths.max())
        for index in range(2 * layout.layers):
            try:
                # Pages of zeros cost nothing until they are written.
                array = np.zeros(shape, layout.dtype)
            except MemoryError:
                why = f"{capacity} tokens of cache cannot be allocated"
                raise ResourceError("cannot hold context", "memory", why, "Shorten the prompt") from None
            if used:
                array[:, :, :used] = self._numpy(index)[:, :, :used]
            self._keep(index, array)
        self.capacity = capacity

    def _keep(self, index: int, array: npt.NDArray[Any]) -> None:
        buffer = onnxruntime().OrtValue.ortvalue_from_numpy(array, self._device, 0)
        if index == len(self._buffers):
            self._buffers.append(buffer)
            self._arrays.append(array[:0])
        self._buffers[index] = buffer
        # On the CPU the buffer only borrows the array's memory.
        self._arrays[index] = array if self._device == "cpu" else array[:0]

    def _numpy(self, index: int) -> npt.NDArray[Any]:
        if self._device == "cpu":
            return self._arrays[index]
        values: npt.NDArray[Any] = self._buffers[index].numpy()
        return values

    def bind(self, binding: Any) -> None:
        """Binds each layer's buffers to the decoder's past inputs and present outputs."""
        for layer in range(self.layout.layers):
            for past, present, buffer in (
                (past_key(layer), present_key(layer), self._buffers[2 * layer]),
                (past_value(layer), present_value(layer), self._buffers[2 * layer + 1]),
            ):
                binding.bind_ortvalue_input(past, buffer)
                binding.bind_ortvalue_output(present, buffer)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forgets what lies beyond `lengths`, which are not above the present ones.

        Raises:
            ValueError: a length is negative or above the present one.
        """
        wanted = np.asarray(lengths, np.int64)
        if wanted.shape != self.lengths.shape or (wanted < 0).any() or (wanted > self.lengths).any():
            raise ValueError(f"cannot rewind rows of {self.lengths.tolist()} tokens to {wanted.tolist()}")
        self.lengths = wanted
