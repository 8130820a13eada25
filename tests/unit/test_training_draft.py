"""The draft head is trained on what it will see: chains of its own states."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exaone_export.demo import checkpoint_folder
from model.exaone import Exaone
from training import train_draft
from training.batches import Batches
from training.draft import chain_loss, chained, chained_logits, pieces
from training.losses import draft_logits
from training.pixels import IGNORED
from training.shape import new_model

STEPS = 3


@pytest.fixture(scope="module")
def model() -> Exaone:
    return new_model(1)


def test_every_step_is_what_the_head_says_through_its_cache(model: Exaone) -> None:
    torch.manual_seed(0)
    width, length = model.config.text.hidden_size, 45  # the window is left
    x, hidden = torch.randn(1, length, width), torch.randn(1, length, width)
    head, keep = model.mtp, torch.ones(1, dtype=torch.int64)
    assert head is not None
    with torch.no_grad():
        found = chained_logits(model, x, hidden, STEPS)
        torch.testing.assert_close(found[0], draft_logits(model, x, hidden))
        for start in (0, 7, length - 1 - STEPS):
            past = model.decoder.empty_cache()[: len(head.layers)]
            given, states = slice(1, start + 2), hidden[:, : start + 1]
            for step in range(STEPS):
                seen = torch.ones(1, start + 1 + step, dtype=torch.int64)
                logits, states, past = head(x[:, given], states, seen, past, keep)
                torch.testing.assert_close(logits[0, -1], found[step][0, start + step], atol=1e-4, rtol=1e-4)
                given, states = slice(start + 2 + step, start + 3 + step), states[:, -1:]


def test_chains_lie_in_the_answer() -> None:
    labels = torch.full((1, 9), IGNORED)
    labels[0, 3:7] = 1
    assert [chained(labels, step)[0].nonzero()[:, 0].tolist() for step in (1, 2, 3, 4)] == [[3, 4, 5], [4, 5], [5], []]


def test_only_the_head_learns(model: Exaone) -> None:
    some = pieces(model, Batches(2, 4).batch("line", 0))
    model.requires_grad_(False)
    head = train_draft.trained(model)
    for parameter in head:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(head, lr=2e-3)
    losses = []
    for _ in range(5):
        loss = chain_loss(model, some, STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_checkpoint_gets_another_head_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint_folder()
    arguments = ["--collect-minutes", "0.001", "--steps", "2", "--drafts", "2", "--receipts", "0.75"]
    monkeypatch.setattr(sys, "argv", ["program", str(source), str(tmp_path), *arguments])
    train_draft.main()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path))
    assert list(before) == list(after)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("mtp.") for name in changed)
    assert {path.name for path in source.iterdir()} == {path.name for path in tmp_path.iterdir()}
