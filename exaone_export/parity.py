"""Every graph of a bundle against the eager model, on inputs chosen to hurt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.bundle import (
    DECODER,
    EMBEDDING,
    MTP,
    VISION_ENCODER,
    int8_cache,
    past_key,
    past_value,
    present_key,
    present_value,
    scale_of,
    window_layers,
)
from model.exaone import Exaone
from model.heads import EncoderModel
from model.progress import Progress
from model.tasks import TEXT_CLASSIFICATION
from model.text import Cache
from runtime.session import GraphSession

Model = Exaone | EncoderModel
Floats = npt.NDArray[np.float32]
Pair = tuple[Floats, Floats]  # what the graph gives, what the model gives

LONGEST = 5000  # tokens; windows beyond are not crossed
KEEP = 64  # logits of that many last positions are compared
GRIDS = (((1, 2, 2),), ((1, 6, 10),), ((1, 14, 22), (1, 34, 10)), ((2, 8, 12),))
ALL_FLOAT_LIMIT = 1e-3  # of a float32 graph, relative to the largest expected value where that is above 1


@dataclass(frozen=True)
class Parity:
    """How far a graph is from the model.

    Attributes:
        max_abs_error: largest difference of any output value.
        cosine: least similarity of the outputs of one run.
        largest: largest expected absolute value.
    """

    max_abs_error: float
    cosine: float
    largest: float

    @property
    def exact(self) -> bool:
        """Whether the error is what float32 arithmetic in another order explains."""
        return self.max_abs_error <= ALL_FLOAT_LIMIT * max(1.0, self.largest)


def compare_graphs(model: Model, open_graph: Callable[[str], GraphSession], progress: Progress) -> dict[str, Parity]:
    """Compares each graph that the model has a part for.

    Args:
        model: eager, float32.
        open_graph: opens a graph by name; one at a time is kept.
        progress: told of every graph.
    """
    runs: dict[str, Callable[[Any, GraphSession], Iterator[Pair]]] = {
        VISION_ENCODER: _vision_pairs,
        EMBEDDING: _embedding_pairs,
        DECODER: _decoder_pairs if isinstance(model, Exaone) else _encoder_pairs,
        MTP: _draft_pairs,
    }
    names = [name for name in runs if getattr(model, name, None) is not None]
    progress.start("comparing graphs", len(names), "graphs")
    found = {}
    for name in names:
        torch.manual_seed(0)
        with torch.inference_mode():
            found[name] = _summary(runs[name](model, open_graph(name)))
        progress.advance(1)
    progress.finish()
    return found


def _summary(pairs: Iterator[Pair]) -> Parity:
    error, cosine, largest = 0.0, 1.0, 0.0
    for found, expected in pairs:
        a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        # NaN must win, and Python's max would drop it.
        error = float(np.maximum(error, np.abs(a - b).max(initial=0)))
        scale = np.linalg.norm(a) * np.linalg.norm(b)
        cosine = float(np.minimum(cosine, a @ b / scale if scale else 1.0))
        largest = float(np.maximum(largest, np.abs(b).max(initial=0)))
    return Parity(error, cosine, largest)


def _run(session: GraphSession, outputs: Sequence[str], **feeds: Tensor) -> list[Floats]:
    types = {tensor.name: tensor.dtype for tensor in session.graph.inputs}
    arrays = {name: value.numpy().astype(types[name], copy=False) for name, value in feeds.items()}
    return [
        array if array.dtype in (np.uint8, np.int8) else array.astype(np.float32, copy=False)
        for array in session.run(arrays, outputs)
    ]


def _vision_pairs(model: Model, session: GraphSession) -> Iterator[Pair]:
    encoder = model.vision_encoder
    assert encoder is not None
    for grids in GRIDS:
        grid = torch.tensor(grids)
        pixels = torch.randn(int(grid.prod(1).sum()), encoder.config.patch_dim)
        [found] = _run(session, ["image_features"], pixel_values=pixels, image_grid_thw=grid)
        yield found, encoder(pixels, grid).numpy()


def _embedding_pairs(model: Model, session: GraphSession) -> Iterator[Pair]:
    assert model.embedding is not None
    text = model.config.text
    for count in (0, 5):
        ids = _text_ids(model, 2, 9)
        features = torch.randn(count, text.hidden_size)
        ids.view(-1)[torch.randperm(ids.numel())[:count]] = int(model.config.image_token_id or 0)
        [found] = _run(session, ["inputs_embeds"], input_ids=ids, image_features=features)
        yield found, model.embedding(ids, features).numpy()


def _text_ids(model: Model, rows: int, length: int) -> Tensor:
    """Random ids [rows, length] without placeholders."""
    media = {model.config.image_token_id, model.config.video_token_id}
    allowed = torch.tensor([token for token in range(model.config.text.vocab_size) if token not in media])
    return allowed[torch.randint(len(allowed), (rows, length))]


def _plans(window: int | None) -> Iterator[tuple[list[int], list[int]]]:
    """Lengths of the rows, and the pieces in which they are passed (one row: any; several: the prompt, then ones)."""
    yield [1], [1]
    yield [23], [23]
    yield [23], [9, 1, 8, 1, 1, 3]
    yield [3, 12, 1], [12, 1, 1]
    if window is not None and window > 1 and window + 9 <= LONGEST:
        for length in (window - 1, window, window + 1):
            yield [length], [length]
        yield [window + 9], [max(1, window // 2), window + 9 - max(1, window // 2) - 3, 1, 1, 1]
        if 5 * window <= LONGEST // 4:
            yield [5 * window], [5 * window]
            yield [5 * window], [window + 1, window - 1, 2 * window, window - 2, 1, 1]


def _encoder_pairs(model: EncoderModel, session: GraphSession) -> Iterator[Pair]:
    """Whole rows at once, padding on either side; what is said of padding is not compared."""
    config, encoder = model.config, model.decoder
    assert encoder is not None
    pooled = config.task == TEXT_CLASSIFICATION
    names = [tensor.name for tensor in session.graph.outputs]
    for lengths in dict.fromkeys(tuple(lengths) for lengths, _ in _plans(config.text.sliding_window)):
        if pooled and len(lengths) > 1 and config.pad_token_id is None:
            continue  # transformers refuses this
        right = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        for mask in (right, right.flip(1)) if len(lengths) > 1 else (right,):
            ids = _text_ids(model, *mask.shape)
            ids = torch.where(mask, ids, ids if config.pad_token_id is None else config.pad_token_id)
            if model.embedding is None:
                feeds = {"input_ids": ids}
            else:
                feeds = {"inputs_embeds": model.embedding(ids, torch.zeros(0, config.text.hidden_size))}
            expected = encoder(*feeds.values(), mask.long())
            found = _run(session, names, **feeds, attention_mask=mask.long())
            for ours, theirs in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
                wanted = theirs.numpy()
                yield (ours, wanted) if pooled else (ours[mask.numpy()], wanted[mask.numpy()])


def _decoder_pairs(model: Exaone, session: GraphSession) -> Iterator[Pair]:
    text = model.config.text
    entry = "input_ids" if model.embedding is None else "inputs_embeds"
    hidden = ["hidden_states"] if any(t.name == "hidden_states" for t in session.graph.outputs) else []
    for lengths, pieces in _plans(text.sliding_window):
        inputs = model.embed(_text_ids(model, len(lengths), sum(pieces)))

        def eager(piece: slice, mask: Tensor, past: list[Cache], keep: Tensor, x: Tensor = inputs) -> Any:
            return model.decoder(x[:, piece], mask, past, keep)

        def feeds(piece: slice, x: Tensor = inputs) -> dict[str, Tensor]:
            return {entry: x[:, piece]}

        empty = model.decoder.empty_cache(len(lengths))
        yield from _cached(session, hidden, (lengths, pieces), (eager, feeds), empty, text.sliding_window)


def _draft_pairs(model: Exaone, session: GraphSession) -> Iterator[Pair]:
    draft, text = model.mtp, model.config.text
    assert draft is not None
    for lengths, pieces in _plans(text.sliding_window):
        rows, total = len(lengths), sum(pieces)
        embeds, hidden = (torch.randn(rows, total, text.hidden_size) for _ in range(2))

        def eager(
            piece: slice, mask: Tensor, past: list[Cache], keep: Tensor, x: Tensor = embeds, h: Tensor = hidden
        ) -> Any:
            return draft(x[:, piece], h[:, piece], mask, past, keep)

        def feeds(piece: slice, x: Tensor = embeds, h: Tensor = hidden) -> dict[str, Tensor]:
            return {"inputs_embeds": x[:, piece], "hidden_states": h[:, piece]}

        empty = model.decoder.empty_cache(rows)[: len(draft.layers)]
        plan = (lengths, pieces)
        yield from _cached(session, ["hidden_states_out"], plan, (eager, feeds), empty, text.sliding_window)


def _first_cache(session: GraphSession, empty: list[Cache], buffer: int) -> list[Tensor]:
    """What a graph starts from: nothing, or buffers of `buffer` tokens where it keeps a window only."""
    kept = window_layers(session.graph)
    return [
        tensor.new_zeros((*tensor.shape[:2], buffer, tensor.shape[3])) if layer in kept else tensor
        for layer, pair in enumerate(empty)
        for tensor in pair
    ]


def _first_codes(session: GraphSession, empty: list[Cache], buffer: int, tokens: int) -> list[Tensor]:
    """Codes and, behind them, their scales: buffers with room for all `tokens`, or of `buffer` and one for windows."""
    kept = window_layers(session.graph)
    shapes = [
        (*tensor.shape[:2], buffer + 1 if layer in kept else tokens, tensor.shape[3])
        for layer, pair in enumerate(empty)
        for tensor in pair
    ]
    types = torch.uint8, torch.int8
    codes = [torch.zeros(shape, dtype=types[i % 2]) for i, shape in enumerate(shapes)]
    return codes + [torch.zeros(*shape[:3], 1) for shape in shapes]


def _cached(
    session: GraphSession,
    hidden: Sequence[str],
    plan: tuple[Sequence[int], Sequence[int]],
    sides: tuple[Callable[..., Any], Callable[[slice], Mapping[str, Tensor]]],
    past: list[Cache],
    window: int | None,
) -> Iterator[Pair]:
    """Passes rows in pieces through graph and model, each with its own cache, and compares logits and hidden states.

    Args:
        session: the graph.
        hidden: name of its output of hidden states, if it has one.
        plan: tokens of each row in the first piece (several rows), or in all; and tokens of each pass.
        sides: the model's pass (piece, mask, past, keep), and the graph's own inputs for a piece.
        past: an empty cache.
        window: of the model's window layers.
    """
    (lengths, pieces), (eager, feeds) = plan, sides
    layers = range(len(past))
    names = [name(i) for i in layers for name in (present_key, present_value)]
    entries = [name(i) for i in layers for name in (past_key, past_value)]
    buffer = max(window or 0, pieces[0] if len(lengths) > 1 else 0)
    if int8_cache(session.graph):
        names, entries = (some + [scale_of(name) for name in some] for some in (names, entries))
        cache = _first_codes(session, past, buffer, sum(pieces))
    else:
        cache = _first_cache(session, past, buffer)
    done = 0
    for i, size in enumerate(pieces):
        piece, done = slice(done, done + size), done + size
        ragged = len(lengths) > 1
        valid = torch.tensor(lengths) + i if ragged else torch.tensor([done])
        mask = (torch.arange(done)[None] < valid[:, None]).long()
        keep = torch.tensor([1 if ragged else min(size, KEEP)])
        logits, states, past = eager(piece, mask, past, keep)
        inputs = {**feeds(piece), "attention_mask": mask, **dict(zip(entries, cache, strict=True))}
        found = _run(session, ["logits", *hidden, *names], **inputs, logits_to_keep=keep)
        cache = [torch.from_numpy(array) for array in found[1 + len(hidden) :]]
        yield found[0], logits.numpy()
        if hidden:
            rows = np.arange(size)[None] < (valid - (done - size)).numpy()[:, None]  # padding means nothing
            yield found[1][rows], states.numpy()[rows]
