"""A row of the cache that later prompts go on with: what a new prompt shares with it is not read again.

Prompts are compared position by position: token ids, and for pieces of images and videos what they show. Layers that
keep every token are cut back to the shared part. Layers that keep their window lose, with every token, one that an
earlier position would have to see: they can be cut back by a few tokens only. So a copy of the windows is kept from
shortly before the end of each prompt; that is where the next prompt of a conversation mostly parts from what was
generated, as templates leave out earlier reasoning. A prompt that parts before all copies is read from its beginning:
a window layer's keys come from the layers below, whose own windows are gone too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import numpy as np

from model.memory import available_bytes
from model.progress import Progress
from runtime.cache import KVCache
from runtime.cache_state import CacheState, put_back, save_state, state_shapes
from runtime.rows import Ids, Logits, RowPasses, Watcher
from runtime.sampling import Sampler

Key = int | tuple[str, int]
"""What stands at a position: a token id, or of an image or video its `media_key` and which of its tokens."""

# Tokens at a prompt's end that the next prompt may have otherwise: they open the answer, and its reasoning.
_OPENING: Final = 16
_MOST_COPIES: Final = 4
# A copy is made where so many times its size are free.
_SHARE: Final = 4


class Stopped(Exception):
    """Somebody asked to stop, between two passes."""


def prompt_keys(ids: Sequence[int], media: Sequence[tuple[str, int]], placeholders: Collection[int]) -> list[Key]:
    """A prompt's keys.

    Args:
        ids: placeholders expanded.
        media: key and number of tokens of each image and video, in the order of their placeholders.
        placeholders: their ids.
    """
    keys: list[Key] = list(ids)
    runs = media_runs(ids, [count for _, count in media], placeholders)
    for (key, count), (start, end) in zip(media, runs, strict=True):
        keys[start:end] = [(key, offset) for offset in range(count)]
    return keys


def media_runs(ids: Sequence[int], counts: Sequence[int], placeholders: Collection[int]) -> Iterator[tuple[int, int]]:
    """Where the tokens of each image and video begin and end in a prompt."""
    place = 0
    for count in counts:
        while ids[place] not in placeholders:
            place += 1
        yield place, place + count
        place += count


def common_prefix(first: Sequence[Key], second: Sequence[Key]) -> int:
    """Positions from the beginning at which both have the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


