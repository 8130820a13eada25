"""Tokens a second of several requests side by side against one by one, and whether both say the same.

Two things are measured in turns: a step of so many rows at one depth, and whole requests through the scheduler, prompts
of several lengths included. Ids are random and no end-of-turn token is looked for, so every request has its length.

    python -m benchmarks.batch BUNDLE --rows 8 --prompt-tokens 64 --new-tokens 64 --rounds 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np

from model.progress import NullProgress
from runtime.engine import Engine
from runtime.generation import Generator
from runtime.options import GenerationOptions
from runtime.request import Request
from runtime.scheduler import Scheduler

_STEPS = 6  # of a turn; the first is left out
_PATIENCE = 3600.0


def step_seconds(engine: Engine, rows: Sequence[int], depth: int, turns: int) -> dict[int, float]:
    """Median seconds of one pass of one token for so many rows, all `depth` tokens long."""
    random = np.random.default_rng(0)
    vocabulary = engine.graphs.config.text.vocab_size
    passes = {}
    for count in rows:
        forward = engine.graphs.forward(count, None, depth + turns * _STEPS)
        for row in range(count):
            for start in range(0, depth, forward.chunk):
                forward.append(row, random.integers(0, vocabulary, (1, min(forward.chunk, depth - start))))
        passes[count] = forward
    times: dict[int, list[float]] = {count: [] for count in rows}
    for _ in range(turns):
        for count, forward in passes.items():
            for step in range(_STEPS):
                began = time.perf_counter()
                forward.append(0, random.integers(0, vocabulary, (count, 1)))
                if step:
                    times[count].append(time.perf_counter() - began)
    return {count: statistics.median(values) for count, values in times.items()}


def requests_of(engine: Engine, count: int, prompt_tokens: int, new_tokens: int) -> list[Request]:
    """Random prompts of half to one and a half times `prompt_tokens`."""
    random = np.random.default_rng(1)
    lengths = random.integers(max(1, prompt_tokens // 2), prompt_tokens * 3 // 2 + 1, count)
    ids = [random.integers(0, engine.graphs.config.text.vocab_size, length).tolist() for length in lengths]
    return [engine.requests.of_ids(one, (), new_tokens) for one in ids]


def one_by_one(engine: Engine, requests: Sequence[Request], options: GenerationOptions) -> list[list[int]]:
    """Ids of each request alone."""
    generator = Generator(engine.graphs, engine.requests, (), NullProgress())
    return [generator.run([request], options)[0].token_ids for request in requests]


def side_by_side(engine: Engine, requests: Sequence[Request], options: GenerationOptions, rows: int) -> list[list[int]]:
    """Ids of each request among the others."""
    with Scheduler(engine, rows, pieces=None, shortest_first=True) as scheduler:
        tickets = [scheduler.submit_request(request, options) for request in requests]
        return [ticket.result(_PATIENCE).token_ids for ticket in tickets]


def main() -> None:
    """Measures one bundle and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with Engine.load(arguments.bundle) as engine:
        engine.eos_ids = frozenset()
        engine.graphs.open(images=False)
        steps = step_seconds(engine, (1, arguments.rows), arguments.prompt_tokens, 2 * arguments.rounds)
        requests = requests_of(engine, arguments.requests, arguments.prompt_tokens, arguments.new_tokens)
        options = GenerationOptions(do_sample=False, max_new_tokens=arguments.new_tokens)
        seconds: dict[str, list[float]] = {"one": [], "many": []}
        ids: dict[str, list[list[int]]] = {}
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            ids["one"] = one_by_one(engine, requests, options)
            between = time.perf_counter()
            ids["many"] = side_by_side(engine, requests, options, arguments.rows)
            seconds["one"].append(between - began)
            seconds["many"].append(time.perf_counter() - between)
    total = arguments.requests * arguments.new_tokens
    pairs = list(zip(ids["one"], ids["many"], strict=True))
    agreeing = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    report = {
        "step_ms": {count: 1e3 * value for count, value in steps.items()},
        "step_ratio": arguments.rows * steps[1] / steps[arguments.rows],
        "tokens_per_s": {name: [total / value for value in values] for name, values in seconds.items()},
        "request_ratio": [one / many for one, many in zip(seconds["one"], seconds["many"], strict=True)],
        "same_requests": sum(a == b for a, b in pairs),
        "requests": arguments.requests,
        "same_first_tokens": agreeing,
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
