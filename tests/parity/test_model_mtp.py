"""The draft head, and the whole model, against golden data made outside this repository."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.exaone import Exaone
from tests import oracle

TOLERANCE = 1e-4
ALL = torch.zeros(1, dtype=torch.int64)
LAST = torch.ones(1, dtype=torch.int64)


@pytest.fixture(scope="module")
def model() -> Exaone:
    return oracle.tiny45()


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(oracle.TINY45 / "mtp_golden.npz").items()}


def test_decoder_and_draft_logits(model: Exaone, golden: dict[str, torch.Tensor]) -> None:
    logits, hidden, _ = model(golden["ids"])
    torch.testing.assert_close(logits, golden["logits"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(hidden, golden["hidden"], atol=TOLERANCE, rtol=0)


def test_draft_head_in_one_pass(model: Exaone, golden: dict[str, torch.Tensor]) -> None:
    # Position t joins the embedding of token t+1 with the hidden state at t: the last position has no next token.
    count = golden["ids"].shape[1] - 1
    logits, hidden = draft(model, golden, [count])
    torch.testing.assert_close(logits, golden["mtp_logits"][:, :count], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(hidden, golden["mtp_hidden"][:, :count], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunks", [[1] * 20, [9, 1, 8, 2]], ids=str)
def test_draft_head_through_its_cache(model: Exaone, golden: dict[str, torch.Tensor], chunks: list[int]) -> None:
    logits, _ = draft(model, golden, chunks)
    torch.testing.assert_close(logits, golden["mtp_logits"][:, :20], atol=TOLERANCE, rtol=0)


def draft(model: Exaone, golden: dict[str, torch.Tensor], chunks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft logits and hidden states of the golden prompt, passed in pieces of those sizes."""
    assert model.mtp is not None
    embeds, width = model.embed(golden["ids"][:, 1:]), model.config.text.head_dim
    past = [(torch.zeros(1, 2, 0, width), torch.zeros(1, 2, 0, width))]
    done, parts = 0, []
    for size in chunks:
        piece = slice(done, done + size)
        done += size
        mask = torch.ones(1, done, dtype=torch.int64)
        logits, hidden, past = model.mtp(embeds[:, piece], golden["hidden"][:, piece], mask, past, ALL)
        parts.append((logits, hidden))
    return torch.cat([logits for logits, _ in parts], 1), torch.cat([hidden for _, hidden in parts], 1)


def test_golden_image_prompt_and_its_greedy_continuation(model: Exaone) -> None:
    golden = np.load(oracle.TINY45 / "generate_golden.npz")
    ids = torch.from_numpy(golden["input_ids"])
    grid = torch.from_numpy(golden["grid_thw"])
    embeds = model.embed(ids, torch.from_numpy(oracle.golden_pixels()), grid)
    logits, _, past = model.decoder(embeds, torch.ones_like(ids), model.decoder.empty_cache(), LAST)
    np.testing.assert_allclose(logits[0, -1].numpy(), golden["last_logits"], atol=TOLERANCE)
    found = []
    for total in range(ids.shape[1] + 1, ids.shape[1] + 1 + golden["generated"].size):
        token = logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(token))
        logits, _, past = model.decoder(model.embed(token), torch.ones(1, total).long(), past, LAST)
    assert found == golden["generated"].flatten().tolist()
