"""Products of integers: activations are rounded to 8 bits when the model runs, one scale for each row.

A linear map of x [..., K] with codes W int8 [K, N] and scales s [N] becomes

    r = max(|x|, along K) / 127                      float [..., 1]
    a = round(x / r) + 128                           uint8 [..., K]
    y = ((a - 128) @ W * s) * r                      float [..., N]

where the product is one of integers, which computes twice as much in a second as products of blocks
(MatMulNBits) do. A row is one token or one patch. With one scale for all rows, as DynamicQuantizeLinear has it, a
single massive activation of one token takes the resolution of all others; a scale for each row costs
about two hundredths of the time of the products. What several modules read is rounded once.

Where the scheme says so, x is rotated in blocks before that, and so is the weight: see `quantize.rotate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from exporter.builder import CONTRIB
from quantize.rotate import hadamard
from quantize.scheme import AnyArray, Scheme

# A row's largest magnitude becomes this code; rows of zeros get the smallest scale instead of none.
_LARGEST = 127
_SMALLEST = float(np.finfo(np.float32).tiny)
_MIDDLE = 128
_CONSTANTS, _MATRIX = "int8_products", "hadamard_"
_ROUNDED = "rounded"  # on the first node of a rounding: (inputs rotated together, codes, scales)


def integer_matmul(
    graph: ir.Graph, node: ir.Node, scheme: Scheme, weight: Sequence[ir.Value | None], name: str
) -> list[ir.Node]:
    """Nodes that compute what `node`, a MatMul, does, in integers; the rounding of its activations is inserted.

    Args:
        graph: holds the node.
        node: the MatMul, whose first input is the activations.
        scheme: of the weight; its block is K.
        weight: codes int8 [K, N] and scales float32 [N].
        name: of the module, for the names of new nodes.

    Returns:
        The nodes that are to take its place, the last one with its output.
    """
    activations = node.inputs[0]
    if activations is None:
        raise ValueError(f"{name} has no activations")
    codes, scales = _rounded(graph, node, activations, scheme)
    operands = [
        codes, weight[0],
        _constant(graph, "one", np.float32(1)), weight[1],
        _constant(graph, "middle", np.uint8(_MIDDLE)), _constant(graph, "zero", np.int8(0)),
    ]  # fmt: skip
    product = ir.node("MatMulIntegerToFloat", operands, domain=CONTRIB, name=f"{name}/product")
    scaled = ir.node("Mul", [product.outputs[0], scales], name=node.name or f"{name}/scaled")
    nodes = [product, scaled]
    kind = activations.dtype
    if kind not in (None, ir.DataType.FLOAT):
        nodes.append(ir.node("Cast", [scaled.outputs[0]], {"to": kind}, name=f"{name}/cast"))
    return nodes


def rotation_of(product: ir.Node) -> int:
    """How many inputs of a product of integers are rotated together; 0 for none. Looks at the graph only."""
    node = product
    for op_type in ("QuantizeLinear", "Reshape", "MatMul"):
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if before is None or before.op_type != op_type:
            return 0
        node = before
    matrix = node.inputs[1]
    if matrix is None or matrix.shape is None or not str(matrix.name).startswith(f"{_CONSTANTS}.{_MATRIX}"):
        return 0
    return int(matrix.shape.numpy()[0])


def _rounded(graph: ir.Graph, before: ir.Node, activations: ir.Value, scheme: Scheme) -> tuple[ir.Value, ir.Value]:
    """Codes uint8 [..., K] and scales float32 [..., 1] of activations, computed once for all who read them."""
    for user, _ in activations.uses():
        rotate, *found = user.meta.get(_ROUNDED, (None,))
        if rotate == scheme.rotate:
            return found[0], found[1]
    name, nodes = f"{activations.name}/rounded" + (f"_{scheme.rotate}" if scheme.rotate else ""), []

    def add(op_type: str, inputs: list[ir.Value], suffix: str, **attributes: int | ir.TensorProtocol) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes, name=f"{name}/{suffix}"))
        output: ir.Value = nodes[-1].outputs[0]
        output.name = f"{name}.{suffix}"
        return output

    values = activations
    if activations.dtype not in (None, ir.DataType.FLOAT):
        values = add("Cast", [activations], "float", to=ir.DataType.FLOAT)
    if scheme.rotate:
        place = add("Shape", [values], "shape")
        row = _constant(graph, f"rows_of_{scheme.rotate}", np.array([-1, scheme.rotate], np.int64))
        turned = add("MatMul", [add("Reshape", [values, row], "blocks"), _hadamard(graph, scheme.rotate)], "turned")
        values = add("Reshape", [turned, place], "rotated")
    last = _constant(graph, "last_axis", np.array([-1], np.int64))
    # Both ends of the range: magnitudes would be a copy of all activations.
    above = add("Mul", [add("ReduceMax", [values, last], "highest", keepdims=1), _step(graph, 1)], "above")
    below = add("Mul", [add("ReduceMin", [values, last], "lowest", keepdims=1), _step(graph, -1)], "below")
    scales = add("Max", [above, below, _constant(graph, "smallest", np.float32(_SMALLEST))], "scales")
    shape = add("Shape", [scales], "rows")
    middle = ir.tensor(np.array([_MIDDLE], np.uint8))
    zero_points = add("ConstantOfShape", [shape], "zero_points", value=middle)
    # One block a row: so the operator divides every row by a scale of its own.
    codes = add("QuantizeLinear", [values, scales, zero_points], "codes", axis=-1, block_size=scheme.block_size)
    nodes[0].meta[_ROUNDED] = scheme.rotate, codes, scales
    graph.insert_before(before, nodes)
    return codes, scales


def _step(graph: ir.Graph, sign: int) -> ir.Value:
    """What a code is of the largest magnitude."""
    return _constant(graph, "step" if sign > 0 else "step_below", np.float32(sign / _LARGEST))


def _hadamard(graph: ir.Graph, size: int) -> ir.Value:
    return _constant(graph, f"{_MATRIX}{size}", hadamard(size))


def _constant(graph: ir.Graph, name: str, value: AnyArray | np.generic) -> ir.Value:
    """A small initializer that all nodes of a graph share."""
    full = f"{_CONSTANTS}.{name}"
    if full not in graph.initializers:
        array = np.asarray(value)
        tensor = ir.tensor(array, name=full)
        graph.register_initializer(
            ir.Value(name=full, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[full]
