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

from runtime.providers import CPU, onnxruntime

EXACT_PRODUCTS = "session.x64quantprecision"
_OPERATOR = b"MatMulIntegerToFloat"
_X86 = ("x86_64", "amd64", "i386", "i686", "x86")
_INPUTS, _OUTPUTS = 64, 16
_TYPES = {"uint8": 2, "int8": 3, "int32": 6}  # of ONNX


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
    """An ONNX model, a uint8 [1, 64] -> a @ W int32 [1, 16], with 127 everywhere in W; written out field by field."""
    weights = _number(1, _INPUTS) + _number(1, _OUTPUTS) + _number(2, _TYPES["int8"])
    weights += _field(8, b"w") + _field(9, bytes([127]) * (_INPUTS * _OUTPUTS))
    node = _field(1, b"a") + _field(1, b"w") + _field(2, b"y") + _field(4, b"MatMulInteger")
    graph = _field(1, node) + _field(2, b"product") + _field(5, weights)
    graph += _field(11, _value(b"a", "uint8", _INPUTS)) + _field(12, _value(b"y", "int32", _OUTPUTS))
    return _number(1, 8) + _field(7, graph) + _field(8, _number(2, 13))  # ir_version, graph, opset


def _value(name: bytes, kind: str, columns: int) -> bytes:
    shape = b"".join(_field(1, _number(1, size)) for size in (1, columns))
    return _field(1, name) + _field(2, _field(1, _number(1, _TYPES[kind]) + _field(2, shape)))


def _number(field: int, value: int) -> bytes:
    """A protobuf field with a number."""
    return bytes([field << 3]) + _variable(value)


def _field(field: int, content: bytes) -> bytes:
    """A protobuf field with bytes."""
    return bytes([field << 3 | 2]) + _variable(len(content)) + content


def _variable(value: int) -> bytes:
    """A number in as many groups of seven bits as it needs."""
    groups = [value & 127]
    while value := value >> 7:
        groups.append(value & 127)
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])
