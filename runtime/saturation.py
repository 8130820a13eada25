"""Whether this processor computes products of 8-bit integers exactly.

x86 without the VNNI instructions adds two products of an unsigned and a signed byte in 16 bits, which saturates. ONNX
Runtime uses that by default, and has an option that takes slower, exact instructions instead; but the option
is obeyed on processors with VNNI too, where it halves the speed for nothing. So a product that would saturate is tried.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import numpy as np

from runtime import protobuf
from runtime.providers import CPU, onnxruntime

EXACT_PRODUCTS = "session.x64quantprecision"
_OPERATOR = b"MatMulIntegerToFloat"
_X86 = ("x86_64", "amd64", "i386", "i686", "x86")
_INPUTS, _OUTPUTS = 64, 16


def needs_exact_products(path: Path) -> bool:
    """Whether the graph in a file has products of 8-bit integers that would be wrong here without the option."""
    try:
        return _OPERATOR in path.read_bytes() and products_saturate()
    except OSError:  # whoever opens the graph says so
        return False


@cache
def products_saturate() -> bool:
    """Whether ONNX Runtime's default product of uint8 activations and int8 weights is wrong here; milliseconds."""
    if platform.machine().lower() not in _X86:
        return False
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(_product(), options, providers=[CPU])
    result = session.run(None, {"a": np.full((1, _INPUTS), 255, np.uint8)})[0]
    return bool((result != 255 * 127 * _INPUTS).any())


def _product() -> bytes:
    """An ONNX model, a uint8 [1, 64] -> a @ W int32 [1, 16], with 127 everywhere in W."""
    weights = protobuf.constant("w", "int8", (_INPUTS, _OUTPUTS), bytes([127]) * (_INPUTS * _OUTPUTS))
    return protobuf.model(
        [protobuf.node("MatMulInteger", ["a", "w"], ["y"])],
        [protobuf.tensor_value("a", "uint8", (1, _INPUTS))],
        [protobuf.tensor_value("y", "int32", (1, _OUTPUTS))],
        [weights],
    )
