"""onnxruntime's own quantizers as methods like ours: the weight goes through its tool, its codes into our graphs."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from quantize.pack import dequantize, unpack_codes
from quantize.scheme import Floats, Method, Quantized, Scheme, Statistics

# Those whose zero points are integers, which the fast kernel wants.
KINDS = ("default", "rtn", "k_quant")


def onnxruntime_method(kind: str) -> Method:
    """One of `KINDS` with the signature of a method; asymmetric schemes only for k_quant."""
    return partial(_quantize, kind)


def _quantize(kind: str, weight: Floats, statistics: Statistics | None, scheme: Scheme) -> Quantized:
    rows, columns = weight.shape
    packed, scales, points = _run(kind, weight, scheme)
    blocks = -(-columns // scheme.block_size)
    codes = unpack_codes(packed.reshape(rows, blocks, -1), scheme.bits, scheme.block_size)
    zero = None
    if points is not None and not scheme.symmetric:
        zero = unpack_codes(points.reshape(rows, -1), scheme.bits, blocks)
    return Quantized(codes, scales.reshape(rows, blocks).astype(np.float32), zero)


def hqq_weight(weight: Floats, scheme: Scheme) -> Floats:
    """The weight [N, K] as its HQQ stores it, which has float zero points."""
    rows, columns = weight.shape
    packed, scales, points = _run("hqq", weight, scheme)
    blocks = -(-columns // scheme.block_size)
    codes = unpack_codes(packed.reshape(rows, blocks, -1), scheme.bits, scheme.block_size)
    # The zero points come out as they are subtracted from codes.
    shifted = Quantized(codes, np.ones((rows, blocks), np.float32), None)
    values = dequantize(shifted, scheme, blocks * scheme.block_size).reshape(rows, blocks, -1) + scheme.middle
    values -= points.reshape(rows, blocks, 1)
    return np.ascontiguousarray((values * scales.reshape(rows, blocks, 1)).reshape(rows, -1)[:, :columns])


def _run(kind: str, weight: Floats, scheme: Scheme) -> tuple[Any, Any, Any]:
    """Codes, scales and zero points (None where there are none) that the tool writes."""
    tool: Any = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    rows, columns = weight.shape
    x = ir.Value(name="x", shape=ir.Shape(["n", columns]), type=ir.TensorType(ir.DataType.FLOAT))
    tensor = ir.tensor(np.ascontiguousarray(weight.T), name="w")
    value = ir.Value(name="w", shape=ir.Shape((columns, rows)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    node = ir.node("MatMul", [x, value], name="product")
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[value], opset_imports={"": 21})
    config = {
        "default": lambda: None,
        "rtn": tool.RTNWeightOnlyQuantConfig,
        "k_quant": tool.KQuantWeightOnlyQuantConfig,
        "hqq": partial(tool.HQQWeightOnlyQuantConfig, block_size=scheme.block_size, bits=scheme.bits, axis=1),
    }[kind]()
    quantizer = tool.MatMulNBitsQuantizer(
        ir.to_proto(ir.Model(graph, ir_version=10)), scheme.bits, scheme.block_size,
        is_symmetric=scheme.symmetric, algo_config=config,
    )  # fmt: skip
    logging.getLogger("neural_compressor").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # it draws a bar for every weight
        quantizer.process()
    (product,) = (node for node in ir.from_proto(quantizer.model.model).graph if node.op_type == "MatMulNBits")
    assert product.attributes["block_size"].as_int() == scheme.block_size
    assert product.attributes["bits"].as_int() == scheme.bits
    found = [value.const_value.numpy() for value in product.inputs[1:] if value is not None and value.const_value]
    return (*found, None) if len(found) == 2 else (found[0], found[1], found[2])