class KeptRow:
    """One row that stays; a `runtime.decode.Forward` that reads of a prompt what it does not hold.

    Args:
        forward: the text model with an empty cache of one row, used by nobody else.
        progress: told of reading long prompts.
        stop: once it is set, the next pass raises `Stopped`.

    Attributes:
        keys: what the row holds, one key for each token.
        reused, read: tokens of the last prompt that were there, and that were read.
        chunk: tokens of a prompt that are taken at a time: all; the row divides them itself.
    """

    def __init__(self, forward: RowPasses, progress: Progress, stop: threading.Event | None = None) -> None:
        self.keys: list[Key] = []
        self.reused = self.read = 0
        self.chunk = forward.cache.limit
        self._forward = forward
        self._progress = progress
        self._prompt: list[Key] = []
        self._copy_at = -1
        self._copies: list[CacheState] = []
        self._whole = True  # no pass was cut short
        self._stop = stop or threading.Event()

    @property
    def cache(self) -> KVCache:
        """Of the row. Who rewinds it need say nothing: keys beyond its length are forgotten with the next pass."""
        return self._forward.cache

    @property
    def copies(self) -> tuple[CacheState, ...]:
        """States of the window layers to which the row can go back, shortest first."""
        return tuple(self._copies)

    @property
    def whole(self) -> bool:
        """Whether the cache holds what `keys` say and nothing else: no pass was cut short."""
        return self._whole and len(self.keys) == self.cache.lengths[0]

    def reserve(self, tokens: int) -> None:
        """As `RowPasses.reserve`."""
        self._forward.reserve(tokens)

    def restore(self, keys: Sequence[Key], state: CacheState, copies: Sequence[CacheState]) -> None:
        """Takes over an earlier row's cache and copies of windows; `keys` say what it holds."""
        self.reserve(state.length)
        put_back(self.cache, state, windows_only=False)
        self.keys, self._copies = list(keys), list(copies)

    def begin(self, keys: Sequence[Key], answer: int) -> int:
        """Turns to a new prompt, and forgets what it does not share.

        Args:
            keys: of the whole prompt.
            answer: tokens that may be generated after it.

        Returns:
            How many of its tokens the row holds; the last one is always read, for its logits.
        """
        del self.keys[int(self.cache.lengths[0]) :]
        held = self._back_to(common_prefix(self.keys, keys[:-1]))
        del self.keys[held:]
        self._copies = [copy for copy in self._copies if copy.length <= held]
        self._whole = True
        self._prompt = list(keys)
        self.reused, self.read = held, len(keys) - held
        windows = self.cache.buffer if self.cache.on_host else 0
        # Nothing is lost to windows before their buffers are full.
        self._copy_at = len(keys) - _OPENING if 0 < windows < len(keys) + answer else -1
        return held

    def _back_to(self, shared: int) -> int:
        """Rewinds to `shared` tokens, or as few as there must be; returns how many."""
        cache = self.cache
        if not cache.lengths[0]:
            return 0
        # A pass that was cut short has written beyond the row's length, which harms nothing but windows.
        if (self._whole or not cache.buffer) and shared <= cache.lengths[0] and cache.can_rewind([shared]):
            cache.rewind([shared])
            return shared
        for copy in reversed(self._copies):
            if copy.length <= shared:
                put_back(cache, copy, windows_only=True)
                return copy.length
        cache.rewind([0])
        return 0

    def check_stopped(self) -> None:
        """Raises `Stopped` if somebody asked to stop."""
        if self._stop.is_set():
            raise Stopped

    def give(self, features: Any) -> None:
        """As `RowPasses.give`."""
        self._forward.give(features)

    def rewind(self, length: int) -> None:
        """As `RowPasses.rewind`."""
        self._forward.rewind(length)
        del self.keys[length:]

    def watch(self, watcher: Watcher | None) -> bool:
        """As `RowPasses.watch`."""
        return self._forward.watch(watcher)

    def samplers(self, samplers: Sequence[Sampler], plain: bool) -> list[Sampler]:
        """As `RowPasses.samplers`."""
        return self._forward.samplers(samplers, plain)

    def __call__(self, ids: Ids, lengths: Ids, keep: int = 1) -> Logits:
        """Reads tokens as `RowPasses` does, without those at their beginning that are held.

        Raises:
            Stopped: between two passes, if somebody asked.
        """
        start, end = int(lengths[0]) - ids.shape[1], int(lengths[0])
        held = min(len(self.keys), int(self.cache.lengths[0]))
        del self.keys[held:]
        if not start <= held < end:
            raise ValueError(f"tokens {start} to {end} do not go on where the row ends, at {held}")
        shown = end - held > self._forward.chunk
        if shown:
            self._progress.start("reading prompt", end - held, "tokens")
        try:
            for stop in self._stops(held, end):
                self.check_stopped()
                logits = self._pass(ids[:, len(self.keys) - start : stop - start], stop, keep)
                if shown:
                    self._progress.advance(stop - held)
                held = stop
        finally:
            if shown:
                self._progress.finish()
        return logits

    def _stops(self, held: int, end: int) -> Iterator[int]:
        """Where passes end: after as many tokens as one takes, and where windows are copied."""
        while held < end:
            stop = min(held + self._forward.chunk, end)
            held = self._copy_at if held < self._copy_at < stop else stop
            yield held

    def _pass(self, ids: Ids, end: int, keep: int) -> Logits:
        self._whole = False
        logits = self._forward(ids, np.array([end], np.int64), keep)
        self.keys += self._prompt[len(self.keys) : end]
        self.keys += ids[0, ids.shape[1] - (end - len(self.keys)) :].tolist()
        self._whole = True
        if end == self._copy_at:
            self._copy_windows()
        return logits

    def _copy_windows(self) -> None:
        """Keeps a copy of the windows as they are, where the memory allows; older ones make room."""
        shapes = state_shapes(self.cache, len(self.keys), windows_only=True)
        needed = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes)
        there = available_bytes()
        there = _SHARE * needed if there is None else there
        while self._copies and (len(self._copies) >= _MOST_COPIES or there < _SHARE * needed):
            there += self._copies.pop(0).bytes
        if there >= _SHARE * needed:
            self._copies.append(save_state(self.cache, windows_only=True))
