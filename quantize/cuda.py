"""Which products of quantized weights take CUDA's fast kernels.

For one token there are kernels for blocks of 16 to 128; other blocks, and more rows without the kernel that multiplies
half precision by packed integers, unpack the whole weight every time. That one (fpA_intB) wants blocks of 32, 64 or 128
that divide the inputs, and outputs that are a multiple of 64 (4 bits) or 32 (8 bits); smaller builds of ONNX Runtime
have it for blocks of 32 without zero points alone. ONNX Runtime leaves it off unless asked, which `runtime.placement`
does.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

_BLOCKS = (32, 64, 128)
_ROWS = {4: 64, 8: 32}  # bits → what the number of outputs must be a multiple of


def why_slow(rows: int, columns: int, bits: int, block_size: int, *, zero_points: bool) -> str:
    """Why a product leaves the fast kernels; empty if it does not.

    Args:
        rows, columns: N and K.
        bits, block_size: of the weight.
        zero_points: whether its blocks have one.
    """
    if block_size not in _BLOCKS:
        return f"blocks of {block_size}"
    if zero_points:
        return "zero points"
    if columns % block_size:
        return f"{columns} inputs, which blocks of {block_size} do not divide"
    if rows % _ROWS.get(bits, 1):
        return f"{rows} outputs, no multiple of {_ROWS[bits]}"
    return ""


def slow_products(models: Mapping[str, ir.Model]) -> list[str]:
    """One sentence for each reason for which products leave the fast kernels."""
    found: dict[str, list[str]] = {}
    for graph, model in models.items():
        for node in model.graph:
            if node.op_type != "MatMulNBits":
                continue
            n, k, bits, block = (node.attributes[name].as_int() for name in ("N", "K", "bits", "block_size"))
            zero_points = len(node.inputs) > 3 and node.inputs[3] is not None
            reason = why_slow(n, k, bits, block, zero_points=zero_points)
            if reason:
                found.setdefault(reason, []).append(f"{graph}.{node.name}")
    return [
        f"{len(names)} quantized weights leave CUDA's fast kernels because of {reason}, {names[0]} the first"
        for reason, names in found.items()
    ]
