"""How cost grows: reading a prompt, decoding behind a context, encoding an image; with fits, a table and a picture.

    python -m benchmarks.growth BUNDLE --encoder FOLDER --out benchmarks/growth.svg        # needs matplotlib
    python -m benchmarks.growth BUNDLE --tokens 16 64 256 --rounds 1                       # a quick look, no picture

Reading a prompt should cost a share for every token, and one for every pair of tokens, which is attention. A token
behind a context should cost a share for every token of it, and no more. An image should cost a share for every patch in
the window blocks, and one for every pair of patches in the few blocks whose attention is over all of them. Each is
fitted to the medians, with all points' relative errors weighing alike; the table has what is left over.

FOLDER is any bundle with a vision encoder; if nothing is there, one of random weights is made: the published width with
4 blocks, the last with full attention. Sizes take turns in an order of their own for each round; those of more tokens
than `--once-above` come in the first round only. A run that warms up does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import exaone_export as ee
from benchmarks.peers import machine
from benchmarks.synthetic import MODELS, write_checkpoint
from exaone_export.benchmark.worker import Subject

BLOCKS = 4
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A polynomial through medians.

    Attributes:
        coefficients: of size to the power of 0, 1, ...
        r_squared: share of the times' variance that it explains.
        worst: largest residual, as a part of the time measured.
    """

    coefficients: tuple[float, ...]
    r_squared: float
    worst: float

    def at(self, size: float) -> float:
        """Seconds."""
        return float(sum(value * size**power for power, value in enumerate(self.coefficients)))

    def share(self, power: int, size: float) -> float:
        """The part of the time that a power of a size takes."""
        return self.coefficients[power] * size**power / self.at(size)


def fit(sizes: Sequence[float], seconds: Sequence[float], degree: int) -> Fit:
    """The polynomial whose relative errors have the least sum of squares."""
    at, times = np.array(sizes, np.float64), np.array(seconds, np.float64)
    columns = np.vander(at, degree + 1, increasing=True)
    found, *_ = np.linalg.lstsq(columns / times[:, None], np.ones(len(at)), rcond=None)
    left: Floats = times - columns @ found
    variance = ((times - times.mean()) ** 2).sum()
    r_squared = 1 - (left**2).sum() / variance if variance else 1.0
    return Fit(tuple(map(float, found)), float(r_squared), float(np.abs(left / times).max()))


@dataclass
class Series:
    """One kind of cost: seconds of every run, by size; `degree` of the polynomial that it should be."""

    name: str
    unit: str
    degree: int
    seconds: dict[int, list[float]]

    @property
    def sizes(self) -> list[int]:
        """In rising order."""
        return sorted(self.seconds)

    @property
    def medians(self) -> list[float]:
        """Seconds, for every size."""
        return [statistics.median(self.seconds[size]) for size in self.sizes]

    def fit(self, degree: int | None = None) -> Fit:
        """Through the medians; of the degree that is expected, or another."""
        return fit(self.sizes, self.medians, self.degree if degree is None else degree)


