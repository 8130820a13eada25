"""What a run will need in memory, against what there is, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from model.bundle import GraphInfo, Manifest
from model.config import TextConfig, VisionConfig
from model.errors import ResourceError
from model.memory import CacheSize, available_bytes, shown, weight_bytes

_FLOAT: Final = 4
# Of the encoder: positions of patches, rotary tables and what the kernels take beside their results.
_BESIDE_PATCHES: Final = 8_000_000


def check_weights(manifest: Manifest, graphs: Iterable[GraphInfo]) -> None:
    """Refuses to load graphs that are larger than the memory.

    Raises:
        ResourceError: names both numbers.
    """
    needed, there = weight_bytes(manifest, graphs), available_bytes()
    if there is not None and needed > there:
        why = f"its weights take {shown(needed)}, {shown(there)} of memory are available"
        raise ResourceError("cannot load bundle", "memory", why, "Free memory, or use a bundle with fewer bits")


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
    """Working memory of encoding one image, estimated from above: activations of a block, as many as live at once.

    No attention keeps scores but that of windows, which are a row of cells for each patch and head.
    """
    gated = 4 * vision.hidden_size + 5 * vision.intermediate_size
    attended = 8 * vision.hidden_size + vision.num_heads * vision.window_side**2
    return _BESIDE_PATCHES + _FLOAT * patches * (max(gated, attended) + vision.patch_dim)


def check_image(vision: VisionConfig, patches: int, there: int | None = None) -> None:
    """Refuses an image whose encoding does not fit into `there` bytes, or into the memory.

    Raises:
        ResourceError: names both numbers.
    """
    needed, there = vision_bytes(vision, patches), available_bytes() if there is None else there
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
