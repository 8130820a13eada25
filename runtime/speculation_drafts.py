"""Where drafts come from: what followed the same tokens before, and the checkpoint's draft head."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from runtime.bound import FEW, EmbeddedTokens, Named, ShortPasses
from runtime.cache import CacheLayout, KVCache
from runtime.session import Array, GraphSession
from runtime.speculation_said import LONGEST_MATCH

Ids = npt.NDArray[np.int64]

# So many tokens are given to the draft head at once, which bounds what waits for it.
_WAITING: Final = 256
_BACK: Final = np.arange(LONGEST_MATCH)
_NOTHING: Final = np.full(LONGEST_MATCH, -2, np.int64)


class Lookup:
    """Drafts by looking for the text's last tokens earlier in the text or in other answers, and taking what followed.

    Args:
        said: earlier answers; ids below 0 stand between them.
    """

    def __init__(self, said: Ids | None = None) -> None:
        # Before the first token stand some that are like no other, so that a match may begin there.
        self._said = _NOTHING if said is None else np.concatenate((_NOTHING, said))

    def find(self, text: Ids, most: int) -> tuple[list[int], int]:
        """What may come next.

        Args:
            text: [tokens], prompt and answer so far.
            most: tokens to draft.

        Returns:
            Up to `most` ids, and how many tokens before them are the text's last ones (`LONGEST_MATCH` at most). Of
            several places the longest match is taken, of those the latest; 0 where there is none.
        """
        text = np.concatenate((self._said, text))
        end = len(text)
        places = np.flatnonzero(text[: end - 1] == text[-1])
        if not len(places):
            return [], 0
        same = text[places[:, None] - _BACK] == text[end - 1 - _BACK]
        lengths = np.where(same.all(1), LONGEST_MATCH, same.argmin(1))
        # The latest of the longest.
        at = len(lengths) - 1 - int(lengths[::-1].argmax())
        matched, start = int(lengths[at]), int(places[at]) + 1
        drafts: list[int] = text[start : start + most].tolist()
        if min(drafts, default=-1) < 0:
            drafts = drafts[: next(place for place, token in enumerate(drafts) if token < 0)]
            return drafts, matched if drafts else 0
        # What is repeated may be shorter than what is drafted; it then goes round.
        period = end - start
        drafts += [drafts[place % period] for place in range(len(drafts), most)]
        return drafts, matched


class DraftHead:
    """The checkpoint's draft head (`model.mtp.DraftHead`) beside one row of the decoder.

    It sees, for every position, the decoder's hidden state and the embedding of the token after it, and has a cache of
    its own. That cache may begin later than the decoder's: drafts are then worse, never wrong answers.

    Args:
        session: of the graph.
        embedded: embeddings of tokens.
        window: of the model's window layers; None without any.
        limit: tokens that the cache may have at most.
        sees: how many tokens back a draft can depend on, where positions count by their distance; None for all.

    Attributes:
        session: as given.
    """

    def __init__(
        self,
        session: GraphSession,
        embedded: EmbeddedTokens,
        window: int | None,
        limit: int,
        sees: int | None = None,
    ) -> None:
        self.session, self._embedded, self._sees = session, embedded, sees
        self._cache = KVCache(CacheLayout.of(session.graph, window), 1, limit)
        info = {tensor.name: tensor for tensor in session.graph.inputs}
        self._width, self._dtype = int(info["hidden_states"].shape[2]), info["hidden_states"].dtype
        logits = next(tensor for tensor in session.graph.outputs if tensor.name == "logits")
        self._logits: Array = np.empty((1, 1, int(logits.shape[2])), logits.dtype)
        self._row: Array = self._logits[0, 0]
        self._passes: dict[int, ShortPasses] = {}  # by their tokens, each with a binding of its own
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for another answer."""
        self._cache.lengths = np.zeros(1, np.int64)
        self._pass: tuple[Array, Array] | None = None  # embeddings and hidden states of the decoder's last pass
        self._tail: Array | None = None  # the last hidden state before that pass
        self._waiting: list[tuple[Array, Array]] = []
        self._waits = 0  # tokens of all of them
        self._ahead = False  # the next token's pair is in the cache already

    def watch(self, embeds: Array, hidden: Array) -> None:
        """Takes what a pass of the decoder read and gave, both [1, tokens, width]."""
        self._take()
        self._pass = embeds[0], hidden[0]

    def keep(self, tokens: int) -> None:
        """Of the last pass, only the first tokens stay."""
        if self._pass is not None:
            self._pass = self._pass[0][:tokens], self._pass[1][:tokens]

    def _take(self) -> None:
        """Makes pairs of the last pass: each token's embedding with the hidden state before it."""
        if self._pass is None:
            return
        embeds, hidden = self._pass
        self._pass = None
        if not self._ahead and self._tail is not None:
            self._wait(embeds[:1], self._tail)
        if len(embeds) > 1:
            self._wait(embeds[1:], hidden[:-1])
        self._tail, self._ahead = hidden[-1:], False
        if self._waits >= _WAITING:
            self._run()

    def _wait(self, embeds: Array, hidden: Array) -> None:
        self._waiting.append((embeds, hidden))
        self._waits += len(embeds)

    def read(self) -> None:
        """Reads what is there to read of the prompt, so that the first draft need not wait for it."""
        self._take()
        if self._waiting:
            self._run()

    def propose(
        self, token: int, most: int, worth: Callable[[list[int]], float], timed: Callable[[float], None]
    ) -> list[int]:
        """Drafts what follows `token`, which the decoder has chosen and not read yet.

        Args:
            token: the last one.
            most: tokens to draft.
            worth: how likely all drafts so far must be right for a next one to be made.
            timed: told the seconds of each draft.
        """
        started = time.perf_counter()
        self._take()
        if self._tail is None or int(self._cache.lengths[0]) + self._waits + most > self._cache.limit:
            return []
        if not self._ahead:
            self._wait(self._embed(token), self._tail)
        self._ahead = True
        hidden = self._run()
        certain = int(self._cache.lengths[0])
        most = 1 + self._cache.forgettable(most - 1)
        drafts: list[int] = []
        likely, row = 1.0, self._row
        while True:
            drafts.append(int(row.argmax()))
            now = time.perf_counter()
            timed(now - started)
            started = now
            if len(drafts) == most:
                break
            threshold = worth(drafts)
            if threshold > 1:
                break
            if threshold > 0:
                values = row.astype(np.float32, copy=False)
                likely /= float(np.exp(values - values[drafts[-1]]).sum())
                if likely < threshold:
                    break
            self._wait(self._embed(drafts[-1]), hidden)
            hidden = self._run()
        if len(drafts) > 1:
            self._cache.rewind([certain])
        return drafts

    def _embed(self, token: int) -> Array:
        """[1, width]"""
        row: Array = np.empty((1, self._width), self._dtype)
        self._embedded.put((token,), row)
        return row

    def _run(self) -> Array:
        """Appends what waits, without what no draft can depend on any more; leaves the last one's logits.

        Returns:
            The last one's hidden state [1, width]; the next run overwrites it.
        """
        pairs, tokens, self._waiting, self._waits = self._waiting, self._waits, [], 0
        if self._sees is not None and tokens > self._sees:
            embeds, hidden = map(np.concatenate, zip(*pairs, strict=True))
            pairs, tokens = [(embeds[-self._sees :], hidden[-self._sees :])], self._sees
        total = int(self._cache.lengths[0]) + tokens
        if total > self._cache.capacity:
            self._passes.clear()  # before the buffers that they only borrow can go, whatever comes of it
        self._cache.reserve(total)
        short = self._passes.get(tokens) or self._short(tokens)
        places = short.places(tokens, self._arrays)
        embeds, hidden, at = places.given["inputs_embeds"][0], places.given["hidden_states"][0], 0
        for some, before in pairs:
            embeds[at : at + len(some)], hidden[at : at + len(some)] = some, before
            at += len(some)
        short.run(tokens, total)
        self._cache.lengths[0] = total
        states: Array = places.found["hidden_states_out"][0, -1:]
        return states

    def _short(self, tokens: int) -> ShortPasses:
        for many in [size for size in self._passes if size > FEW]:
            del self._passes[many]
        binding = self.session.binding()
        self._cache.bind(binding)
        short = self._passes[tokens] = ShortPasses(self.session, binding)
        return short

    def _arrays(self, tokens: int) -> tuple[Named, Named]:
        given = {name: np.zeros((1, tokens, self._width), self._dtype) for name in ("inputs_embeds", "hidden_states")}
        states: Array = np.zeros((1, tokens, self._width), self._dtype)
        keep = {"logits_to_keep": np.ones(1, np.int64)}
        return {**given, **keep}, {"logits": self._logits, "hidden_states_out": states}
