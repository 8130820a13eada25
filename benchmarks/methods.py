"""What each method loses of a layer's output at equal bits, and how fast it is, beside onnxruntime's own quantizers.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.methods

The layer is synthetic: t5 weights; inputs of which half the variance is shared between channels through 256 others, of
unequal sizes, and 24 of 512 channels eight times as large. The statistics are of 4,096 inputs, the error is that
of 2,048 others: ``|X (W - Q).T| / |X W.T|``. It overstates outliers, and says which method is better, not by how much
on a model.

Speeds are those of one core, of 1024 x 4096 weights, statistics of the inputs given; what is done once for all weights
that read an input (a Hessian's factor, a scale) is told apart.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from benchmarks.ort_quantizers import onnxruntime_method
from quantize import awq, gptq
from quantize.methods import METHODS, SCALED
from quantize.pack import dequantize
from quantize.scheme import Floats, Quantized, Scheme, Statistics

FORMATS = [
    Scheme(bits, size, symmetric)
    for bits, sizes in ((4, (16, 32, 64, 128, 256)), (8, (32, 128)))
    for size in sizes
    for symmetric in (True, False)
]
# Kernels have it, recipes do not: see RESULTS.md.
TWO_BITS = [Scheme(2, 32, False), Scheme(2, 16, False)]
# Name in the table → method, and whether it is told about the inputs.
COLUMNS = {
    "rtn": ("rtn", False),
    "hqq": ("hqq", False),
    "search": ("search", False),
    "search, calibrated": ("search", True),
    "awq": ("awq", True),
    "gptq": ("gptq", True),
    "awq-gptq": ("awq-gptq", True),
}
SPEED = Scheme(4, 32, False)


def layer(rows: int = 1024, columns: int = 512, tokens: int = 4096, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """A weight [N, K], inputs to calibrate on [tokens, K], and inputs to judge by [2048, K]."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(5, (rows, columns)) * 0.02).astype(np.float32)
    rank = columns // 2
    mix = rng.standard_normal((rank, columns)) * np.sqrt(0.5 / rank)
    size = np.exp(0.6 * rng.standard_normal(columns))
    size[rng.choice(columns, columns * 24 // 512, replace=False)] *= 8

    def inputs(count: int) -> Floats:
        shared, own = rng.standard_normal((count, rank)) @ mix, rng.standard_normal((count, columns))
        return ((shared + np.sqrt(0.5) * own) * size).astype(np.float32)

    return weight, inputs(tokens), inputs(2048)


def statistics_of(inputs: Floats) -> Statistics:
    """Mean squares and Hessian of inputs [tokens, K]."""
    hessian = inputs.T @ inputs / np.float32(len(inputs))
    return Statistics(np.diagonal(hessian).copy(), hessian)


def output_error(weight: Floats, stored: Floats, inputs: Floats) -> float:
    """The error of the layer's output, relative to the output."""
    return float(np.linalg.norm(inputs @ (weight - stored).T) / np.linalg.norm(inputs @ weight.T))


def stored_weight(quantized: Quantized, scheme: Scheme, columns: int) -> Floats:
    """The weight that a quantized one stands for, its inputs' scale included."""
    weight = dequantize(quantized, scheme, columns)
    return weight if quantized.input_scale is None else weight / quantized.input_scale


def quantized_by(name: str, weight: Floats, statistics: Statistics, scheme: Scheme) -> Quantized:
    """A weight by a column of the table, scale of its inputs included."""
    method, told = COLUMNS[name]
    if method in SCALED:
        statistics = replace(statistics, input_scale=awq.input_scale([weight], statistics, scheme))
    return METHODS[method](weight, statistics if told else None, scheme)


def onnxruntimes(kind: str, weight: Floats, scheme: Scheme) -> Floats | None:
    """The weight as onnxruntime's quantizer "default" or "k_quant" stores it; None where it cannot."""
    if kind == "k_quant" and (scheme.symmetric or scheme.bits != 4):
        return None
    try:
        stored = onnxruntime_method(kind)(weight, None, scheme)
    except ImportError as missing:
        logging.getLogger(__name__).warning("onnxruntime's quantizers are not there: %s", missing)
        return None
    return dequantize(stored, scheme, weight.shape[1])


def bits_per_weight(scheme: Scheme) -> float:
    """On disk, scales of 16 bits and zero points included."""
    return scheme.bits + (16 + (0 if scheme.symmetric else scheme.bits)) / scheme.block_size


def errors(schemes: list[Scheme], seeds: int) -> Iterator[tuple[Scheme, dict[str, float]]]:
    """Mean held-out errors of every column, by format."""
    layers = [layer(seed=seed) for seed in range(seeds)]
    known = [statistics_of(calibration) for _, calibration, _ in layers]
    for scheme in schemes:
        row: dict[str, list[float]] = {}
        for (weight, _, inputs), statistics in zip(layers, known, strict=True):
            stored: dict[str, Floats | None] = {}
            if scheme.bits > 2:
                stored = {f"ORT {kind}": onnxruntimes(kind, weight, scheme) for kind in ("default", "k_quant")}
            for name in COLUMNS:
                quantized = quantized_by(name, weight, statistics, scheme)
                stored[name] = stored_weight(quantized, scheme, weight.shape[1])
            for name, values in stored.items():
                if values is not None:
                    row.setdefault(name, []).append(output_error(weight, values, inputs))
        yield scheme, {name: float(np.mean(values)) for name, values in row.items()}


def best_seconds(work: Callable[[], object], rounds: int) -> float:
    """Processor time of the fastest of some runs."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def speeds(rounds: int) -> Iterator[str]:
    """Lines about millions of weights a second and core."""
    weight, inputs, _ = layer(1024, 4096, 8192)
    statistics = statistics_of(inputs)
    start = time.process_time()
    scale = awq.input_scale([weight], statistics, SPEED)
    yield f"awq: scale of 4096 inputs chosen in {time.process_time() - start:.1f} s"
    scaled = replace(statistics, input_scale=scale)
    start = time.process_time()
    gptq.prepared(statistics)
    yield f"gptq: Hessian of 4096 inputs prepared in {time.process_time() - start:.1f} s"
    gptq.prepared(scaled)
    for name, (method, told) in COLUMNS.items():
        given = (scaled if method in SCALED else statistics) if told else None
        seconds = best_seconds(lambda m=method, s=given: METHODS[m](weight, s, SPEED), rounds)  # type: ignore[misc]
        yield f"{name}: {weight.size / seconds / 1e6:.1f} M weights/s"
    for kind in ("default", "k_quant"):
        seconds = best_seconds(lambda k=kind: onnxruntimes(k, weight, SPEED), 1)  # type: ignore[misc]
        yield f"ORT {kind}: {weight.size / seconds / 1e6:.1f} M weights/s, graph included"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="layers to take the mean of")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method, of which the fastest counts")
    parser.add_argument("--two-bits", action="store_true", help="2 bits instead, which recipes do not have")
    parser.add_argument("--no-speed", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.INFO)  # onnxruntime's tool speaks of every product
    columns = (["ORT default", "ORT k_quant"] if not args.two_bits else []) + list(COLUMNS)
    print(f"| format | bits/weight | {' | '.join(columns)} |")
    print("|" + "---|" * (len(columns) + 2))
    for scheme, row in errors(TWO_BITS if args.two_bits else FORMATS, args.seeds):
        kind = f"int{scheme.bits} g{scheme.block_size} {'sym' if scheme.symmetric else 'asym'}"
        cells = (f"{row[name]:.4f}" if name in row else "–" for name in columns)
        print(f"| {kind} | {bits_per_weight(scheme):.3f} | {' | '.join(cells)} |", flush=True)
    for line in () if args.no_speed else speeds(args.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
