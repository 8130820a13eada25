"""Keys and values of every layer, in buffers that a pass reads and extends in place.

A layer that keeps every token has a buffer that grows. A layer that keeps its window only has one of fixed size, in
which ONNX Runtime's kernel evicts what no later token sees (GroupQueryAttention, `sliding_window_cache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from model.bundle import (
    WINDOW_SLACK,
    GraphInfo,
    past_key,
    past_value,
    present_key,
    present_value,
    scale_of,
    window_layers,
)
from model.errors import BundleError, ResourceError, UsageError
from model.memory import CacheSize
from runtime.memory import check_cache
from runtime.providers import onnxruntime

_NUMPY_TYPES: Final = {
    "float32": np.float32, "float": np.float32, "float16": np.float16,
    "bfloat16": np.uint16,  # which numpy lacks; its size is what counts
    "uint8": np.uint8,
}  # fmt: skip
_SMALLEST: Final = 256


@dataclass(frozen=True)
class CacheLayout:
    """What the layers store: [rows, kv_heads, capacity, head_dim] of `dtype`, twice for each.

    Of uint8 they are codes (`exporter.lowering_int8`), int8 where they are values, and beside each such tensor stands
    one of float32 scales [rows, kv_heads, capacity, 1]; window layers then keep rings, in which a token stays in place.

    Attributes:
        layers: number of layers.
        window_layers: those that keep their window only.
        window: tokens that a query of theirs sees, itself included; 0 if there are none.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: npt.DTypeLike
    window_layers: frozenset[int] = frozenset()
    window: int = 0

    @property
    def scaled(self) -> bool:
        """Whether integers with scales are stored."""
        return np.dtype(self.dtype) == np.uint8

    def entries(self, layer: int) -> list[tuple[str, str, int, npt.DTypeLike]]:
        """A layer's tensors: names of the past input and the present output, width of a row, and type."""
        names = (past_key(layer), present_key(layer)), (past_value(layer), present_value(layer))
        types: tuple[npt.DTypeLike, ...] = (np.uint8, np.int8) if self.scaled else (self.dtype, self.dtype)
        entries: list[tuple[str, str, int, npt.DTypeLike]] = [
            (*pair, self.head_dim, dtype) for pair, dtype in zip(names, types, strict=True)
        ]
        if self.scaled:
            entries += [(scale_of(past), scale_of(present), 1, np.float32) for past, present in names]
        return entries

    @classmethod
    def of(cls, graph: GraphInfo, window: int | None) -> CacheLayout:
        """Reads the layout off the inputs of a decoder or draft head; `window` is the model's.

        Raises:
            BundleError: the graph has no cache inputs of a known type and fixed size.
        """
        keys = [tensor for tensor in graph.inputs if tensor.name.endswith(".key")]
        kept = frozenset(window_layers(graph))
        for tensor in keys[:1]:
            dtype = _NUMPY_TYPES.get(tensor.dtype.removeprefix("tensor(").removesuffix(")").lower())
            heads, head_dim = (tensor.shape[1], tensor.shape[3]) if len(tensor.shape) == 4 else (0, 0)
            sizes = isinstance(heads, int) and isinstance(head_dim, int) and heads * head_dim > 0
            if dtype is not None and isinstance(heads, int) and isinstance(head_dim, int) and sizes:
                if kept and window is None:
                    break
                return cls(len(keys), heads, head_dim, dtype, kept, window if kept and window else 0)
        why = "its cache inputs have no known type and size"
        raise BundleError("cannot run graph", graph.file, why, "Export the model again")

    def size(self, buffer: int) -> CacheSize:
        """Bytes of one row, where window layers have buffers of `buffer` tokens."""
        one_row = sum(width * np.dtype(dtype).itemsize for *_, width, dtype in self.entries(0))
        one_layer = self.kv_heads * one_row
        windows = len(self.window_layers)
        return CacheSize((self.layers - windows) * one_layer, windows * one_layer, buffer)


