"""Whether a bundle computes the same bits with one thread as with several.

    python -m benchmarks.determinism BUNDLE... [--threads 2 3] [--lengths 1 17 300 1000] [--steps 8] [--image 364x280]

For each number of threads, beside one thread: logits after prompts of random tokens and after greedy tokens that follow
(every bit of them), the tokens themselves, the features of an image of noise, and the greatest difference. A run with
one thread is repeated too, which says whether anything differs from run to run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime import decode
from runtime.engine import Engine

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Computed:
    """What one run gave: logits [steps, vocab] of each prompt, greedy tokens of each, features of the image."""

    logits: list[Floats]
    tokens: list[list[int]]
    features: Floats | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 17, 300, 1000], help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=8, help="greedy tokens after each prompt")
    parser.add_argument("--image", default="364x280", help="width and height")
    arguments = parser.parse_args()
    width, height = map(int, arguments.image.split("x"))
    wanted = (arguments.lengths, arguments.steps, (width, height))
    for bundle in arguments.bundles:
        first = compute(bundle, 1, *wanted)
        for threads in (1, *arguments.threads):
            told = compare(first, compute(bundle, threads, *wanted))
            print(f"{bundle.name}, {threads} threads: {told}", flush=True)


def compute(
    bundle: Path, threads: int, lengths: Sequence[int], steps: int, image: tuple[int, int] | None = None
) -> Computed:
    """One run on the CPU, in sessions of its own.

    Args:
        bundle: of a model that generates.
        threads: that compute.
        lengths: of prompts.
        steps: greedy tokens after each.
        image: width and height of an image to encode, where the model sees.
    """
    with Engine.load(bundle, "cpu", threads) as engine:
        sees = any(graph.name == "vision_encoder" for graph in engine.graphs.manifest.graphs)
        features = encoded(engine, *image) if sees and image else None
        runs = [read(engine, length, steps) for length in lengths]
    return Computed([logits for logits, _ in runs], [tokens for _, tokens in runs], features)


def read(engine: Engine, length: int, steps: int) -> tuple[Floats, list[int]]:
    """Logits after a prompt of so many random tokens and after each of the greedy tokens behind it, and these."""
    graphs = engine.graphs
    allowed = np.setdiff1d(np.arange(graphs.config.text.vocab_size), sorted(graphs.media_ids))
    prompt = np.random.default_rng(length).choice(allowed, length).astype(np.int64)
    forward = graphs.forward(1)
    rows = [decode.prefill(forward, [prompt])[0, 0].copy()]
    tokens = [int(rows[0].argmax())]
    for step in range(steps):
        logits = forward(np.array([[tokens[-1]]], np.int64), np.array([length + step + 1], np.int64))
        rows.append(logits[0, 0].copy())
        tokens.append(int(rows[-1].argmax()))
    return np.stack(rows), tokens


def encoded(engine: Engine, width: int, height: int) -> Floats:
    """Features of an image of noise."""
    noise = np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)
    scaled = engine.requests.scaled([noise])
    processor = engine.requests.image_processor
    values, grid = processor.patches(scaled[0])
    return engine.graphs.encode(values, grid, processor.token_count(scaled[0])).astype(np.float32)


def differences(one: Computed, other: Computed) -> tuple[int, int, int]:
    """How many rows of logits, lists of greedy tokens, and rows of features are not the same to the bit."""
    pairs = zip(one.logits, other.logits, strict=True)
    rows = sum(not np.array_equal(a, b) for first, second in pairs for a, b in zip(first, second, strict=True))
    tokens = sum(a != b for a, b in zip(one.tokens, other.tokens, strict=True))
    if one.features is None or other.features is None:
        return rows, tokens, 0
    return rows, tokens, int((one.features != other.features).any(-1).sum())


def compare(one: Computed, other: Computed) -> str:
    """Says how alike two runs are."""
    rows, tokens, features = differences(one, other)
    count = sum(len(logits) for logits in one.logits)
    text = f"{count - rows} of {count} rows of logits bit for bit"
    text += f" (greatest difference {greatest(one.logits, other.logits):.1e})"
    text += f", greedy tokens of {len(one.tokens) - tokens} of {len(one.tokens)} prompts"
    if one.features is not None and other.features is not None:
        most = greatest([one.features], [other.features])
        text += f", {len(one.features) - features} of {len(one.features)} rows of image features ({most:.1e})"
    return text


def greatest(one: Sequence[Floats], other: Sequence[Floats]) -> float:
    """The greatest difference."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
