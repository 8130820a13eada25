"""Linear layers as the published formats store them, written from the formats' own packers, apart from what reads them.

A layer is first put on a grid, ``weight = (code - zero point) * scale``, with codes and zero points unsigned in every
format; only then does a format arrange the bytes. Where each rule comes from:

- compressed-tensors: ``pack_to_int32`` and ``PackedQuantizationCompressor`` of the compressed-tensors library.
- AutoAWQ: ``WQLinear_GEMM.from_linear``.
- GPTQ: ``QuantLinear.pack`` of AutoGPTQ (format v1), ``pack_original`` and the conversion of zero points between
  formats 1 and 2 of GPTQModel.
- FP8: ``FP8Linear`` of transformers, ``NaiveQuantizationCompressor`` of compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

AnyArray = NDArray[Any]
Floats = NDArray[np.float32]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbouring outputs lies in which nibble, the lowest first


@dataclass(frozen=True)
class Draws:
    """Where a layer's random numbers come from; layers that read the same input share `order`, as their columns do."""

    values: np.random.Generator
    order: np.random.Generator


@dataclass(frozen=True)
class Grid:
    """A weight [N, K] on an integer grid.

    Attributes:
        bits: of a code.
        codes: uint8 [N, K].
        scales: float32 [N, groups], already rounded to the type that is stored.
        zero_points: uint8 [N, groups]; of symmetric grids all ``2**(bits - 1)``.
        groups: int32 [K], the group of every column.
    """

    bits: int
    codes: AnyArray
    scales: Floats
    zero_points: AnyArray
    groups: AnyArray

    def dequantized(self) -> Floats:
        """The float32 weight [N, K] that the codes stand for."""
        steps = self.codes.astype(np.float32) - self.zero_points.astype(np.float32)[:, self.groups]
        return np.asarray(steps * self.scales[:, self.groups], np.float32)


@dataclass(frozen=True)
class Layer:
    """One linear layer as it was written.

    Attributes:
        tensors: name after the module's ("qweight") → array, as it goes into the file.
        weight: float32 [N, K], what they stand for.
        grid: of integer formats, codes and all; None of FP8.
    """

    tensors: dict[str, AnyArray]
    weight: Floats
    grid: Grid | None = None


def make_grid(
    weight: Floats,
    bits: int,
    group: int,
    *,
    symmetric: bool,
    scale_type: np.dtype[Any],
    draws: Draws,
    shuffled: bool = False,
) -> Grid:
    """Quantizes a weight [N, K] to nearest.

    Args:
        weight: what to quantize. Asymmetric grids get it shifted, group by group, so far that every zero point occurs.
        bits: 4 or 8.
        group: columns to a scale; -1 for all of a row.
        symmetric: whether the zero point is always the middle code.
        scale_type: of the stored scales.
        draws: of the shifts, and of the order of the columns.
        shuffled: whether the columns of a group lie anywhere (act-order) instead of side by side.
    """
    rows, columns = weight.shape
    group = columns if group == -1 else group
    assert columns % group == 0, (columns, group)
    groups = np.arange(columns, dtype=np.int32) // group
    if shuffled:
        groups = draws.order.permutation(groups)
    order = np.argsort(groups, kind="stable")
    blocks = weight[:, order].reshape(rows, -1, group)
    largest, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scales = np.abs(blocks).max(-1) / (largest / 2)
        zero_points = np.full(scales.shape, middle, np.uint8)
    else:
        blocks = blocks + (draws.values.uniform(-3, 3, (rows, blocks.shape[1], 1)) * weight.std()).astype(np.float32)
        low, high = blocks.min(-1), blocks.max(-1)
        scales = (high - low) / largest
        zero_points = np.clip(np.rint(-low / scales), 0, largest).astype(np.uint8)
    scales = scales.astype(scale_type).astype(np.float32)
    steps = np.rint(blocks / scales[..., None]) + zero_points[..., None]
    codes = np.empty((rows, columns), np.uint8)
    codes[:, order] = np.clip(steps, 0, largest).reshape(rows, columns)
    return Grid(bits, codes, scales, zero_points, groups)


def pack_words(codes: AnyArray, bits: int) -> AnyArray:
    """Codes [..., n] as int32 [..., ceil(n * bits / 32)], the first code in the lowest bits."""
    each = 32 // bits
    missing = -codes.shape[-1] % each
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)]).astype(np.uint32)
    lanes = padded.reshape(*codes.shape[:-1], -1, each) << (np.arange(each, dtype=np.uint32) * np.uint32(bits))
    return np.bitwise_or.reduce(lanes, axis=-1).astype(np.uint32).view(np.int32)


