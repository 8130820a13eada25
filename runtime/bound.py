"""Short passes that come again and again: what goes in and out lies where it always lay, and is bound once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from runtime.session import Array, GraphSession

# Passes of more tokens than this are rare, or so long that binding costs nothing beside them.
FEW: Final = 16
_MOST_EMBEDDED: Final = 4096


Named = dict[str, Array]


@dataclass(frozen=True)
class Places:
    """What passes of one size read and write.

    Attributes:
        given, found: arrays by name; a pass reads `given` and writes `found`.
        inputs, outputs: values over the same memory, as they are bound.
    """

    given: Named
    found: Named
    inputs: list[tuple[str, Any]]
    outputs: list[tuple[str, Any]]


class ShortPasses:
    """Passes of a decoder or draft head over one row, a few tokens at a time.

    Args:
        session: of the graph.
        binding: to which the row's cache is bound, and bound again when its buffers are new.
    """

    def __init__(self, session: GraphSession, binding: Any) -> None:
        self._session, self._binding = session, binding
        self._places: dict[int, Places] = {}
        self._bound = 0  # the number of tokens whose places are
        self._ones: Array = np.ones((1, 0), np.int64)

    def unbound(self) -> None:
        """Must be called when something else than these passes was bound, but for the cache."""
        self._bound = 0

    def places(self, tokens: int, make: Callable[[int], tuple[Named, Named]]) -> Places:
        """What a pass over so many tokens reads, to be filled before it, and writes; the next one overwrites it.

        `make` gives both, by name, without cache and mask. It is not kept: it belongs to who keeps this, and what
        refers to itself in a circle holds its cache until Python looks for such.
        """
        places = self._places.get(tokens)
        if places is None:
            for many in [size for size in self._places if size > FEW]:
                del self._places[many]
                self._bound = 0
            given, found = make(tokens)
            values = [[(name, self._session.tensor(array)) for name, array in part.items()] for part in (given, found)]
            places = self._places[tokens] = Places(given, found, *values)
        return places

    def run(self, tokens: int, total: int) -> None:
        """Runs on `places`, all of `total` tokens attended to. Raises as `GraphSession.run_bound`."""
        binding = self._binding
        if tokens != self._bound:
            places = self._places[tokens]
            for name, value in places.inputs:
                binding.bind_ortvalue_input(name, value)
            for name, value in places.outputs:
                binding.bind_ortvalue_output(name, value)
            self._bound = tokens
        if self._ones.shape[1] < total:
            self._ones = np.ones((1, 2 * total), np.int64)
        binding.bind_cpu_input("attention_mask", self._ones[:, :total])
        self._session.run_bound(binding)


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
        for place, token in enumerate(ids):
            if token not in rows:
                self._add(ids)
            into[place] = rows[token]

    def _add(self, ids: Sequence[int]) -> None:
        if len(self._rows) + len(ids) > _MOST_EMBEDDED:
            self._rows.clear()
        feeds = {"input_ids": np.array([ids], np.int64), "image_features": self._no_features}
        for token, row in zip(ids, self._session.run(feeds, ["inputs_embeds"])[0][0], strict=True):
            self._rows[token] = row.copy()
