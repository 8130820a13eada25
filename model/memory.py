"""How much memory this process may still take, and how much a bundle's weights and cache do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from model.bundle import GraphInfo, Manifest
from model.config import TextConfig


def available_bytes() -> int | None:
    """Memory that this process may still take, or None where the system does not say.

    The least of what the kernel calls available, what the control group allows, and what is left of the address
    space limit.
    """
    return _least(physical_bytes(), address_space_left())


def physical_bytes() -> int | None:
    """Memory that this process may still fill, whatever it may map: see `available_bytes`."""
    return _least(_meminfo_available(), _cgroup_available())


def address_space_left() -> int | None:
    """What this process may still map; None where there is no limit, or the system does not say."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except ImportError:
        return None
    mapped, _ = own_bytes()
    return None if limit == resource.RLIM_INFINITY or not mapped else limit - mapped


def own_bytes() -> tuple[int, int]:
    """What this process maps, and what of it lies in memory; zeros where the system does not say."""
    try:
        mapped, resident = Path("/proc/self/statm").read_text().split()[:2]
    except (OSError, ValueError):
        return 0, 0
    size = os.sysconf("SC_PAGE_SIZE")
    return int(mapped) * size, int(resident) * size


def _least(*limits: int | None) -> int | None:
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


def shown(size: float) -> str:
    """A size for a message, in kB, MB or GB of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{max(0.0, size) / 1e3:.1f} kB"


def weight_bytes(manifest: Manifest, graphs: Iterable[GraphInfo]) -> int:
    """Bytes of the files of `graphs`, a file that two of them share counted once."""
    names = {name for graph in graphs for name in (graph.file, *graph.data)}
    return sum(manifest.files[name].size for name in names)


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


def cache_size(text: TextConfig, value_bytes: int, window_cache: bool, slack: int, scaled: bool = False) -> CacheSize:
    """Size of the decoder's cache.

    Args:
        text: the model.
        value_bytes: of one key or value.
        window_cache: whether window layers keep their window only.
        slack: rows of their buffers beyond the window.
        scaled: whether a float32 scale stands beside each token and head.
    """
    one_layer = 2 * text.num_kv_heads * (text.head_dim * value_bytes + (4 if scaled else 0))
    window = text.cached_window if window_cache else None
    if window is None:
        return CacheSize(text.num_layers * one_layer)
    sliding = sum(text.is_sliding(layer) for layer in range(text.num_layers))
    return CacheSize((text.num_layers - sliding) * one_layer, sliding * one_layer, window + slack)