def measure_text(bundle: Path, options: argparse.Namespace) -> list[Series]:
    """Prompts of every length, and some tokens behind each."""
    subject = Subject()
    subject.load(str(bundle), "cpu", options.threads, images=False)
    prefill = Series("reading a prompt", "tokens", 2, {})
    decode = Series("decoding a token", "tokens before it", 1, {})
    subject.read(min(options.tokens), 2, seed=options.rounds)
    for i in range(options.rounds):
        sizes = [size for size in options.tokens if i == 0 or size <= options.once_above]
        for size in random.Random(i).sample(sizes, len(sizes)):
            found = subject.read(size, options.new_tokens, seed=i)
            prefill.seconds.setdefault(size, []).append(found["prefill_s"])
            decode.seconds.setdefault(size + options.new_tokens // 2, []).append(found["decode_s"])
            print(f"round {i + 1}: {size} tokens {found['prefill_s']:.2f} s", file=sys.stderr, flush=True)
    return [prefill, decode]


def measure_vision(bundle: Path, options: argparse.Namespace) -> Series:
    """Square images of every size."""
    encode = Series("encoding an image", "patches", 2, {})
    source = np.random.default_rng(0)
    with ee.load(bundle, ep="cpu", threads=options.threads) as loaded:
        _encode(loaded, source, min(options.sides))
        for i in range(options.rounds):
            for side in random.Random(i).sample(options.sides, len(options.sides)):
                patches, seconds = _encode(loaded, source, side)
                encode.seconds.setdefault(patches, []).append(seconds)
                print(f"round {i + 1}: {patches} patches {seconds:.2f} s", file=sys.stderr, flush=True)
    return encode


def _encode(loaded: ee.Engine | ee.Encoder, source: np.random.Generator, side: int) -> tuple[int, float]:
    """Patches of an image of noise, and seconds in the encoder's graph."""
    processor = loaded.requests.image_processor
    (scaled,) = loaded.requests.scaled([source.integers(0, 256, (side, side, 3), np.uint8)])
    values, grid = processor.patches(scaled)
    start = time.perf_counter()
    loaded.graphs.encode(values, grid, processor.token_count(scaled))
    return len(values), time.perf_counter() - start


def make_encoder(folder: Path) -> None:
    """A bundle of an encoder with random weights, `BLOCKS` blocks of the published width, the last one full."""
    large = MODELS["4.5-33b"]
    vision = large["vision_config"] | {"depth": BLOCKS, "fullatt_block_indexes": [BLOCKS - 1]}
    # No text model is exported, but there has to be one.
    text = large["text_config"] | {"num_hidden_layers": 4, "vocab_size": 128, "intermediate_size": 128}
    source = folder.with_name(f"{folder.name}-checkpoint")
    shutil.rmtree(source, ignore_errors=True)
    write_checkpoint(source, large | {"vision_config": vision, "text_config": text}, real=True)
    ee.export(source, folder, task="image-feature-extraction")
    shutil.rmtree(source)


def table(series: Sequence[Series]) -> str:
    """A Markdown table of the medians, and one of the fits."""
    lines = ["| | median of the runs of each size |", "|---|---|"]
    for one in series:
        cells = [f"{size}: {_time(value)}" for size, value in zip(one.sizes, one.medians, strict=True)]
        lines.append(f"| {one.name}, {one.unit} | {', '.join(cells)} |")
    head = ["", "fixed", "per 1,000", "per 1,000²", "R²", "largest residual", "at the largest: linear", "square"]
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in series:
        for degree in sorted({one.degree, 2}):
            lines.append(f"| {' | '.join(_row(one, degree))} |")
    return "\n".join(lines)


def _row(one: Series, degree: int) -> list[str]:
    found, largest = one.fit(degree), one.sizes[-1]
    values = [_time(value * 1000**power) for power, value in enumerate(found.coefficients)]
    shares = [f"{100 * found.share(power, largest):.1f} %" for power in range(1, degree + 1)]
    missing = ["–"] * (2 - degree)
    name = one.name if degree == one.degree else f"{one.name}, with a square"
    left = [f"{found.r_squared:.4f}", f"{100 * found.worst:.1f} %"]
    return [name, *values, *missing, *left, *shares, *missing]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if abs(seconds) >= 1 else f"{1000 * seconds:.3g} ms"


def draw(series: Sequence[Series], path: Path, title: str) -> None:
    """Medians with their ranges, and the fits, side by side."""
    matplotlib: Any = import_module("matplotlib")
    figures: Any = import_module("matplotlib.figure")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "growth"})
    figure = figures.Figure(figsize=(4.2 * len(series), 3.4), layout="constrained")
    for i, one in enumerate(series):
        axes, found = figure.add_subplot(1, len(series), i + 1), one.fit()
        unit, label = (1000.0, "milliseconds") if one.medians[-1] < 1 else (1.0, "seconds")
        line = np.linspace(0, one.sizes[-1], 100)
        axes.plot(line, [unit * found.at(size) for size in line], linewidth=1, label=_formula(found))
        runs = [one.seconds[size] for size in one.sizes]
        spans = [[m - min(r), max(r) - m] for m, r in zip(one.medians, runs, strict=True)]
        axes.errorbar(
            one.sizes, unit * np.array(one.medians), unit * np.array(spans).T, fmt="o", markersize=4, capsize=2
        )
        axes.set(title=one.name, xlabel=one.unit, ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.grid(visible=True, alpha=0.3)
        axes.legend(loc="upper left", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _formula(found: Fit) -> str:
    kind = "a + bn" if len(found.coefficients) == 2 else "a + bn + cn²"
    return f"{kind}, R² = {found.r_squared:.4f}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="a bundle that generates")
    parser.add_argument("--encoder", type=Path, help="a bundle with a vision encoder; made if it is not there")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 512, 1024, 1536, 2048, 3072, 4096])
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 336, 448, 560, 672, 896], help="pixels")
    parser.add_argument("--new-tokens", type=int, default=16, help="decoded behind every prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once-above", type=int, default=2048, help="longer prompts are read once only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="picture, .svg or .png")
    parser.add_argument("--json", type=Path, help="where to write every time that was measured")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.out is not None:
        import_module("matplotlib")  # before anything takes its time
    if options.encoder is not None and not options.encoder.exists():
        make_encoder(options.encoder)
    series = measure_text(options.bundle, options)
    if options.encoder is not None:
        series.append(measure_vision(options.encoder, options))
    print(table(series))
    if options.out is not None:
        draw(series, options.out, f"{options.bundle.resolve().name}; {machine()}; {options.threads} threads")
    if options.json is not None:
        figures = [vars(one) | {"fit": vars(one.fit())} for one in series]
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
