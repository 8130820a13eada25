"""What a run will need in memory, against what there is, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from model.bundle import GraphInfo, Manifest
from model.config import TextConfig, VisionConfig
from model.errors import ResourceError
from model.memory import available_bytes

# Rows of attention scores that the encoder's graph computes at a time at most, and its float32 values.
_QUERY_TILE: Final = 256
_FLOAT: Final = 4


def shown(size: float) -> str:
    """A size for a message, in MB or GB of 1000."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


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


def kv_bytes_per_token(text: TextConfig, value_bytes: int = _FLOAT) -> int:
    """Bytes of keys and values that one token takes, all layers together."""
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * value_bytes


def check_cache(bytes_per_token: int, rows: int, tokens: int, held: int = 0) -> None:
    """Refuses a key/value cache that does not fit.

    Args:
        bytes_per_token: of one row.
        rows, tokens: size of the cache.
        held: bytes that are given back when the new cache is there.

    Raises:
        ResourceError: names the tokens that would fit.
    """
    there = available_bytes()
    needed = bytes_per_token * rows * tokens
    if there is None or needed <= there + held:
        return
    fitting = max(0, (there + held) // (bytes_per_token * rows))
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
