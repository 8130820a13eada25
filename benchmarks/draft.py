"""How often the demonstration checkpoint's draft head guesses the token its decoder would choose.

Every guess is checked against greedy decoding, as speculative decoding with one drafted token would: after each token
of an answer the draft head proposes the next but one. Counted are the answers that the checkpoint gets right, whose
text is then its own.

    python -m benchmarks.draft --count 500
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from exaone_export.demo import checkpoint_folder
from exaone_export.demo.tasks import LEVELS
from model.exaone import Exaone
from model.load import load_exaone
from training.batches import Batch, Batches
from training.forward import decode
from training.losses import draft_logits, drafted, embedded
from training.pixels import IGNORED

BATCH = 16


def guesses(model: Exaone, batch: Batch) -> tuple[int, int, int]:
    """Answers that are exact, tokens drafted in them, and how many of those are accepted."""
    with torch.no_grad():
        x, _ = embedded(model, batch)
        hidden, _ = decode(model.decoder, x, 0)
        chosen = model.decoder.lm_head(hidden).argmax(-1)
        proposed = draft_logits(model, x, hidden).argmax(-1)
    exact = ((chosen == batch.labels) | (batch.labels == IGNORED)).all(1)
    asked = drafted(batch.labels) & exact[:, None]
    return int(exact.sum()), int(asked.sum()), int((proposed == batch.labels[:, 1:])[asked].sum())


def main() -> None:
    """Prints one JSON object for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=checkpoint_folder(), help="the checkpoint")
    parser.add_argument("--count", type=int, default=500, help="samples of each task")
    parser.add_argument("--seed", type=int, default=2028)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_exaone(options.folder)
    batches = Batches(options.seed, BATCH, held_out=True)
    for task, levels in LEVELS.items():
        found = [guesses(model, batches.batch(task, len(levels) - 1)) for _ in range(-(-options.count // BATCH))]
        exact, asked, accepted = map(sum, zip(*found, strict=True))
        figures = {"task": task, "samples": BATCH * len(found), "exact": exact, "drafted": asked, "accepted": accepted}
        print(json.dumps({**figures, "rate": accepted / max(asked, 1)}), flush=True)


if __name__ == "__main__":
    main()
