"""Codes as the bytes that ONNX Runtime's kernels read, and back.

The first two pack along the input axis, the first of two 4-bit codes in the low half of a byte:

    MatMulNBits            B uint8 [N, blocks, block_size * bits / 8], zero_points uint8 [N, ceil(blocks * bits / 8)]
    GatherBlockQuantized   data uint8 [N, K * bits / 8], zero_points the same; K a multiple of the block
    MatMulIntegerToFloat   B int8 [K, N], one scale an output; see `quantize.columns`

so the bytes of a full-block weight are the same for those two, which lets a tied table be stored once.
"""

from __future__ import annotations

import numpy as np

from quantize.scheme import INT8, AnyArray, Codes, Floats, Quantized, Scheme


def pack_codes(codes: Codes, bits: int) -> Codes:
    """Packs uint8 [..., n] codes into [..., ceil(n * bits / 8)] bytes; a missing last code is 0."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    # A pair read as one little-endian number is `first | second << 8`: one shift brings both into its low byte.
    pairs: AnyArray = np.ascontiguousarray(codes).view("<u2")
    packed: Codes = (pairs | (pairs >> 4)).astype(np.uint8)
    return packed


def unpack_codes(packed: Codes, bits: int, count: int) -> Codes:
    """The first `count` codes uint8 [..., count] of packed bytes [..., ceil(count * bits / 8)]."""
    if bits == 8:
        return packed[..., :count]
    codes = np.stack((packed & 15, packed >> 4), axis=-1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]


def packed_shapes(rows: int, columns: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
    """Shapes of ``codes``, ``scales`` and ``zero_points`` of a weight [rows, columns], as its kernel wants them."""
    if scheme.activations == INT8:
        return {"codes": (columns, rows), "scales": (rows,)}
    blocks = -(-columns // scheme.block_size)
    shapes = {
        "codes": (rows, blocks, scheme.block_size * scheme.bits // 8),
        "scales": (rows, blocks),
    }
    if not scheme.symmetric:
        shapes["zero_points"] = (rows, -(-blocks * scheme.bits // 8))
    return shapes


def dequantize(quantized: Quantized, scheme: Scheme, columns: int) -> Floats:
    """The float32 [N, K] weight that codes stand for, K being `columns`."""
    codes = quantized.codes.astype(np.float32)
    if quantized.zero_points is None:
        codes -= np.float32(scheme.middle)
    else:
        codes -= quantized.zero_points[..., None]
    codes *= quantized.scales[..., None]
    return codes.reshape(codes.shape[0], -1)[:, :columns]
