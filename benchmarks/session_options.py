"""Options of ONNX Runtime's sessions and the size of a prompt's pieces, in turns in one process.

    python -m benchmarks.session_options BUNDLE --threads 2 --rounds 8 --only usual usual-again no-spinning piece-256

Every variant has a session of its own, opened by the runtime with one thing changed. "usual-again" changes nothing:
what differs there is what memory a session happened to get, and no smaller difference means anything. Ratios are
medians over rounds of time to that of "usual"; above 1 is slower.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime import decode, session
from runtime.engine import Engine

Changes = Mapping[str, Any]
VARIANTS: dict[str, Changes] = {
    "usual": {},
    "usual-again": {},
    "no-spinning": {"session.intra_op.allow_spinning": "0"},
    "stop-spinning": {"session.force_spinning_stop": "1"},
    "denormals-zero": {"session.set_denormal_as_zero": "1"},
    "memory-pattern": {"enable_mem_pattern": True},
    "no-arena": {"enable_cpu_mem_arena": False},
    "one-thread-packs": {"session.prepack.enable_parallel": "0"},
    "piece-128": {"chunk": 128},
    "piece-256": {"chunk": 256},
    "piece-1024": {"chunk": 1024},
}


@dataclass
class Variant:
    """One session and its times, seconds."""

    engine: Engine
    load_s: float
    chunk: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def round(self, prompt: np.ndarray[Any, np.dtype[np.int64]], new: int) -> None:
        """Reads the prompt into a new cache, then takes `new` tokens."""
        forward = self.engine.graphs.forward(1, expected=len(prompt) + new)
        begin = time.perf_counter()
        decode.prefill(forward, [prompt], chunk=self.chunk)
        self.prefill.append(time.perf_counter() - begin)
        times = []
        for step in range(new):
            length = np.array([len(prompt) + step + 1], np.int64)
            begin = time.perf_counter()
            forward(prompt[None, step : step + 1], length)
            times.append(time.perf_counter() - begin)
        self.decode.append(statistics.median(times))


def opened(bundle: Path, threads: int | None, changes: Changes) -> Variant:
    """An engine whose sessions have these options on top of the usual ones."""
    usual, lend = session._session_options, session.MappedWeights.lend

    def changed(*given: Any) -> Any:
        options = usual(*given)
        for name in changes.keys() - {"chunk"}:
            if "." not in name:
                setattr(options, name, changes[name])
        return options

    def lent(weights: session.MappedWeights, options: Any) -> None:
        lend(weights, options)
        for name in changes:
            if "." in name:  # the last entry of a name holds
                options.add_session_config_entry(name, changes[name])

    session._session_options, session.MappedWeights.lend = changed, lent  # type: ignore[method-assign]
    try:
        engine = Engine.load(bundle, "cpu", threads)
        begin = time.perf_counter()
        engine.graphs.open(images=False)
        return Variant(engine, time.perf_counter() - begin, int(changes.get("chunk", decode.CHUNK)))
    finally:
        session._session_options, session.MappedWeights.lend = usual, lend  # type: ignore[method-assign]


def main() -> None:
    """Prints one line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=16)
    chosen = parser.parse_args()
    prompt = np.random.default_rng(0).integers(1000, 30000, chosen.prompt_tokens)
    names = list(dict.fromkeys(["usual", *chosen.only]))
    variants = {name: opened(chosen.bundle, chosen.threads, VARIANTS[name]) for name in names}
    for number in range(chosen.rounds + 1):
        for name in names if number % 2 else names[::-1]:
            variants[name].round(prompt, max(1, min(chosen.new_tokens, len(prompt))))
    usual = variants["usual"]
    print(f"{'':18}{'load s':>8}{'prefill s':>11}{'ratio':>7}{'decode ms':>11}{'ratio':>7}")
    for name, variant in variants.items():
        # The first round warms up.
        prefill, step = statistics.median(variant.prefill[1:]), statistics.median(variant.decode[1:])
        pieces = statistics.median(
            mine / base for mine, base in zip(variant.prefill[1:], usual.prefill[1:], strict=True)
        )
        tokens = statistics.median(mine / base for mine, base in zip(variant.decode[1:], usual.decode[1:], strict=True))
        print(f"{name:18}{variant.load_s:8.2f}{prefill:11.3f}{pieces:7.3f}{step * 1e3:11.2f}{tokens:7.3f}")


if __name__ == "__main__":
    main()
