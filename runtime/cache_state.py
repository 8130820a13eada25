"""Copies of what a row of a cache holds: to go back to, or to keep in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.cache import CacheLayout, KVCache
from runtime.session import Array

_BFLOAT_EXPONENT = 0x7F80


@dataclass(frozen=True)
class CacheState:
    """A row's tensors after `length` tokens.

    Attributes:
        arrays: [1, kv_heads, rows, width], of every layer or of the window layers, in the cache's own order.
    """

    length: int
    arrays: tuple[Array, ...]

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        return sum(array.nbytes for array in self.arrays)


def state_shapes(cache: KVCache, length: int, windows_only: bool) -> list[tuple[tuple[int, ...], npt.DTypeLike]]:
    """Shapes and types of a state's arrays; `cache` may be empty."""
    layout = cache.layout
    return [
        ((1, layout.kv_heads, rows, width), dtype)
        for layer, width, dtype in _tensors(layout)
        if (rows := _rows(cache, layer, length, windows_only)) is not None
    ]


def save_state(cache: KVCache, windows_only: bool) -> CacheState:
    """Copies a cache of one row, on the host: all of it, or what its window layers hold."""
    return CacheState(int(cache.lengths[0]), tuple(part.copy() for part in parts_of(cache, windows_only)))


def parts_of(cache: KVCache, windows_only: bool = False) -> list[Array]:
    """What `save_state` copies, where it lies."""
    parts = []
    for (layer, _, _), array in zip(_tensors(cache.layout), cache.arrays(), strict=True):
        rows = _rows(cache, layer, int(cache.lengths[0]), windows_only)
        if rows is not None:
            parts.append(array[:, :, :rows])
    return parts


def put_back(cache: KVCache, state: CacheState, windows_only: bool) -> None:
    """Writes a copy back: the cache holds `state.length` tokens afterwards.

    There must be room for them. Of window layers alone: what the other layers hold of so many tokens must be there
    still.
    """
    copies = iter(state.arrays)
    for (layer, _, _), array in zip(_tensors(cache.layout), cache.arrays(), strict=True):
        rows = _rows(cache, layer, state.length, windows_only)
        if rows is not None:
            array[:, :, :rows] = next(copies)
    cache.lengths = np.array([state.length], np.int64)


def finite(array: Array) -> bool:
    """Whether a tensor of a cache has no NaN and no infinity; bfloat16 comes as uint16, codes as uint8."""
    if array.dtype == np.uint16:
        return bool(((array & _BFLOAT_EXPONENT) != _BFLOAT_EXPONENT).all())
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _tensors(layout: CacheLayout) -> Sequence[tuple[int, int, npt.DTypeLike]]:
    """Layer, width of a row and type of every tensor, in a cache's order."""
    return [(layer, width, dtype) for layer in range(layout.layers) for *_, width, dtype in layout.entries(layer)]


def _rows(cache: KVCache, layer: int, length: int, windows_only: bool) -> int | None:
    """Rows to copy of a layer's tensors; None leaves the layer out."""
    if layer in cache.layout.window_layers:
        return cache.window_rows(length)
    return None if windows_only else length
