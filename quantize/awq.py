"""Scaled inputs (AWQ): channels with large inputs are stored larger, and so are rounded more finely.

A product ``x @ W.T`` is also ``(x / s) @ (W * s).T``. Where s follows the size of the inputs, the weights that
matter most take more of their block's grid. Other toolkits fold ``1 / s`` into the norm in front; EXAONE 4 has no norm
there, so it is a Mul in the graph: `quantize.nodes.scale_inputs`. It pays in front of q/k/v, gate/up and down_proj.

Who quantizes a model does, for every set of modules that read the same input and have the same scheme with a method of
`quantize.methods.SCALED` ("awq" searches, "awq-gptq" goes on with `quantize.gptq`):

1. ``scale = awq.input_scale([their float weights], statistics, scheme)``, one s [K] for all of them;
2. ``statistics = dataclasses.replace(statistics, input_scale=scale)`` for each of them, mean squares as gathered;
3. ``quantize(weight, statistics, scheme)``, rows in any pieces, which gives the blocks of ``W * s``;
4. ``scale_inputs(graph, uses, scale)`` once, before or after the products are replaced.

The reciprocals of s have 8 significant bits, which every float type holds: what the graph multiplies by is exactly what
the weights were divided by, in float16 and bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from model.errors import UsageError
from quantize import search
from quantize.grid import refuse_not_finite
from quantize.pack import dequantize
from quantize.scheme import Floats, Quantized, Scheme, Statistics

# s = rms(x) ** alpha; 0 means no scale.
_ALPHAS = tuple(step / 20 for step in range(21))
# The alphas are compared on so many rows of every weight, evenly chosen.
_ROWS = 256
# s stays within 2 ** -8 .. 2 ** 8, which float16 activations can take.
_LARGEST = np.float32(256)
_SIGNIFICANT = np.float32(256)  # 8 bits


def quantize(weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
    """Searches scales and zero points of the weight with its inputs' scale multiplied in.

    Args:
        weight: float32 [N, K], finite.
        statistics: of the K inputs, with an input scale.
        scheme: bits, block size, symmetry, and the type that scales will be stored in.

    Raises:
        UsageError: there is no input scale.
        NumericalError: the weight times the scale is not finite.
    """
    known = with_scale(statistics)
    weight, seen = scaled(weight, known)
    refuse_not_finite(weight)
    return replace(search.quantize(weight, seen, scheme), input_scale=known.input_scale)


def with_scale(statistics: Statistics | None) -> Statistics:
    """The statistics, if a scale was chosen for the inputs; raises UsageError else."""
    if statistics is None or statistics.input_scale is None:
        raise UsageError("cannot quantize", "method awq", "no scale was chosen for the inputs", "Give --calibration")
    return statistics


def scaled(weight: Floats, statistics: Statistics) -> tuple[Floats, Statistics]:
    """A weight times its inputs' scale, if there is one, and the mean squares of the inputs as they are then."""
    scale = statistics.input_scale
    if scale is None:
        return weight, statistics
    with np.errstate(over="ignore", invalid="ignore"):
        mean_square = np.divide(statistics.mean_square, np.square(scale), dtype=np.float32)
        return np.multiply(weight, scale, dtype=np.float32), Statistics(mean_square)


def input_scale(weights: Sequence[Floats], statistics: Statistics, scheme: Scheme) -> Floats:
    """The s [K] that brings the outputs of modules with the same input closest to what they were.

    Args:
        weights: float32 [N, K] of every module, finite.
        statistics: of the K inputs; inputs count as uncorrelated.
        scheme: bits, block size and symmetry to use.

    Raises:
        NumericalError: a weight, or a weight times a scale, is not finite.
    """
    parts = [weight[:: -(-len(weight) // _ROWS)] for weight in weights]
    rows = np.ascontiguousarray(np.concatenate(parts), np.float32)
    best, least = np.ones_like(statistics.mean_square), np.inf
    for alpha in _ALPHAS:
        scale = _scale(statistics.mean_square, alpha)
        found = quantize(rows, replace(statistics, input_scale=scale), scheme)
        difference = dequantize(found, scheme, rows.shape[1]) / scale - rows
        error = float(np.sum(np.square(difference) * statistics.mean_square, dtype=np.float64))
        if error < least:
            best, least = scale, error
    return best


def _scale(mean_square: Floats, alpha: float) -> Floats:
    """rms ** alpha, the geometric mean of the channels that are ever used being 1; 1 where nothing ever comes in."""
    used = mean_square > 0
    powers = np.log2(mean_square, out=np.zeros_like(mean_square), where=used) * np.float32(-alpha / 2)
    powers -= powers.sum() / np.float32(max(1, used.sum()))
    powers[~used] = 0
    digits, exponents = np.frexp(np.clip(np.exp2(powers), 1 / _LARGEST, _LARGEST))
    reciprocal = np.ldexp(np.rint(digits * _SIGNIFICANT) / _SIGNIFICANT, exponents)
    return np.float32(1) / reciprocal.astype(np.float32)
