"""Trains the draft head of a finished checkpoint to draft several tokens; nothing else of the model changes.

    python -m training.train_draft CHECKPOINT OUT --collect-minutes 9 --minutes 14

The decoder's states of fresh samples are kept in memory, and the head alone is trained on them. CHECKPOINT is a folder;
OUT becomes one with the same files and new weights of the head.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from exaone_export.demo.tasks import LEVELS
from model.exaone import Exaone
from model.load import load_exaone
from training.batches import Batches
from training.draft import Piece, chain_loss, pieces, rates

SHARES = {"receipt": 0.5, "line": 0.15, "question": 0.1, "two": 0.1, "find": 0.08, "copy": 0.07}
COLLECTED, BATCH, NEAR = 16, 32, 48  # samples collected and trained at a time; texts of like length


def collect(
    model: Exaone, seed: int, seconds: float, held_out: bool = False, receipts: float = SHARES["receipt"]
) -> list[Piece]:
    """Pieces of samples of the hardest level, for so long; `receipts` is their share."""
    rest = (1 - receipts) / (1 - SHARES["receipt"])
    shares = {task: receipts if task == "receipt" else share * rest for task, share in SHARES.items()}
    batches, found, end = Batches(seed, COLLECTED, held_out), list[Piece](), time.monotonic() + seconds
    while not found or time.monotonic() < end:
        task = batches.choose(shares)
        found += pieces(model, batches.batch(task, len(LEVELS[task]) - 1))
    return found


def train(model: Exaone, some: list[Piece], options: argparse.Namespace) -> int:
    """Trains the head at a falling rate; returns the steps taken."""
    model.requires_grad_(False)
    head = trained(model)
    for parameter in head:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(head, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01)
    some, rng = sorted(some, key=lambda piece: len(piece.labels)), Random(options.seed)
    start, seconds, step = time.monotonic(), 60 * options.minutes, 0
    while (passed := time.monotonic() - start) < seconds and step < options.steps:
        fading = 1 - max(passed / seconds, step / options.steps)
        for group in optimizer.param_groups:
            group["lr"] = options.rate * fading * min(1.0, (step + 1) / 50)
        first = rng.randrange(max(1, len(some) - NEAR))
        near = some[first : first + NEAR]
        with torch.autocast("cpu", torch.bfloat16):
            loss = chain_loss(model, rng.sample(near, min(BATCH, len(near))), options.drafts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head, 1.0)
        optimizer.step()
        step += 1
    return step


def trained(model: Exaone) -> list[nn.Parameter]:
    """The head's own parameters."""
    assert model.mtp is not None
    return [parameter for name, parameter in model.mtp.named_parameters() if not name.startswith("lm_head.")]


def write(model: Exaone, source: Path, folder: Path) -> None:
    """The source's files, with the head's weights; all others keep their bytes."""
    assert model.mtp is not None
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)
    tensors = load_file(source / "model.safetensors")
    for name, parameter in model.mtp.named_parameters():
        if f"mtp.{name}" in tensors:
            tensors[f"mtp.{name}"] = parameter.detach().to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Reads CHECKPOINT, writes OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--drafts", type=int, default=4, help="in a chain")
    parser.add_argument("--collect-minutes", type=float, default=9)
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--receipts", type=float, default=SHARES["receipt"], help="their share of what is collected")
    parser.add_argument("--steps", type=int, default=1 << 30, help="most")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=4242)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_exaone(options.checkpoint)
    held_out = collect(model, options.seed + 1, 4 * options.collect_minutes, held_out=True)
    some = collect(model, options.seed, 60 * options.collect_minutes, receipts=options.receipts)
    steps = train(model, some, options)
    sys.stdout.write(f"{len(some)} samples, {steps} steps\n")
    for task in LEVELS:
        found = rates(model, [piece for piece in held_out if piece.task == task], options.drafts)
        sys.stdout.write(f"{task}: {' '.join(f'{rate:.3f}' for rate in found)}\n")
    write(model, options.checkpoint, options.out)


if __name__ == "__main__":
    main()
