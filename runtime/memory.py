"""What a run will need in memory, against what there is, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from model.bundle import GraphInfo, Manifest
from model.config import TextConfig, VisionConfig
from model.errors import ResourceError
from model.memory import available_bytes, shown

# Rows of attention scores that the encoder's graph computes at a time at most, and its float32 values.
_QUERY_TILE: Final = 256
_FLOAT: Final = 4


def weight_bytes(manifest: Manifest, graphs: Iterable[GraphInfo]) -> int:
    """Bytes of the files of `graphs`, a file that two of them share counted once."""
    names = {name for graph in graphs for name in (graph.file, *graph.data)}
    return sum(manifest.files[name].size for name in names)


def check_weights(manifest: Manifest, graphs: Iterable[GraphInfo]) -> None:
    """Refuses to load graphs that are larger than the memory.

    Raises:
        ResourceError: names both numbers.
    """
    needed, there = weight_bytes(manifest, graphs), available_bytes()
    if there is not None and needed > there:
        why = f"its weights take {shown(needed)}, {shown(there)} of memory are available"
        raise ResourceError("cannot load bundle", "memory", why, "Free memory, or use a bundle with fewer bits")


@dataclass(frozen=True)
class CacheSize:
    """Bytes of one row of a key/value cache.

    Attributes:
        per_token: of the layers that keep every token.
        window_per_token: of the layers that keep their window only.
        window_tokens: tokens that those layers' buffers hold.
    """

    per_token: int
    window_per_token: int = 0
    window_tokens: int = 0

    def of(self, tokens: int) -> int:
        """Bytes that `tokens` take; a buffer's pages count when they are used."""
        return tokens * self.per_token + min(tokens, self.window_tokens) * self.window_per_token

    def fitting(self, size: int) -> int:
        """Most tokens that take no more than `size` bytes."""
        both = self.per_token + self.window_per_token
        inside = max(0, size) // both
        if inside <= self.window_tokens or not self.per_token:
            return inside
        return (size - self.window_tokens * self.window_per_token) // self.per_token


def cache_size(text: TextConfig, value_bytes: int, window_cache: bool, slack: int) -> CacheSize:
    """Size of the decoder's cache.

    Args:
        text: the model.
        value_bytes: of one key or value.
        window_cache: whether window layers keep their window only.
        slack: rows of their buffers beyond the window.
    """
    one_layer = 2 * text.num_kv_heads * text.head_dim * value_bytes
    window = text.cached_window if window_cache else None
    if window is None:
        return CacheSize(text.num_layers * one_layer)
    sliding = sum(text.is_sliding(layer) for layer in range(text.num_layers))
    return CacheSize((text.num_layers - sliding) * one_layer, sliding * one_layer, window + slack)


def check_cache(size: CacheSize, rows: int, tokens: int, held: int = 0) -> None:
    """Refuses a key/value cache that does not fit.

    Args:
        size: of one row.
        rows, tokens: size of the cache.
        held: bytes that are given back when the new cache is there.

    Raises:
        ResourceError: names the tokens that would fit.
    """
    there = available_bytes()
    needed = rows * size.of(tokens)
    if there is None or needed <= there + held:
        return
    fitting = size.fitting((there + held) // rows)
    why = f"{rows} x {tokens} tokens take {shown(needed)} of cache, {shown(there)} of memory are available"
    raise ResourceError("cannot hold context", "memory", why, f"At most {fitting} tokens fit: shorten the prompt")


def vision_bytes(vision: VisionConfig, patches: int) -> int:
    """Working memory of encoding one image, estimated from above: activations of a block and a tile of scores."""
    widths = 6 * vision.hidden_size + 4 * vision.intermediate_size + 2 * vision.patch_dim
    scores = 2 * vision.num_heads * min(patches, _QUERY_TILE) * patches
    return _FLOAT * (patches * widths + scores)


def check_image(vision: VisionConfig, patches: int) -> None:
    """Refuses an image whose encoding does not fit.

    Raises:
        ResourceError: names both numbers.
    """
    needed, there = vision_bytes(vision, patches), available_bytes()
    if there is not None and needed > there:
        why = f"encoding {patches} patches takes about {shown(needed)}, {shown(there)} of memory are available"
        raise ResourceError("cannot encode image", "memory", why, "Use a smaller image")


def pass_bytes(text: TextConfig, rows: int, tokens: int) -> int:
    """Working memory of one pass without a cache, estimated from above: activations of a layer.

    The attention kernel keeps no matrix of scores.
    """
    heads = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    widths = 6 * text.hidden_size + 3 * text.intermediate_size + 2 * heads
    return _FLOAT * rows * tokens * widths


def check_pass(text: TextConfig, rows: int, tokens: int) -> None:
    """Refuses a pass that does not fit.

    Raises:
        ResourceError: names both numbers, and the tokens that would fit.
    """
    needed, there = pass_bytes(text, rows, tokens), available_bytes()
    if there is not None and needed > there:
        why = f"{rows} x {tokens} tokens take about {shown(needed)}, {shown(there)} of memory are available"
        fitting = there // pass_bytes(text, rows, 1)
        raise ResourceError("cannot encode text", "memory", why, f"At most {fitting} tokens fit: shorten the text")
