"""Short passes that come again and again: what goes in and out lies where it always lay, and is bound once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from runtime.cache import KVCache
from runtime.session import Array, GraphSession

# Passes of more tokens than this are rare, or so long that binding costs nothing beside them.
FEW: Final = 16
_MOST_EMBEDDED: Final = 4096


Named = dict[str, Array]


@dataclass(frozen=True)
class _Places:
    """Arrays by name, and the values that are bound, which only borrow their memory."""

    given: Named
    found: Named
    inputs: list[tuple[str, Any]]
    outputs: list[tuple[str, Any]]


class ShortPasses:
    """Passes of a decoder or draft head over one row, a few tokens at a time.

    Args:
        session: of the graph.
        cache: of the row, with room.
    """

    def __init__(self, session: GraphSession, cache: KVCache) -> None:
        self._session, self._cache = session, cache
        self._binding: Any = session.binding()
        self._places: dict[int, _Places] = {}
        self._bound = 0  # the number of tokens whose places are
        self.renew()

    def renew(self) -> None:
        """Must be called when the cache's buffers are new."""
        self._cache.bind(self._binding)

    def arrays(self, tokens: int, make: Callable[[int], tuple[Named, Named]]) -> tuple[Named, Named]:
        """What a pass over so many tokens reads, to be filled before it, and writes; the next one overwrites it.

        `make` gives both, by name, without cache and mask. It is not kept: it belongs to who keeps this, and what
        refers to itself in a circle holds its cache until Python looks for such.
        """
        if tokens not in self._places:
            for many in [size for size in self._places if size > FEW]:
                del self._places[many]
                self._bound = 0
            given, found = make(tokens)
            values = [[(name, self._session.tensor(array)) for name, array in part.items()] for part in (given, found)]
            self._places[tokens] = _Places(given, found, *values)
        places = self._places[tokens]
        return places.given, places.found

    def run(self, tokens: int, mask: Array) -> None:
        """Runs on `arrays` with this attention mask, int64 [1, tokens]. Raises as `GraphSession.run_bound`."""
        if tokens != self._bound:
            for name, value in self._places[tokens].inputs:
                self._binding.bind_ortvalue_input(name, value)
            for name, value in self._places[tokens].outputs:
                self._binding.bind_ortvalue_output(name, value)
            self._bound = tokens
        self._binding.bind_cpu_input("attention_mask", mask)
        self._session.run_bound(self._binding)


class EmbeddedTokens:
    """Embeddings by id: text repeats its tokens, and a lookup takes a tenth of a small model's pass.

    Args:
        session: of the graph that turns ids into embeddings.
    """

    def __init__(self, session: GraphSession) -> None:
        self._session = session
        features = next(tensor for tensor in session.graph.inputs if tensor.name == "image_features")
        self._no_features: Array = np.zeros((0, int(features.shape[1])), features.dtype)
        self._rows: dict[int, Array] = {}

    def put(self, ids: Sequence[int], into: Array) -> None:
        """Writes the embeddings of `ids` into the rows of `into` [tokens, width]; a placeholder's is its own."""
        rows = self._rows
        if any(token not in rows for token in ids):
            self._add(ids)
        for place, token in enumerate(ids):
            into[place] = rows[token]

    def _add(self, ids: Sequence[int]) -> None:
        if len(self._rows) + len(ids) > _MOST_EMBEDDED:
            self._rows.clear()
        feeds = {"input_ids": np.array([ids], np.int64), "image_features": self._no_features}
        for token, row in zip(ids, self._session.run(feeds, ["inputs_embeds"])[0][0], strict=True):
            self._rows[token] = row.copy()