class KVCache:
    """A cache of several rows that grows as they do.

    Past and present of a layer are one buffer, so a pass copies nothing. Growing copies. The buffers grow by an eighth:
    over integers (and over floats in bundles of earlier versions) attention of one token reads the whole of a buffer,
    and to copy it once in so many tokens costs less than to read an empty half with each. What lies beyond a row's
    length has no meaning, but is finite. The buffers are arrays in the memory of the host; of a device, see
    `runtime.device_cache`.

    Args:
        layout: of the decoder.
        rows: sequences side by side.
        limit: tokens a row may have at most (the model's context).
        slack: rows of a window layer's buffer beyond the window; None takes the usual ones.

    Attributes:
        lengths: int64 [rows], valid tokens of each row.
        capacity: tokens that the growing buffers hold.
        buffer: tokens that the buffers of window layers hold; 0 if there are none.
    """

    def __init__(self, layout: CacheLayout, rows: int, limit: int, slack: int | None = None) -> None:
        self.layout = layout
        self.rows = rows
        self.limit = limit
        self.capacity = 0
        self.buffer = layout.window + (WINDOW_SLACK["cpu"] if slack is None else slack) if layout.window else 0
        self.lengths = np.zeros(rows, np.int64)
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
        self._allocate(min(max(tokens, self._room(tokens, expected)), self.limit))
        return True

    def _room(self, tokens: int, expected: int) -> int:
        """Tokens to make room for where `tokens` are needed."""
        if not self.capacity:
            return max(expected, _SMALLEST)
        # More than one token is a piece of a prompt, and there will be more pieces.
        return tokens + max(tokens // (8 if tokens == self.capacity + 1 else 2), _SMALLEST)

    def _allocate(self, capacity: int) -> None:
        layout, size = self.layout, self.layout.size(self.buffer)
        growing = layout.layers - len(layout.window_layers)
        # A layer is copied while the others are there once, as the old buffer or the new.
        copied = self.capacity * size.per_token // max(1, growing)
        check_cache(size, self.rows, capacity, self.rows * (size.of(self.capacity) - copied))
        used = int(self.lengths.max())
        for index, (layer, width, dtype) in enumerate(self._kept()):
            fixed = layer in layout.window_layers
            if fixed and self.capacity:
                continue
            shape = (self.rows, layout.kv_heads, self.buffer if fixed else capacity, width)
            try:
                # Pages of zeros cost nothing until they are written.
                array = np.zeros(shape, dtype)
            except MemoryError:
                why = f"{capacity} tokens of cache cannot be allocated"
                raise ResourceError("cannot hold context", "memory", why, "Shorten the prompt") from None
            if used:
                array[:, :, :used] = self._arrays[index][:, :, :used]
            self._keep(index, array)
        self.capacity = capacity

    def _kept(self) -> list[tuple[int, int, npt.DTypeLike]]:
        """Layer, width and type of every buffer, in their order."""
        layers = range(self.layout.layers)
        return [(layer, width, dtype) for layer in layers for *_, width, dtype in self.layout.entries(layer)]

    def _keep(self, index: int, array: npt.NDArray[Any]) -> None:
        buffer = onnxruntime().OrtValue.ortvalue_from_numpy(array, "cpu", 0)
        if index == len(self._buffers):
            self._buffers.append(buffer)
            self._arrays.append(array)
        # The buffer only borrows the array's memory.
        self._buffers[index], self._arrays[index] = buffer, array

    def bind(self, binding: Any, row: int | None = None, count: int = 1) -> None:
        """Binds each layer's buffers, or `count` rows of them, to the decoder's past inputs and present outputs."""
        entries = [entry for layer in range(self.layout.layers) for entry in self.layout.entries(layer)]
        for (past, present, _, kind), buffer in zip(entries, self._buffers, strict=True):
            if row is None:
                binding.bind_ortvalue_input(past, buffer)
                binding.bind_ortvalue_output(present, buffer)
                continue
            shape = buffer.shape()[1:]
            dtype = np.dtype(kind)
            start = buffer.data_ptr() + row * int(np.prod(shape)) * dtype.itemsize
            part = ("cpu", 0, dtype.type, (count, *shape), start)
            binding.bind_input(past, *part)
            binding.bind_output(present, *part)

    def move(self, source: int, target: int) -> None:
        """Brings what one row holds to another, on the CPU; the first holds nothing then."""
        length = int(self.lengths[source])
        for array, (layer, *_) in zip(self._arrays, self._kept(), strict=True):
            kept = array.shape[2] if layer in self.layout.window_layers else length
            array[target, :, :kept] = array[source, :, :kept]
        self.lengths[target], self.lengths[source] = length, 0

    def wipe(self, row: int) -> None:
        """Forgets a row, on the CPU, and what is not finite with it."""
        for array in self._arrays:
            array[row] = 0
        self.lengths[row] = 0

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forgets what lies beyond `lengths`, which are not above the present ones.

        Raises:
            ValueError: a length is negative, above the present one, or `can_rewind` says no.
        """
        if self.rows == 1 and self._can_rewind_row(lengths):
            self.lengths = np.array(lengths, np.int64)
            return
        wanted = np.asarray(lengths, np.int64)
        if wanted.shape != self.lengths.shape or (wanted < 0).any() or (wanted > self.lengths).any():
            raise ValueError(f"cannot rewind rows of {self.lengths.tolist()} tokens to {wanted.tolist()}")
        if not self.can_rewind(lengths):
            raise ValueError(f"cannot rewind to {wanted.tolist()}: the windows before are gone; read the rows again")
        self.lengths = wanted

    def _can_rewind_row(self, lengths: Sequence[int]) -> bool:
        """`can_rewind` of a row alone, without arrays, for drafts are forgotten after every pass; no may be yes."""
        if len(lengths) != 1 or self.layout.scaled:
            return False
        wanted, length = int(lengths[0]), int(self.lengths[0])
        kept = not self.layout.window or self._evicted(length) == self._evicted(wanted)
        return 0 <= wanted <= length and kept

    def can_rewind(self, lengths: Sequence[int]) -> bool:
        """Whether window layers still hold what tokens after `lengths` will see: mostly yes for few, never for many."""
        if not self.layout.window:
            return True
        wanted = np.asarray(lengths, np.int64)
        if self.layout.scaled:
            # A ring has lost what lay where later tokens do; the next token sees its window, itself included.
            lost = self.lengths - (self.buffer - 1)
            return bool(((lost <= 0) | (wanted - self.layout.window + 1 >= lost) | (wanted == 0)).all())
        same = self._held(self.lengths) - self._held(wanted) == self.lengths - wanted
        return bool((same | (wanted == 0)).all())

    @property
    def on_host(self) -> bool:
        """Whether `arrays` are the buffers themselves."""
        return True

    def arrays(self) -> list[npt.NDArray[Any]]:
        """The buffers, layer by layer in the order of `CacheLayout.entries`; none before there is room."""
        return list(self._arrays)

    def window_rows(self, length: int) -> int:
        """Rows of a window layer's buffer that have a meaning after `length` tokens."""
        if self.layout.scaled:
            return min(length, self.buffer)
        return int(self._held(np.array([length], np.int64))[0])

    def forgettable(self, tokens: int) -> int:
        """How many of the next `tokens` a pass may append so that any of them can be forgotten again by `rewind`."""
        layout = self.layout
        if not layout.window:
            return tokens
        if layout.scaled:
            return min(tokens, max(self.buffer - layout.window, self.buffer - 1 - int(self.lengths.max())))
        # The next eviction loses what was held before it.
        if self.rows == 1:
            length = int(self.lengths[0])
            return min(tokens, self.buffer - length + self._evicted(length))
        return min(tokens, self.buffer - int(self._held(self.lengths).max()))

    def _evicted(self, length: int) -> int:
        """Tokens that a window layer's buffer has lost after so many."""
        room = self.buffer - self.layout.window + 1
        return room * max(0, -((self.buffer - length) // room))

    def _held(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens in a window layer's buffer after so many: as many as fit, or what eviction left."""
        room = self.buffer - self.layout.window + 1
        held: npt.NDArray[np.int64] = lengths - room * np.maximum(0, -((self.buffer - lengths) // room))
        return held
