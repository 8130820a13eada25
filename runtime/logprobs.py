"""How likely the model held a token, and what it would have said instead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.detokenize import TokenBytes

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Alternative:
    """A token that might have come at this place.

    Attributes:
        token_id: its id.
        token: its text; bytes that are no whole character show as U+FFFD. "" without a tokenizer.
        bytes: its bytes, so that characters of several tokens can be put together.
        logprob: natural logarithm of its probability.
    """

    token_id: int
    token: str
    bytes: list[int]
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(Alternative):
    """A generated token; `top_logprobs` are the likeliest at its place, the likeliest first."""

    top_logprobs: list[Alternative]


def token_logprob(logits: Logits, token_id: int, top: int, tokenizer: TokenBytes | None) -> TokenLogprob:
    """The log-probabilities at one place.

    They are the model's own, softmax of `logits` [vocab] as they come from the graph: before penalties, temperature,
    top-k, top-p, min-p and constraints, so that they do not depend on how the token was chosen.

    Args:
        logits: float32 [vocab].
        token_id: the token that was chosen.
        top: how many of the likeliest to tell; may be 0.
        tokenizer: for the tokens' bytes.
    """
    largest = logits.max()
    total = float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    places: list[int] = []
    if top > 0:
        top = min(top, logits.size)
        last = np.partition(logits, logits.size - top)[logits.size - top]
        best = np.flatnonzero(logits >= last)
        places = best[np.argsort(-logits[best], kind="stable")][:top].tolist()

    def named(place: int) -> Alternative:
        spelled = b"" if tokenizer is None else tokenizer.token_bytes(place)
        return Alternative(place, spelled.decode("utf-8", "replace"), list(spelled), float(logits[place]) - total)

    chosen = named(token_id)
    likeliest = [named(place) for place in places]
    return TokenLogprob(chosen.token_id, chosen.token, chosen.bytes, chosen.logprob, likeliest)
