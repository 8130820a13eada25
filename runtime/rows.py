"""How a pass over several rows is made of passes that the attention kernel takes; what a pass is, subclasses say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import ResourceError
from runtime.cache import KVCache
from runtime.decode import CHUNK
from runtime.sampling import Sampler
from runtime.session import Array, GraphSession

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
# Told of a pass over one row: embeddings that went in and hidden states that came out, each [1, tokens, width].
Watcher = Callable[[Array, Array], None]


class RowPasses(ABC):
    """A text model with a memory, see `runtime.decode.Forward`.

    Args:
        decoder: the decoder's session.
        cache: of as many rows as every pass will have.
        vocab: logits of a position.

    Attributes:
        cache: keys and values of what was read so far.
        chunk: tokens of a row that are read at a time.
    """

    chunk = CHUNK

    def __init__(self, decoder: GraphSession, cache: KVCache, vocab: int) -> None:
        self.cache = cache
        self._decoder = decoder
        self._vocab = vocab
        # Of some rows: how many from which, and what room the cache had then.
        self._bindings: dict[tuple[int, int], tuple[int, Any]] = {}

    def __call__(self, ids: Ids, lengths: Ids, keep: int = 1) -> Logits:
        """Appends tokens to the rows of the cache.

        Args:
            ids: [rows, sequence]; padding stands on the right and counts for nothing.
            lengths: [rows], each row's valid tokens after this pass. In a first pass they are the prompts' lengths;
                later all rows must take one token, or there must be one row alone (a limit of the attention
                kernel). A row whose length stays as it is has ended: what it held is lost.
            keep: logits of how many last positions; 0 for all (of the sequence, padding included).

        Returns:
            float32 [rows, kept, vocab]; those of one position, or of a watched pass, are overwritten by the next one.

        Raises:
            ResourceError: the cache or the pass does not fit in memory.
            BundleError: a graph fails.
        """
        if len(ids) > 1 and self.cache.lengths.any():
            going = lengths == self.cache.lengths + 1
            # A row that has ended costs least as one of a single token.
            logits = self._pass(ids, np.where(going, lengths, 1), keep)
            self.cache.lengths = np.where(going, lengths, 0)
            return logits
        if len(ids) == 1 or self._side_by_side(lengths, ids.shape[1]):
            logits = self._pass(ids, lengths, keep)
        else:
            logits = self._one_by_one(ids, lengths, keep)
        self.cache.lengths = lengths.copy()
        return logits

    def _side_by_side(self, lengths: Ids, sequence: int) -> bool:
        """Whether to read prompts in one padded pass: only if it is no larger than the pieces of one prompt are.

        Padding costs as much as tokens, and the kernel cannot evict it from windows.
        """
        padded = len(lengths) * sequence
        padding = padded - int(lengths.sum())
        held = not padding or not self.cache.buffer or sequence <= self.cache.buffer
        return held and padded <= self.chunk and 8 * padding <= padded

    def _one_by_one(self, ids: Ids, lengths: Ids, keep: int) -> Logits:
        """A first pass over several prompts, each read alone into its row of the cache."""
        self._reserve(int(lengths.max()))
        logits = np.zeros((len(ids), kept(keep, ids.shape[1]), self._vocab), np.float32)
        for row, length in enumerate(lengths):
            binding = self._decoder.binding()
            self.cache.bind(binding, row)
            step = self.chunk if keep == 1 else int(length)
            for start in range(0, int(length), step):
                stop = min(start + step, int(length))
                given = self._pass(ids[row : row + 1, start:stop], np.array([stop], np.int64), keep, binding)[0]
            place = slice(0, length) if keep == 0 else slice(-len(given), None)
            logits[row, place] = given
        return logits

    def append(self, row: int, ids: Ids) -> Logits:
        """Appends tokens to neighbouring rows of the cache; the others stay as they are.

        Args:
            row: the first.
            ids: [rows, sequence], all of them valid; one row, or one token each for rows that hold some already.

        Returns:
            float32 [rows, vocab]: logits at each row's last token.

        Raises:
            ResourceError: the cache or the pass does not fit in memory.
            BundleError: a graph fails.
        """
        place = slice(row, row + len(ids))
        lengths = self.cache.lengths[place] + ids.shape[1]
        try:
            self._reserve(int(lengths.max()))
        except ResourceError:
            self._bindings.clear()  # some buffers may be new, and what was bound of them gone
            raise
        key = row, len(ids)
        if key not in self._bindings or self._bindings[key][0] != self.cache.capacity:
            self._bindings[key] = self.cache.capacity, self._decoder.binding()
            self.cache.bind(self._bindings[key][1], *key)
        logits = self._pass(ids, lengths, 1, self._bindings[key][1])
        self.cache.lengths[place] = lengths
        return logits[:, -1]

    def samplers(self, samplers: Sequence[Sampler], plain: bool) -> list[Sampler]:
        """The samplers to use with this model's logits.

        Args:
            samplers: of each row.
            plain: whether all of them look at nothing but which logit is the largest.
        """
        return list(samplers)

    @abstractmethod
    def give(self, features: Any) -> None:
        """Replaces the features, [image tokens, hidden], for placeholders to come; None: there are none."""

    def rewind(self, length: int) -> None:
        """Forgets what lies beyond `length` tokens of the only row; see `KVCache.rewind`."""
        self.cache.rewind([length])

    def watch(self, watcher: Watcher | None) -> bool:
        """Has `watcher` told of every pass; returns whether that can be done here. None ends it."""
        return watcher is None

    def reserve(self, tokens: int) -> None:
        """Makes room for so many tokens in every row. Raises as `KVCache.reserve`."""
        self._reserve(tokens)

    @abstractmethod
    def _reserve(self, tokens: int) -> None:
        """Makes room in the cache, and binds it again where it is new."""

    @abstractmethod
    def _pass(self, ids: Ids, lengths: Ids, keep: int, binding: Any = None) -> Logits:
        """One run of the graphs; `binding` is that of one row of the cache, or None for all of them."""


def kept(keep: int, sequence: int) -> int:
    """Positions whose logits a pass gives."""
    return sequence if keep == 0 else min(keep, sequence)
