"""From logits to the next token id: pure ``apply_*`` functions and a closure that composes them.

Order, as in transformers: repetition penalty, presence penalty, temperature, top-k, top-p, min-p, draw. (min-p
compares with the likeliest token, so only top-p's place relative to the others matters, and vLLM has it last as
well.) All arrays are one row, ``[vocab]`` float32; a token that may not be drawn has the logit -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import NumericalError
from runtime.options import GenerationOptions

Logits = npt.NDArray[np.float32]
Ids = Sequence[int] | npt.NDArray[np.int64]
Sampler = Callable[[Logits, Ids, Ids], int]

_FLOORS = (1e-2, 1e-4, 1e-6, 0.0)  # of the largest weight
_NEVER = np.float32(-np.inf)


def apply_repetition_penalty(logits: Logits, seen: Ids, penalty: float) -> Logits:
    """Divides positive logits of the ids in `seen` by `penalty`, multiplies negative ones (CTRL, arXiv 1909.05858)."""
    ids = np.asarray(seen, dtype=np.int64)
    if penalty == 1.0 or ids.size == 0:
        return logits
    result = logits.copy()
    values = logits[ids]
    result[ids] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    return result


def apply_presence_penalty(logits: Logits, generated: Ids, penalty: float) -> Logits:
    """Subtracts `penalty` once from the logit of every id in `generated`, however often it occurs."""
    ids = np.asarray(generated, dtype=np.int64)
    if penalty == 0.0 or ids.size == 0:
        return logits
    result = logits.copy()
    result[ids] = logits[ids] - np.float32(penalty)
    return result


def apply_temperature(logits: Logits, temperature: float) -> Logits:
    """Divides by `temperature`, which is above 0."""
    return logits if temperature == 1.0 else logits / np.float32(temperature)


def apply_top_k(logits: Logits, k: int) -> Logits:
    """Keeps the `k` largest logits and those equal to the smallest of them; 0 keeps all."""
    if k <= 0 or k >= logits.size:
        return logits
    smallest_kept = np.partition(logits, logits.size - k)[logits.size - k]
    return np.where(logits < smallest_kept, _NEVER, logits)


def apply_top_p(logits: Logits, p: float) -> Logits:
    """Keeps the smallest set of likeliest tokens whose probability reaches `p`, one at least (arXiv 1904.09751)."""
    if p >= 1.0:
        return logits
    weights = _softmax_weights(logits)
    needed = p * weights.sum(dtype=np.float64)
    kept = _nucleus(weights, needed)
    result = np.full_like(logits, _NEVER)
    result[kept] = logits[kept]
    return result


def apply_min_p(logits: Logits, min_p: float) -> Logits:
    """Keeps tokens at least `min_p` times as likely as the likeliest (arXiv 2407.01082)."""
    if min_p <= 0.0:
        return logits
    return np.where(_softmax_weights(logits) < np.float32(min_p), _NEVER, logits)


def make_sampler(options: GenerationOptions, row: int = 0) -> Sampler:
    """The function that chooses the next id of one row.

    Args:
        options: see `GenerationOptions`; greedy unless ``options.samples``.
        row: the row's number in its batch; every row draws from its own stream, and what it draws depends on the seed
            and the row alone, not on the size of the batch.

    Returns:
        ``sampler(logits [vocab] float32, prompt_ids, generated_ids) -> id``. Pass the ids as int64 arrays where a
        penalty is on and the prompt is long. It never changes `logits`. It raises NumericalError where the largest
        logit is NaN or infinite. Where nothing but the largest logit is looked at, it is `likeliest`.
    """
    if not options.samples and options.repetition_penalty == 1.0 and options.presence_penalty == 0.0:
        return likeliest
    draw = _make_draw(options, row) if options.samples else _argmax
    repetition, presence = options.repetition_penalty, options.presence_penalty

    def sample(logits: Logits, prompt_ids: Ids, generated_ids: Ids) -> int:
        likeliest(logits, prompt_ids, generated_ids)
        if repetition != 1.0:
            seen = np.concatenate([np.asarray(prompt_ids, np.int64), np.asarray(generated_ids, np.int64)])
            logits = apply_repetition_penalty(logits, seen, repetition)
        return draw(apply_presence_penalty(logits, generated_ids, presence))

    return sample


def make_samplers(options: GenerationOptions, rows: int) -> list[Sampler]:
    """One sampler for each row of a batch, with independent streams."""
    return [make_sampler(options, row) for row in range(rows)]


def _make_draw(options: GenerationOptions, row: int) -> Callable[[Logits], int]:
    # A spawn key gives streams that are independent by construction; seed + row would make seeds overlap.
    stream = np.random.Generator(np.random.PCG64(np.random.SeedSequence(options.seed, spawn_key=(row,))))
    temperature = 1.0 if options.temperature is None else options.temperature
    top_k, top_p, min_p = options.top_k or 0, options.top_p or 1.0, options.min_p or 0.0

    def draw(logits: Logits) -> int:
        # Shifting first keeps a tiny temperature from overflowing and changes no probability.
        kept = apply_top_k(apply_temperature(logits - logits.max(), temperature), top_k)
        candidates = np.flatnonzero(kept > _NEVER)  # what follows is cheaper on the few that are left
        weights = _softmax_weights(apply_min_p(apply_top_p(kept[candidates], top_p), min_p))
        cumulative = np.cumsum(weights, dtype=np.float64)
        place = int(np.searchsorted(cumulative, stream.random() * cumulative[-1], side="right"))
        return int(candidates[min(place, candidates.size - 1)])

    return draw


def _argmax(logits: Logits) -> int:
    return int(logits.argmax())


def likeliest(logits: Logits, prompt_ids: Ids = (), generated_ids: Ids = ()) -> int:
    """A `Sampler`: the id of the largest logit. Raises NumericalError where that is NaN or infinite."""
    # numpy's argmax stops at the first NaN, so one pass finds NaN, +inf and "all -inf" alike.
    place = int(logits.argmax())
    if not np.isfinite(logits[place]):
        found = {"nan": "NaN", "inf": "Inf", "-inf": "-Inf everywhere"}[str(float(logits[place]))]
        why = f"the model gave {found} (token {place})"
        raise NumericalError("cannot choose a token", "logits", why, "Check the bundle with verify")
    return place


def _softmax_weights(logits: Logits) -> Logits:
    """exp(logits - max): the probabilities up to their sum; the likeliest has weight 1."""
    weights: Logits = np.exp(logits - logits.max())
    return weights


def _nucleus(weights: Logits, needed: np.floating[Any]) -> npt.NDArray[np.intp]:
    """Indices of the fewest largest weights whose sum reaches `needed`; sorts only those that may be among them."""
    for floor in _FLOORS:
        largest = np.flatnonzero(weights > floor)
        ordered = weights[largest]
        if floor == 0.0 or ordered.sum(dtype=np.float64) >= needed:
            break
    order = np.argsort(-ordered, kind="stable")
    cumulative = np.cumsum(ordered[order], dtype=np.float64)
    return largest[order[: int(np.searchsorted(cumulative, needed, side="left")) + 1]]
