"""Which blocks the kernels can read a checkpoint's quantized weight in: from its shape, without reading it."""

from __future__ import annotations

from model.packed import IntegerWeight
from model.source import WeightSource
from quantize.scheme import BLOCK_SIZES, Scheme

# onnxruntime's CUDA kernels know no larger ones, and its CPU kernel rounds activations block by block.
LARGEST = 128
# Rows with one scale that no block divides are filled up, as MatMulNBits allows.
_FILLED = 32


def imported_block_size(group_size: int, columns: int, *, fill: bool) -> int | None:
    """The largest block, up to 128, that cuts every group into whole blocks; None if there is none.

    Args:
        group_size: neighbouring columns that share a scale.
        columns: of the weight.
        fill: whether the last block may be filled up.
    """
    sizes = [size for size in BLOCK_SIZES if size <= LARGEST and min(group_size, columns) % size == 0]
    if not fill:
        sizes = [size for size in sizes if columns % size == 0]
    if sizes:
        return max(sizes)
    return _FILLED if fill and group_size >= columns else None


def imported_scheme(weight: WeightSource, *, fill: bool = True) -> Scheme | None:
    """How a weight of a checkpoint is stored if its codes are taken over; None if that is not possible.

    Values may still forbid it: scales that the graph's type does not hold, or groups of unequal size.

    Args:
        weight: as `Checkpoint.bind` gives it.
        fill: whether the last block may be filled up: for a MatMul, not for a table.
    """
    if not isinstance(weight, IntegerWeight):
        return None
    size = imported_block_size(weight.group_size, weight.shape[1], fill=fill)
    symmetric = weight.zero_points is None or weight.symmetric
    return None if size is None else Scheme(weight.bits, size, symmetric, f"imported:{weight.method}")
