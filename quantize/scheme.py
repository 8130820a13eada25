"""What every quantization method is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.errors import NumericalError

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
        rotate: inputs that are rotated together in front of a product of integers; 0 for none (see `quantize.rotate`).
        scale_type: float type that scales are stored in, which methods may look at; not part of a recipe.
    """

    bits: int
    block_size: int = 32
    symmetric: bool = True
    method: str = "rtn"
    activations: str = FLOAT
    rotate: int = 0
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
            turned = f" rotated by {self.rotate}" if self.rotate else ""
            return f"int{self.bits} by rows {kind} {self.method}, int8 activations{turned}"
        return f"int{self.bits} g{self.block_size} {kind} {self.method}"


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is known about the inputs of a weight, gathered on calibration prompts.

    Modules that read the same input are best given the same object: what is made of it is kept for the next of them.

    Attributes:
        mean_square: float32 [K], mean of the squared input of every channel; finite, none negative.
        hessian: float32 [K, K], mean of the inputs' outer products, where it was gathered.
        input_scale: float32 [K], what every input is divided by in front of the product, where that was chosen
            (see `quantize.awq`); the other attributes are of the inputs before that.

    Raises:
        NumericalError: a mean square is NaN, infinite or negative.
        ValueError: shapes do not go together.
    """

    mean_square: Floats
    hessian: Floats | None = None
    input_scale: Floats | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mean_square).all() and (self.mean_square >= 0).all()):
            why = "a mean square of the inputs is NaN, infinite or negative"
            raise NumericalError("cannot quantize", "calibration statistics", why, "Calibrate again")
        shapes = [(self.hessian, 2), (self.input_scale, 1)]
        if any(given is not None and given.shape != self.mean_square.shape * axes for given, axes in shapes):
            raise ValueError(f"a shape does not belong to mean squares {self.mean_square.shape}")


@dataclass(frozen=True)
class Quantized:
    """A weight [N, K] in blocks along K: ``weight = (codes - zero point) * scale``.

    Attributes:
        codes: uint8 [N, blocks, block size], one code an element; behind K, codes that stand for zero.
        scales: float32 [N, blocks]; negative ones are ordinary.
        zero_points: uint8 [N, blocks]; None where all are ``2**(bits - 1)``.
        input_scale: float32 [K]; where it is given, the blocks hold ``weight * input_scale``, and whoever uses them
            divides the inputs by it (see `quantize.awq`).
    """

    codes: Codes
    scales: Floats
    zero_points: Codes | None
    input_scale: Floats | None = None


class Method(Protocol):
    """A quantization method; rows are independent, so the caller may hand over any part of them."""

    def __call__(self, weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
        """Chooses scales, zero points and codes.

        Args:
            weight: float32 [N, K], finite.
            statistics: of the K inputs, or None where nothing was calibrated.
            scheme: bits, block size and symmetry to use.
        """
