"""One-node graphs for onnxruntime, and small graphs to quantize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from quantize.pack import pack_codes
from quantize.scheme import Quantized, Scheme

Array = NDArray[Any]
OPSETS = {"": 23, "com.microsoft": 1}


def run_model(model: ir.Model, feeds: Mapping[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, dict(feeds))[0]
    return result


def constant(name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def variable(name: str, array: Array) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return ir.Value(name=name, shape=ir.Shape([f"{name}_{i}" for i in range(array.ndim)]), type=kind)


def model_of(nodes: list[ir.Node], inputs: list[ir.Value], weights: list[ir.Value], dtype: ir.DataType) -> ir.Model:
    output = nodes[-1].outputs[0]
    output.name, output.type = "y", ir.TensorType(dtype)
    graph = ir.Graph(inputs, [output], nodes=nodes, initializers=weights, opset_imports=dict(OPSETS), name="g")
    return ir.Model(graph, ir_version=10)


def matmul_nbits(x: Array, quantized: Quantized, scheme: Scheme, accuracy_level: int) -> Array:
    """x @ weight.T by onnxruntime's kernel."""
    a = variable("x", x)
    weights = [
        constant("B", pack_codes(quantized.codes, scheme.bits)),
        constant("scales", quantized.scales.astype(x.dtype)),
    ]
    if quantized.zero_points is not None:
        weights.append(constant("zero_points", pack_codes(quantized.zero_points, scheme.bits)))
    numbers = {
        "K": x.shape[1], "N": len(quantized.codes), "bits": scheme.bits, "block_size": scheme.block_size,
        "accuracy_level": accuracy_level,
    }  # fmt: skip
    attributes = [ir.AttrInt64(name, value) for name, value in numbers.items()]
    node = ir.Node("com.microsoft", "MatMulNBits", [a, *weights], attributes)
    return run_model(model_of([node], [a], weights, ir.DataType.from_numpy(x.dtype)), {"x": x})


def gather_block_quantized(ids: Array, quantized: Quantized, scheme: Scheme) -> Array:
    """weight[ids] by onnxruntime's kernel; K is a multiple of the block."""
    indices = variable("ids", ids)
    weights = [
        constant("data", pack_codes(quantized.codes, scheme.bits).reshape(quantized.codes.shape[0], -1)),
        constant("scales", quantized.scales),
    ]
    if quantized.zero_points is not None:
        weights.append(constant("zero_points", pack_codes(quantized.zero_points, scheme.bits)))
    numbers = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
    attributes = [ir.AttrInt64(name, value) for name, value in numbers.items()]
    node = ir.Node("com.microsoft", "GatherBlockQuantized", [weights[0], indices, *weights[1:]], attributes)
    return run_model(model_of([node], [indices], weights, ir.DataType.FLOAT), {"ids": ids})


def relative_error(result: Array, expected: Array) -> float:
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
