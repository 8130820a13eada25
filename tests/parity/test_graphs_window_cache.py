"""Graphs whose window layers keep their window only, against eager models that keep everything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from model.bundle import past_key
from model.config import SLIDING
from model.mtp import DraftHead
from model.ops import resident_tokens
from model.text import Cache, Decoder, DecoderLayer
from tests.parity.onnx_graphs import (
    WINDOW,
    Session,
    difference,
    find_spec,
    hybrid_config,
    randomize,
    session_of,
)

TOLERANCE = 1e-4
CAPACITIES = (WINDOW, WINDOW + 1, WINDOW + 16)
KINDS = ("hybrid", "narrow", "draft")


def full(session: Session) -> Decoder | DraftHead:
    """The session's module with caches of everything."""
    config = session.spec.config
    assert config.mtp is not None or session.spec.name == "decoder"
    module = DraftHead(config.text, config.mtp) if config.mtp and session.spec.name == "mtp" else None
    whole = module or Decoder(config.text, config.vision is None)
    whole.load_state_dict(session.module.state_dict())
    assert not any(cast(DecoderLayer, layer).self_attn.window_cache for layer in whole.layers)
    return whole.eval().requires_grad_(False)


def empty(session: Session, rows: int, capacity: int) -> dict[str, Tensor]:
    """The cache inputs of a first pass; buffers hold what must never be seen."""
    inputs = session.spec.dummy_inputs(batch_size=rows, past_sequence_length=0, window_cache_length=capacity)
    return {name: value * 0 + 1e4 for name, value in inputs.items() if name.startswith("past_key_values.")}


def tokens(session: Session, rows: int, length: int) -> dict[str, Tensor]:
    torch.manual_seed(length)
    inputs = session.spec.dummy_inputs(batch_size=rows, sequence_length=length, past_sequence_length=0)
    return {name: value for name, value in inputs.items() if name in ("input_ids", "inputs_embeds", "hidden_states")}


