"""Prefill and decode speed of bundles, through the public API, the bundles taking turns.

    python -m benchmarks.export_memory FOLDER --real --keep   # a random checkpoint of the 1.2B shape, and its bundle
    python -m benchmarks.speed FOLDER/bundle [MORE BUNDLES] --prompt-tokens 512 --new-tokens 64 --repeat 5

Random weights are as fast as trained ones. Each repeat runs every bundle once; medians and ranges are over repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import exaone_export as ee
from runtime.engine import Engine


def one_run(engine: Engine, prompt: list[int], new_tokens: int) -> dict[str, float]:
    """Tokens per second of one prompt."""
    result = engine.generate_ids(prompt, max_new_tokens=new_tokens, do_sample=False)
    timings = result.timings
    return {
        "prefill_tokens_per_s": len(prompt) / timings.prefill_s,
        "decode_tokens_per_s": timings.decode_tokens_per_s,
        "new_tokens": len(result.token_ids),
    }


def main() -> None:
    """Prints one JSON object per bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    prompt = [1000 + 7 * i % 90000 for i in range(options.prompt_tokens)]
    engines, load = {}, {}
    for bundle in options.bundles:
        begin = time.perf_counter()
        engines[bundle] = ee.load(bundle, threads=options.threads)
        engines[bundle].open()
        load[bundle] = time.perf_counter() - begin
    runs: dict[Path, list[dict[str, float]]] = defaultdict(list)
    for repeat in range(options.repeat + 1):
        for bundle, engine in engines.items():
            figures = one_run(engine, prompt, options.new_tokens)
            if repeat:  # the first round warms up
                runs[bundle].append(figures)
    for bundle, figures_of in runs.items():
        row = {
            key: {
                "median": statistics.median(f[key] for f in figures_of),
                "min": min(f[key] for f in figures_of),
                "max": max(f[key] for f in figures_of),
            }
            for key in figures_of[0]
        }
        print(json.dumps({"bundle": bundle.name, "load_s": load[bundle], **row}))


if __name__ == "__main__":
    main()
