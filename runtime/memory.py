"""What a run will need in memory, against what there is, said before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from model.bundle import GraphInfo, Manifest
from model.config import TextConfig, VisionConfig
from model.errors import ResourceError

# Rows of attention scores that the encoder's graph computes at a time at most, and its float32 values.
_QUERY_TILE: Final = 256
_FLOAT: Final = 4


def available_bytes() -> int | None:
    """Memory that this process may still take, or None where the system does not say.

    The least of what the kernel calls available, what the control group allows, and what is left of the address
    space limit.
    """
    limits = [_meminfo_available(), _cgroup_available(), _address_space_left()]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def _meminfo_available() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _cgroup_available() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        # Cached file pages are given back when somebody needs the memory.
        cached = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + (int(cached[1]) if cached else 0)


def _address_space_left() -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError, ValueError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit - pages * os.sysconf("SC_PAGE_SIZE")


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