def expected(session: Session, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of every position of rows of one length, from the model that keeps everything."""
    rows, length = next(iter(inputs.values())).shape[:2]
    config = session.spec.config.text
    nothing = torch.zeros(rows, config.num_kv_heads, 0, config.head_dim)
    module = full(session)
    past: list[Cache] = [(nothing, nothing)] * len(module.layers)
    mask = torch.ones(rows, length, dtype=torch.int64)
    logits: Tensor = module(*inputs.values(), mask, past, torch.tensor([0]))[0]
    return logits


class Cached:
    """A graph with its cache, fed pass by pass."""

    def __init__(self, session: Session, rows: int, capacity: int) -> None:
        self.session = session
        self.cache = empty(session, rows, capacity)

    def run(self, inputs: dict[str, Tensor], lengths: Tensor) -> Tensor:
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        feeds = {name: value.contiguous() for name, value in inputs.items()}
        outputs = self.session.run(
            feeds | {"attention_mask": mask} | self.cache | {"logits_to_keep": torch.tensor([0])}
        )
        self.cache = {k.replace("present", "past_key_values"): v for k, v in outputs.items() if k.startswith("present")}
        return outputs["logits"]


def pieces(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_chunks(kind: str, capacity: int, request: pytest.FixtureRequest) -> None:
    session: Session = request.getfixturevalue(kind)
    inputs = tokens(session, 1, 5 * WINDOW)
    wanted = expected(session, inputs)
    for size in (1, 7, WINDOW, WINDOW + 1, capacity + 3, 5 * WINDOW):
        graph = Cached(session, 1, capacity)
        for piece in pieces(5 * WINDOW, size):
            got = graph.run({name: x[:, piece] for name, x in inputs.items()}, torch.tensor([piece.stop]))
            assert difference(got, wanted[:, piece]) < TOLERANCE
        assert graph.cache[past_key(0)].shape[2] == capacity


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_lengths_around_the_window(hybrid: Session, capacity: int) -> None:
    for length in (WINDOW - 1, WINDOW, WINDOW + 1, capacity, capacity + 1):
        inputs = tokens(hybrid, 2, length + 2)
        wanted = expected(hybrid, inputs)
        graph = Cached(hybrid, 2, capacity)
        for piece in (slice(0, length), slice(length, length + 1), slice(length + 1, length + 2)):
            got = graph.run({name: x[:, piece] for name, x in inputs.items()}, torch.tensor([piece.stop] * 2))
            assert difference(got, wanted[:, piece]) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("capacity", "lengths"), [(WINDOW, [3, 8, 1]), (WINDOW + 16, [24, 2, 9])])
def test_rows_of_different_lengths(
    kind: str, capacity: int, lengths: list[int], request: pytest.FixtureRequest
) -> None:
    """A padded first pass as long as the buffers, then one token for each row far beyond the window."""
    session: Session = request.getfixturevalue(kind)
    inputs = tokens(session, len(lengths), max(lengths) + 3 * WINDOW)
    wanted = expected(session, inputs)
    graph, done = Cached(session, len(lengths), capacity), torch.tensor(lengths)
    got = graph.run({name: x[:, : max(lengths)] for name, x in inputs.items()}, done)
    for row, length in enumerate(lengths):
        assert difference(got[row, :length], wanted[row, :length]) < TOLERANCE
    for _ in range(3 * WINDOW):
        new = {name: torch.stack([x[row, at : at + 1] for row, at in enumerate(done)]) for name, x in inputs.items()}
        done = done + 1
        got = graph.run(new, done)
        for row, end in enumerate(done):
            assert difference(got[row, -1], wanted[row, end - 1]) < TOLERANCE


def test_padding_beyond_the_buffers_is_refused(hybrid: Session) -> None:
    """The kernel would keep the padding instead of the tokens, so it must not run."""
    inputs = tokens(hybrid, 2, WINDOW + 1)
    with pytest.raises(Exception, match="seqlens_k"):
        Cached(hybrid, 2, WINDOW).run(inputs, torch.tensor([3, WINDOW + 1]))


def test_less_room_than_the_window_is_refused(hybrid: Session) -> None:
    with pytest.raises(Exception, match="at least local_window_size"):
        Cached(hybrid, 1, WINDOW - 1).run(tokens(hybrid, 1, 3), torch.tensor([3]))


def test_half_precision() -> None:
    session = session_of(hybrid_config(), "decoder", dtype=torch.float16)
    inputs = tokens(session, 1, 5 * WINDOW)
    wanted = expected(session, inputs)
    graph = Cached(session, 1, WINDOW + 1)
    graph.cache = {name: value.half() for name, value in graph.cache.items()}
    for piece in pieces(5 * WINDOW, 7):
        got = graph.run({name: x[:, piece] for name, x in inputs.items()}, torch.tensor([piece.stop]))
        assert difference(got, wanted[:, piece]) < 0.03


def test_caches_of_everything_can_be_had() -> None:
    spec = find_spec(hybrid_config(), "decoder", window_cache=False)
    module: nn.Module = spec.build()
    session = Session(spec, randomize(module))
    inputs = tokens(session, 1, 5 * WINDOW)
    wanted = expected(session, inputs)
    graph, got = Cached(session, 1, 0), []
    for piece in pieces(5 * WINDOW, 9):
        got.append(graph.run({name: x[:, piece] for name, x in inputs.items()}, torch.tensor([piece.stop])))
        assert graph.cache[past_key(0)].shape[2] == piece.stop
    assert difference(torch.cat(got, 1), wanted) < TOLERANCE


def test_what_the_buffers_hold(hybrid: Session) -> None:
    """The kernel's layout is the documented one, which rewinding relies on: the last tokens, in order, from row 0."""
    inputs = tokens(hybrid, 1, 5 * WINDOW)
    layer = next(i for i, kind in enumerate(hybrid.spec.config.text.layer_types) if kind == SLIDING)
    for capacity in CAPACITIES:
        graph, whole = Cached(hybrid, 1, capacity), Cached(hybrid, 1, 5 * WINDOW)
        whole.run(inputs, torch.tensor([5 * WINDOW]))
        for piece in pieces(5 * WINDOW, 3):
            graph.run({name: x[:, piece] for name, x in inputs.items()}, torch.tensor([piece.stop]))
            held = int(resident_tokens(torch.tensor(piece.stop), capacity, WINDOW))
            assert min(WINDOW, piece.stop) <= held <= capacity
            kept = graph.cache[past_key(layer)][:, :, :held]
            assert difference(kept, whole.cache[past_key(layer)][:, :, piece.stop - held : piece.stop]) < TOLERANCE
