"""The loop that turns prompts into tokens; it knows ids and logits, nothing of text, images or sessions.

The whole contract with the model is `Forward`. A loop over several prompts keeps one row for each: rows are prefilled
together, then advance one token at a time, each at its own length, until every one of them is done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from model.errors import NumericalError
from runtime.sampling import Sampler

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
FinishReason = Literal["stop", "length"]

# A prompt alone is read in pieces of this many tokens, which bounds the memory of a pass. Longer ones are no faster:
# what products gain by them, attention loses on scores that are computed only to be hidden.
CHUNK: Final = 256


class Forward(Protocol):
    """A model with a memory: every call appends tokens to its rows."""

    def __call__(self, ids: Ids, lengths: Ids) -> Logits:
        """Appends `ids` [rows, sequence], padded on the right.

        `lengths` [rows] are the rows' valid tokens after the call. The first call has any number of rows; later calls
        have one token for each row, or one row. A row whose length does not grow has ended.

        Returns:
            float32 [rows, 1, vocab]: logits at each row's last valid token.
        """


@dataclass(frozen=True)
class Token:
    """A new token of one row. `finish` says why it is the row's last ("stop": an end-of-turn id), else it is None."""

    row: int
    id: int
    finish: FinishReason | None


def generate(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    samplers: Sequence[Sampler],
    limits: Sequence[int],
    eos_ids: Collection[int],
    pad_id: int = 0,
    ended: Collection[int] = (),
    chunk: int = CHUNK,
) -> Iterator[list[Token]]:
    """Generates until every row is done.

    Args:
        forward: the model, with nothing in its memory.
        prompts: token ids of each row, at least one each.
        samplers: one for each row, see `runtime.sampling.make_samplers`.
        limits: most tokens to generate for each row, at least one.
        eos_ids: ids that end a row; the id is still given out.
        pad_id: any id that is no placeholder; it fills what has no meaning.
        ended: rows that the caller has ended; it may add to them between steps.
        chunk: tokens of a single prompt read at a time.

    Yields:
        For each step, the new token of every row that is not done.

    Raises:
        NumericalError: the logits of a row are NaN or infinite.
    """
    rows = len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    if rows == 0 or lengths.min() < 1 or min(limits) < 1:
        raise ValueError("every row needs a token to start from and room for one more")
    history = [np.empty(limit, np.int64) for limit in limits]
    asked = [np.array(prompt, np.int64) for prompt in prompts]
    counts = [0] * rows
    active = set(range(rows))
    logits = prefill(forward, asked, pad_id, chunk)
    while True:
        tokens = []
        for row in sorted(active):
            require_finite(logits[row, -1], row)
            token = samplers[row](logits[row, -1], asked[row], history[row][: counts[row]])
            history[row][counts[row]] = token
            counts[row] += 1
            finish: FinishReason | None = "length" if counts[row] == limits[row] else None
            tokens.append(Token(row, token, "stop" if token in eos_ids else finish))
        yield tokens
        active -= {token.row for token in tokens if token.finish} | set(ended)
        if not active:
            return
        step = np.full((rows, 1), pad_id, np.int64)
        for row in active:
            step[row] = history[row][counts[row] - 1]
            lengths[row] += 1
        logits = forward(step, lengths)


def prefill(forward: Forward, prompts: Sequence[Ids], pad_id: int = 0, chunk: int = CHUNK) -> Logits:
    """Reads the prompts; returns logits [rows, 1, vocab] at each one's last token.

    A prompt alone is read `chunk` tokens at a time; several are padded and read in one pass.
    """
    if len(prompts) == 1:
        ids = prompts[0][None]
        for start in range(0, ids.shape[1], chunk):
            piece = ids[:, start : start + chunk]
            logits = forward(piece, np.array([start + piece.shape[1]], np.int64))
        return logits
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    padded = np.full((len(prompts), int(lengths.max())), pad_id, np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return forward(padded, lengths)


def require_finite(logits: Logits, row: int) -> None:
    """Raises NumericalError where no token can be chosen."""
    # The maximum is NaN if any value is; -inf only if no token is left.
    if not np.isfinite(logits.max()):
        why = f"the model gave NaN or Inf (row {row})"
        raise NumericalError("cannot choose a token", "logits", why, "Check the bundle with verify")