def pack_quantized(grid: Grid, scale_type: np.dtype[Any], *, symmetric: bool, shuffled: bool = False) -> Layer:
    """compressed-tensors' "pack-quantized".

    Codes are signed there and stored with an offset of ``2**(bits - 1)``, which makes them ours. Rows are packed along
    K; zero points, where there are any, along N.
    """
    tensors = {
        "weight_packed": pack_words(grid.codes, grid.bits),
        "weight_scale": grid.scales.astype(scale_type),
        "weight_shape": np.array(grid.codes.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack_words(grid.zero_points.T, grid.bits).T)
    if shuffled:
        tensors["weight_g_idx"] = grid.groups
    return Layer(tensors, grid.dequantized(), grid)


def int_quantized(grid: Grid, scale_type: np.dtype[Any]) -> Layer:
    """compressed-tensors' "int-quantized": signed bytes as they are, a scale a row."""
    assert grid.bits == 8
    tensors = {
        "weight": (grid.codes.astype(np.int16) - 128).astype(np.int8),
        "weight_scale": grid.scales.astype(scale_type),
    }
    return Layer(tensors, grid.dequantized(), grid)


def awq_gemm(grid: Grid) -> Layer:
    """AutoAWQ's "gemm": everything transposed to [K, N], eight outputs a word, interleaved; half-precision scales."""
    assert grid.bits == 4
    tensors = {
        "qweight": _interleaved(grid.codes.T),
        "qzeros": _interleaved(grid.zero_points.T),
        "scales": np.ascontiguousarray(grid.scales.T).astype(np.float16),
    }
    return Layer(tensors, grid.dequantized(), grid)


def _interleaved(values: AnyArray) -> AnyArray:
    rows, columns = values.shape
    return pack_words(values.reshape(rows, columns // 8, 8)[..., AWQ_ORDER].reshape(rows, columns), 4)


def gptq(grid: Grid, version: int, *, indices: bool = True) -> Layer:
    """GPTQ: codes packed along K and zero points along N, both transposed; half-precision scales.

    Format 1 stores every zero point less one, and GPTQModel subtracts that from whole words: where a zero point is 0,
    the next lane pays for it.

    Args:
        grid: the weight.
        version: of the format, 1 or 2.
        indices: whether to write g_idx.
    """
    zero_points = pack_words(grid.zero_points.T, grid.bits).view(np.uint32)
    if version == 1:
        zero_points = zero_points - np.uint32(0x11111111 if grid.bits == 4 else 0x01010101)
    tensors = {
        "qweight": np.ascontiguousarray(pack_words(grid.codes, grid.bits).T),
        "qzeros": np.ascontiguousarray(zero_points).view(np.int32),
        "scales": np.ascontiguousarray(grid.scales.T).astype(np.float16),
    }
    if indices:
        tensors["g_idx"] = grid.groups
    return Layer(tensors, grid.dequantized(), grid)


def float8(weight: Floats, block: tuple[int, int], *, suffix: str, scale_type: np.dtype[Any], axes: int) -> Layer:
    """FP8 (E4M3): one scale for every block [rows, columns] of the weight, those at the edges possibly smaller.

    Args:
        weight: float32 [N, K].
        block: rows and columns of a block; -1 for all.
        suffix: name of the scales, "weight_scale" or "weight_scale_inv"; both are factors of the stored values.
        scale_type: of the stored scales.
        axes: of the stored scales; 0 and 1 are for a single one.
    """
    rows, columns = (size if part == -1 else part for part, size in zip(block, weight.shape, strict=True))
    high, wide = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scales = np.empty((high, wide), np.float32)
    for i in range(high):
        for j in range(wide):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scales[i, j] = np.abs(part).max() / 448
    scales = scales.astype(scale_type).astype(np.float32)
    every = scales.repeat(rows, 0)[: weight.shape[0]].repeat(columns, 1)[:, : weight.shape[1]]
    values = np.clip(weight / every, -448, 448).astype(FLOAT8)
    stored = scales.reshape(scales.shape if axes == 2 else (1,) * axes)
    tensors = {"weight": values, suffix: stored.astype(scale_type)}
    return Layer(tensors, np.asarray(values.astype(np.float32) * every, np.float32))
