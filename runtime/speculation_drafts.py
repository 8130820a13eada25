"""Where drafts come from: what followed the same tokens before, and the checkpoint's draft head."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from runtime.cache import CacheLayout, KVCache
from runtime.session import Array, GraphSession

Ids = npt.NDArray[np.int64]

LONGEST_MATCH: Final = 8
_MOST_EMBEDDED: Final = 4096
# So many tokens are given to the draft head at once, which bounds what waits for it.
_WAITING: Final = 256


class Lookup:
    """Drafts by looking for the text's last tokens earlier in the text or in other answers, and taking what followed.

    Args:
        said: earlier answers; ids below 0 stand between them.
    """

    def __init__(self, said: Ids | None = None) -> None:
        self._said = np.zeros(0, np.int64) if said is None else said

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
        matched = 0
        while len(places):
            matched += 1
            found = places
            if matched == LONGEST_MATCH:
                break
            places = places[places >= matched]
            places = places[text[places - matched] == text[end - 1 - matched]]
        if not matched:
            return [], 0
        start = int(found[-1]) + 1
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
        embedding: of the graph that turns ids into embeddings.
        window: of the model's window layers; None without any.
        limit: tokens that the cache may have at most.
        embedded: embeddings known so far, by id, to which others are added.
    """

    def __init__(
        self,
        session: GraphSession,
        embedding: GraphSession,
        window: int | None,
        limit: int,
        embedded: dict[int, Array] | None = None,
    ) -> None:
        self._session, self._embedding = session, embedding
        self._embedded = {} if embedded is None else embedded
        self._cache = KVCache(CacheLayout.of(session.graph, window), 1, limit, session.device)
        self._binding: Any = session.binding()
        info = {tensor.name: tensor for tensor in session.graph.inputs}
        self._width, self._dtype = int(info["hidden_states"].shape[2]), info["hidden_states"].dtype
        logits = next(tensor for tensor in session.graph.outputs if tensor.name == "logits")
        self._logits: Array = np.empty((1, 1, int(logits.shape[2])), logits.dtype)
        features = next(tensor for tensor in embedding.graph.inputs if tensor.name == "image_features")
        self._no_features: Array = np.zeros((0, int(features.shape[1])), features.dtype)
        self._keep = np.ones(1, np.int64)
        self._binding.bind_ortvalue_input("logits_to_keep", session.tensor(self._keep))
        self._binding.bind_ortvalue_output("logits", session.tensor(self._logits))
        self._ones = np.ones((1, 0), np.int64)
        self._pass: tuple[Array, Array] | None = None  # embeddings and hidden states of the decoder's last pass
        self._tail: Array | None = None  # the last hidden state before that pass
        self._waiting: list[tuple[Array, Array]] = []
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
        before = hidden[:-1] if self._tail is None else np.concatenate((self._tail, hidden[:-1]))
        embeds = embeds[len(embeds) - len(before) :]
        self._tail = hidden[-1:].copy()
        start = 1 if self._ahead else 0
        self._ahead = False
        if len(before) > start:
            self._waiting.append((embeds[start:], before[start:]))
        if sum(len(pair[0]) for pair in self._waiting) >= _WAITING:
            self._run(*self._pairs())

    def _pairs(self) -> tuple[Array, Array]:
        pairs, self._waiting = self._waiting, []
        return np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])

    def propose(
        self, token: int, most: int, worth: Callable[[int], float], timed: Callable[[float], None]
    ) -> list[int]:
        """Drafts what follows `token`, which the decoder has chosen and not read yet.

        Args:
            token: the last one.
            most: tokens to draft.
            worth: how likely all drafts up to one must be right for a next one to be made, by their number so far.
            timed: told the seconds of each draft.
        """
        started = time.perf_counter()
        self._take()
        waiting = sum(len(pair[0]) for pair in self._waiting)
        if self._tail is None or int(self._cache.lengths[0]) + waiting + most > self._cache.limit:
            return []
        if not self._ahead:
            self._waiting.append((self._embed(token), self._tail))
        self._ahead = True
        hidden = self._run(*self._pairs())
        certain = self._cache.lengths.copy()
        most = 1 + self._cache.forgettable(most - 1)
        drafts: list[int] = []
        likely = 1.0
        while True:
            row = self._logits[0, 0]
            drafts.append(int(row.argmax()))
            now = time.perf_counter()
            timed(now - started)
            started = now
            if len(drafts) == most:
                break
            threshold = worth(len(drafts))
            if threshold > 0:
                values = row.astype(np.float32, copy=False)
                likely /= float(np.exp(values - values[drafts[-1]]).sum())
                if likely < threshold:
                    break
            hidden = self._run(self._embed(drafts[-1]), hidden[-1:])
        self._cache.rewind(certain.tolist())
        return drafts

    def _embed(self, token: int) -> Array:
        """[1, width]; text repeats its tokens, and a lookup takes a quarter of a small head's time."""
        if token not in self._embedded:
            if len(self._embedded) >= _MOST_EMBEDDED:
                self._embedded.clear()
            feeds = {"input_ids": np.array([[token]], np.int64), "image_features": self._no_features}
            self._embedded[token] = self._embedding.run(feeds, ["inputs_embeds"])[0][0]
        return self._embedded[token]

    def _run(self, embeds: Array, hidden: Array) -> Array:
        """Appends pairs [tokens, width]; returns hidden states [tokens, width], and leaves the last one's logits."""
        total = int(self._cache.lengths[0]) + len(embeds)
        if self._cache.reserve(total):
            self._cache.bind(self._binding)
        if self._ones.shape[1] < total:
            self._ones = np.ones((1, max(total, self._cache.capacity)), np.int64)
        given = [np.ascontiguousarray(part[None], self._dtype) for part in (embeds, hidden)]
        mask = self._ones[:, :total]
        result: Array = np.empty((1, len(embeds), self._width), self._dtype)
        self._binding.bind_cpu_input("inputs_embeds", given[0])
        self._binding.bind_cpu_input("hidden_states", given[1])
        self._binding.bind_cpu_input("attention_mask", mask)
        self._binding.bind_ortvalue_output("hidden_states_out", self._session.tensor(result))
        self._session.run_bound(self._binding)
        self._cache.lengths = np.array([total], np.int64)
        return result[0]
