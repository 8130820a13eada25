"""What every quantization method is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
FLOAT, INT8 = "float", "int8"
ACTIVATIONS = (FLOAT, INT8)

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
AnyArray = NDArray[Any]


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored.

    Attributes:
        bits: 4 or 8 bits a code.
        block_size: weights along the input axis that share a scale; a power of two, 16 to 256, or all K of them where
            activations are int8.
        symmetric: zero is the code in the middle, ``2**(bits - 1)``; otherwise every block has a zero point.
        method: name of the method that chooses scales and codes.
        activations: what a product is computed in: "float", or "int8" for products of integers, for which the
            activations are rounded when the model runs.
        scale_type: float type that scales are stored in, which methods may look at; not part of a recipe.
    """

    bits: int
    block_size: int = 32
    symmetric: bool = True
    method: str = "rtn"
    activations: str = FLOAT
    scale_type: np.dtype[Any] = field(default=np.dtype(np.float32), compare=False)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric block."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        if self.activations == INT8:
            return f"int{self.bits} by rows {kind} {self.method}, int8 activations"
        return f"int{self.bits} g{self.block_size} {kind} {self.method}"


@dataclass(frozen=True)
class Statistics:
    """What is known about the inputs of a weight, gathered on calibration prompts.

    Attributes:
        mean_square: float32 [K], mean of the squared input of every channel.
        hessian: float32 [K, K], mean of the inputs' outer products, where it was gathered.
    """

    mean_square: Floats
    hessian: Floats | None = None


@dataclass(frozen=True)
class Quantized:
    """A weight [N, K] in blocks along K: ``weight = (codes - zero point) * scale``.

    Attributes:
        codes: uint8 [N, blocks, block size], one code an element; behind K, codes that stand for zero.
        scales: float32 [N, blocks]; negative ones are ordinary.
        zero_points: uint8 [N, blocks]; None where all are ``2**(bits - 1)``.
    """

    codes: Codes
    scales: Floats
    zero_points: Codes | None


class Method(Protocol):
    """A quantization method; rows are independent, so the caller may hand over any part of them."""

    def __call__(self, weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
        """Chooses scales, zero points and codes.

        Args:
            weight: float32 [N, K], finite.
            statistics: of the K inputs, or None where nothing was calibrated.
            scheme: bits, block size and symmetry to use.
        """
