"""Rotary tables: cosines and sines of every position, the same bits on every machine.

Libraries compute cos and sin with whatever vector instructions a processor has, and their last bit differs between
machines. Here only additions, multiplications and roundings are used, which IEEE 754 fixes exactly.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from model.config import RopeConfig, TextConfig

Floats = NDArray[np.float32]

_CHUNK = 1 << 16  # angles at a time, so that the float64 work stays in the cache
# Tables up to this size are not stored but computed when a session starts: of a small model they are a fortieth of
# the bundle. Larger ones would cost memory and time then, and are mapped from the file as far as they are used.
_COMPUTED_BYTES = 32 << 20
# pi / 2 in two parts; the first has 33 bits, so that its product with up to 2**20 quarter turns is exact.
_QUARTER = float.fromhex("0x1.921fb54400000p+0")
_QUARTER_REST = float.fromhex("0x1.0b4611a626331p-34")
# Taylor series on [-pi/4, pi/4]: the first term left out is below 2**-57.
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(10)]
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Floats:
    """Rotation per position of each pair of a head, float32 [head_dim / 2]; "llama3" stretches the slow ones.

    Rounded to float32 after every step, as transformers does it.
    """
    exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    powers = np.array([math.pow(rope.theta, float(exponent)) for exponent in exponents], np.float32)
    plain: Floats = np.float32(1) / powers
    if rope.rope_type == "default":
        return plain
    original = np.float32(rope.original_max_position_embeddings)
    low, high, factor = (np.float32(x) for x in (rope.low_freq_factor, rope.high_freq_factor, rope.factor))
    wavelength = np.float32(2 * math.pi) / plain
    smooth = (original / wavelength - low) / (high - low)
    blended = (np.float32(1) - smooth) * plain / factor + smooth * plain
    scaled = np.where(wavelength > original / low, plain / factor, plain)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(between, blended, scaled)


def stores_tables(config: TextConfig) -> bool:
    """Whether a bundle holds the rotary tables; else its graphs compute them."""
    return 4 * config.max_position_embeddings * config.head_dim > _COMPUTED_BYTES


def rope_tables(config: TextConfig) -> tuple[Floats, Floats]:
    """Cosines and sines of all positions, each float32 [max_position_embeddings, head_dim / 2].

    Within half a unit in the last place, and an excess that matters once in 100 million values.
    """
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    shape = (config.max_position_embeddings, len(frequencies))
    cos, sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
    step = max(1, _CHUNK // len(frequencies))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        # The angle itself is a float32 in transformers too.
        angles = np.arange(rows.start, rows.stop).astype(np.float32)[:, None] * frequencies
        cos[rows], sin[rows] = _cos_sin(angles)
    return cos, sin


def _cos_sin(angles: Floats) -> tuple[Floats, Floats]:
    wide = angles.astype(np.float64)
    turns = np.rint(wide * (2 / math.pi))
    rest = (wide - turns * _QUARTER) - turns * _QUARTER_REST
    square = rest * rest
    cos, sin = _series(_COS, square), _series(_SIN, square) * rest
    quadrant = turns.astype(np.int64) & 3
    odd = (quadrant & 1).astype(bool)
    turned_cos = np.where(odd, sin, cos) * np.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0)
    turned_sin = np.where(odd, cos, sin) * np.where(quadrant >= 2, -1.0, 1.0)
    return turned_cos.astype(np.float32), turned_sin.astype(np.float32)


def _series(coefficients: list[float], x: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total *= x
        total += coefficient
    return total
