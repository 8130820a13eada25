"""What drafts gain, beside plain decoding in the same run: receipts to JSON, and copying at known rates.

    python -m benchmarks.speculation receipts BUNDLE ... --modes off mtp:1 mtp lookup auto --count 20
    python -m benchmarks.speculation copying BUNDLE ... --drafts 3 7 --rates 1 0.95 0.9 0.8 --tokens 64

Receipts are those of the demonstration checkpoint. Modes take turns for every request, each with an engine of its own,
so that none finds another's answers; MODE:K is one with K draft tokens.

Random weights do not copy. For them the text that is copied is given: the sampler takes its tokens whatever the logits,
and each draft is right with the probability named. Passes, drafts and rewinding are those of prompt lookup; how often
real texts repeat is not measured. One line of JSON for each bundle and mode.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from exaone_export.demo.render import render_page
from exaone_export.demo.tasks import LEVELS, receipt_exercise
from runtime import speculation
from runtime.decode import Ids
from runtime.engine import Engine, Result
from runtime.speculation import Drafts

WARM = 2  # requests that are not counted: passes of a new size pay for memory once


@dataclass
class Tally:
    """Of one mode."""

    tokens: int = 0
    seconds: float = 0.0
    same: int = 0
    right: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    by_source: dict[str, list[int]] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)


def settings_of(mode: str) -> dict[str, Any]:
    """`MODE:K` as options."""
    name, _, count = mode.partition(":")
    return {"speculate": name, "do_sample": False} | ({"draft_tokens": int(count)} if count else {})


def receipts(count: int, seed: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Requests and right answers, of the hardest level and the held-out part."""
    rng, level = Random(seed), LEVELS["receipt"][-1]
    for _ in range(count):
        exercise = receipt_exercise(rng, True, level)
        images = [render_page(page) for page in exercise.pages]
        given = {"prompt": exercise.prompt, "images": images, "enable_thinking": False, "max_new_tokens": 256}
        yield given, exercise.answer


def measure(engines: dict[str, Engine], requests: Iterator[tuple[dict[str, Any], str]]) -> dict[str, Tally]:
    """Every request in every mode, in turn; the first mode is what others are compared with."""
    modes = list(engines)
    tallies = {mode: Tally() for mode in modes}
    for number, (given, right) in enumerate(requests):
        turns = modes if number % 2 else modes[::-1]
        results: dict[str, Result] = {mode: engines[mode].generate(**given, **settings_of(mode)) for mode in turns}
        if number < WARM:
            continue
        first = results[modes[0]]
        for mode, result in results.items():
            tally, account = tallies[mode], result.timings.speculation
            tally.tokens += len(result.token_ids) - 1
            tally.seconds += result.timings.decode_s
            tally.same += result.token_ids == first.token_ids
            tally.right += result.text.strip() == right
            tally.ratios.append(result.timings.decode_tokens_per_s / first.timings.decode_tokens_per_s)
            if account is not None:
                tally.passes += account.passes
                tally.drafted += account.drafted
                tally.accepted += account.accepted
                for source, counts in account.by_source.items():
                    found = tally.by_source.setdefault(source, [0, 0])
                    found[:] = (one + other for one, other in zip(found, counts, strict=True))
    return tallies


class Copied(Drafts):
    """Drafts that are right with a given probability; looks them up as ever, for the time it takes."""

    def __init__(self, answer: Ids, start: int, rate: float, most: int) -> None:
        super().__init__(most=most)
        self.answer, self.start, self.rate, self.count = answer, start, rate, most
        self.rng = np.random.default_rng(5)

    def propose(self, text: Ids, room: int) -> list[int]:
        super().propose(text, room)
        place = len(text) - self.start
        right = self.answer[place : place + min(room, self.count)]
        drafts: list[int] = np.where(self.rng.random(len(right)) < self.rate, right, right - 1).tolist()
        return drafts


def copying(
    engine: Engine, ways: list[tuple[int, float]], count: int, tokens: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Figures of copying `tokens` tokens, `count` times in turn with plain decoding."""
    rng = np.random.default_rng(seed)
    engine.graphs.open(images=False)
    seconds: dict[tuple[int, float], list[float]] = {(0, 0.0): [], **{way: [] for way in ways}}
    passes: dict[tuple[int, float], int] = {}
    for number in range(count + 1):
        prompt = rng.integers(100, engine.graphs.config.text.vocab_size, 64)
        for way in seconds:
            drafts = Copied(prompt[:tokens], len(prompt), way[1], way[0])
            forward = engine.graphs.forward(1)

            def given(logits: Any, asked: Any, so_far: Any, text: Ids = prompt) -> int:
                return int(text[len(so_far)]) if logits.argmax() >= 0 else 0

            steps = speculation.generate(forward, prompt.tolist(), given, tokens, (), drafts)
            next(steps)
            began = time.perf_counter()
            made = sum(1 for _ in steps)
            if number:
                seconds[way].append((time.perf_counter() - began) / made)
            passes[way] = drafts.account().passes
    plain = seconds[0, 0.0]
    for (most, rate), found in seconds.items():
        ratio = float(np.median(np.array(plain) / np.array(found)))
        shown = {
            "drafts": most,
            "rate": rate,
            "passes": passes[most, rate],
            "tokens_per_s": 1 / float(np.median(found)),
        }
        yield {"bundle": engine.graphs.folder.name, **shown, "median_ratio": ratio}


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("receipts", "copying"))
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--modes", nargs="+", default=["off", "mtp", "lookup", "auto"])
    parser.add_argument("--count", type=int, default=20, help="requests")
    parser.add_argument("--tokens", type=int, default=64, help="copied, 64 at most")
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 7], help="draft tokens while copying")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.95, 0.9, 0.8])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=31)
    options = parser.parse_args()
    for folder in options.bundles:
        if options.task == "copying":
            ways = [(most, rate) for most in options.drafts for rate in options.rates]
            with Engine.load(folder, threads=options.threads) as engine:
                for found in copying(engine, ways, options.count, options.tokens, options.seed):
                    print(json.dumps(found), flush=True)
            continue
        engines = {mode: Engine.load(folder, threads=options.threads) for mode in options.modes}
        for mode, tally in measure(engines, receipts(options.count + WARM, options.seed)).items():
            found = dataclasses.asdict(tally)
            ratios = found.pop("ratios")
            found["tokens_per_s"] = tally.tokens / max(tally.seconds, 1e-9)
            found["median_ratio"] = float(np.median(ratios)) if ratios else None
            print(json.dumps({"bundle": folder.name, "mode": mode, "requests": len(ratios), **found}), flush=True)


if __name__ == "__main__":
    main()
