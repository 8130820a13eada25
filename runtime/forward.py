"""One pass of the text model: token ids in, logits out, the cache extended."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bound import FEW, EmbeddedTokens, Named, ShortPasses
from runtime.cache import KVCache
from runtime.rows import Ids, Logits, RowPasses, Watcher, kept
from runtime.session import Array, GraphSession

__all__ = ["Ids", "Logits", "TextForward"]

# Tokens of a row from which a pass takes so long that the pages it has looked up should not wait for its end.
_MANY = 64
_HIDDEN = "hidden_states"


class TextForward(RowPasses):
    """Embedding and decoder over one cache.

    Args:
        decoder: the decoder's session.
        embedding: the embedding's session, or None where the decoder takes ids.
        cache: of as many rows as every pass will have.
        features: [image tokens, hidden] for the placeholders in the prompts, row by row; they are used up in order.
        media_ids: ids of placeholders. One that comes when the features are used up is text.
        expected: tokens that the rows are likely to reach.
        embedded: embeddings of tokens, for short passes that are watched.
    """

    def __init__(
        self,
        decoder: GraphSession,
        embedding: GraphSession | None,
        cache: KVCache,
        features: Array | None = None,
        media_ids: Collection[int] = (),
        expected: int = 0,
        embedded: EmbeddedTokens | None = None,
    ) -> None:
        self._logits_dtype, vocab = _logits_of(decoder)
        super().__init__(decoder, cache, vocab)
        self._embedding = embedding
        self._media_ids = np.array(sorted(media_ids), np.int64)
        self._expected = expected
        self._binding: Any = decoder.binding()
        self._takes_keep = decoder.has_input("logits_to_keep")
        # Of the binding of all rows: the logits it writes to, and how many positions it was told to keep.
        self._logits: Array | None = None
        self._keep: int | None = None
        # What bindings only borrow.
        self._keeps: dict[int, tuple[Ids, Any]] = {}
        self._ones: Ids = np.ones((1, 0), np.int64)
        self._watcher: Watcher | None = None
        self._embedded = embedded
        self._short: ShortPasses | None = None
        self._stale = False  # the binding has outputs that nobody wants
        if embedding is not None:
            info = next(tensor for tensor in embedding.graph.inputs if tensor.name == "image_features")
            hidden = int(info.shape[1])
            self._features: Array = np.zeros((0, hidden)) if features is None else features
            self._features = self._features.astype(info.dtype, copy=False)

    def give(self, features: Array | None) -> None:
        """Replaces the features for placeholders to come."""
        if self._embedding is not None:
            self._features = (
                self._features[:0] if features is None else features.astype(self._features.dtype, copy=False)
            )

    def watch(self, watcher: Watcher | None) -> bool:
        """See `RowPasses.watch`; needs a decoder that gives its hidden states, and an embedding before it."""
        if self._embedding is None or not any(info.name == _HIDDEN for info in self._decoder.graph.outputs):
            return watcher is None
        if watcher is None and self._watcher is not None:
            # What is bound stays bound, and the next pass may have another size.
            self._stale = True
        self._watcher = watcher
        return True

    def __call__(self, ids: Ids, lengths: Ids, keep: int = 1) -> Logits:
        """As `RowPasses`."""
        if not self._is_short(ids, keep):
            return super().__call__(ids, lengths, keep)
        total = int(lengths[0])
        self._reserve(total)
        logits = self._short_pass(ids[0].tolist(), total)
        self.cache.lengths = lengths.copy()
        return logits

    def _reserve(self, tokens: int) -> None:
        if self.cache.reserve(tokens, self._expected) or self._stale:
            if self._stale:
                self._binding = self._decoder.binding()
                self._stale, self._logits, self._keep, self._short = False, None, None, None
            self.cache.bind(self._binding)

    def _pass(self, ids: Ids, lengths: Ids, keep: int, binding: Any = None) -> Logits:
        total = int(lengths.max())
        shared = binding is None
        if shared:
            self._reserve(total)
            binding = self._binding
            if self._short is not None:
                self._short.unbound()
        name, inputs = self._inputs(ids)
        mask = self._mask(lengths, total)
        # The binding only borrows these arrays; they live until the run is over.
        binding.bind_cpu_input(name, inputs)
        binding.bind_cpu_input("attention_mask", mask)
        logits = self._outputs(binding, shared, (len(ids), kept(keep, ids.shape[1]), self._vocab), keep)
        hidden = self._hidden(binding, inputs) if self._watcher is not None and len(ids) == 1 else None
        self._decoder.run_bound(binding, lean=ids.shape[1] >= _MANY)
        if hidden is not None and self._watcher is not None:
            self._watcher(inputs, hidden)
        if ids.shape[1] >= _MANY:
            (self._embedding or self._decoder).release_weights()
        return logits.astype(np.float32, copy=False)

    def _is_short(self, ids: Ids, keep: int) -> bool:
        """Whether a pass is one of few tokens of text, watched, that gives the logits of all of them."""
        if self._watcher is None or self._embedded is None:
            return False
        rows, tokens = ids.shape
        return rows == 1 and keep == tokens <= FEW and not len(self._features)

    def _short_pass(self, ids: Sequence[int], total: int) -> Logits:
        tokens = len(ids)
        if self._short is None:
            self._short = ShortPasses(self._decoder, self._binding)
        places = self._short.places(tokens, self._short_arrays)
        embeds, found = places.given["inputs_embeds"], places.found
        if self._embedded is not None:
            self._embedded.put(ids, embeds[0])
        # What other passes bound is bound no more.
        self._logits, self._keep = None, None
        self._short.run(tokens, total)
        if self._watcher is not None:
            self._watcher(embeds.copy(), found[_HIDDEN].copy())
        return found["logits"].astype(np.float32, copy=False)

    def _short_arrays(self, tokens: int) -> tuple[Named, Named]:
        embeds = np.zeros((1, tokens, self._features.shape[1]), self._features.dtype)
        logits = np.zeros((1, tokens, self._vocab), self._logits_dtype)
        keep: Named = {"logits_to_keep": np.array([tokens], np.int64)} if self._takes_keep else {}
        return {"inputs_embeds": embeds, **keep}, {"logits": logits, _HIDDEN: np.zeros_like(embeds)}

    def _hidden(self, binding: Any, inputs: Array) -> Array:
        """Binds room for hidden states."""
        hidden = np.empty_like(inputs)
        binding.bind_ortvalue_output(_HIDDEN, self._decoder.tensor(hidden))
        return hidden

    def _mask(self, lengths: Ids, total: int) -> Ids:
        """1 for each row's tokens, [rows, total]; for one row a part of an array that is there."""
        if len(lengths) > 1:
            return (np.arange(total) < lengths[:, None]).astype(np.int64)
        if self._ones.shape[1] < total:
            self._ones = np.ones((1, max(total, self.cache.capacity)), np.int64)
        return self._ones[:, :total]

    def _outputs(self, binding: Any, shared: bool, shape: tuple[int, ...], keep: int) -> Array:
        """Binds what the pass writes to; for the binding of all rows that is mostly bound already."""
        if self._takes_keep and not (shared and keep == self._keep):
            if keep not in self._keeps:
                array = np.array([keep], np.int64)
                self._keeps[keep] = array, self._decoder.tensor(array)
            binding.bind_ortvalue_input("logits_to_keep", self._keeps[keep][1])
            self._keep = keep if shared else self._keep
        if shared and self._logits is not None and self._logits.shape == shape and shape[1] == 1:
            return self._logits
        logits = np.empty(shape, self._logits_dtype)
        binding.bind_ortvalue_output("logits", self._decoder.tensor(logits))
        self._logits = logits if shared else self._logits
        return logits

    def _inputs(self, ids: Ids) -> tuple[str, Array]:
        if self._embedding is None:
            return "input_ids", np.ascontiguousarray(ids)
        media = int(np.isin(ids, self._media_ids).sum()) if len(self._features) else 0
        feeds = {"input_ids": ids, "image_features": self._features[:media]}
        self._features = self._features[media:]
        return "inputs_embeds", self._embedding.run(feeds, ["inputs_embeds"])[0]


def _logits_of(decoder: GraphSession) -> tuple[npt.DTypeLike, int]:
    info = next(tensor for tensor in decoder.graph.outputs if tensor.name == "logits")
    return np.dtype(info.dtype), int(info.shape[2])
