"""Quantized weights of a bundle read back, as the values that the kernels compute with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter.builder import CONTRIB
from quantize.dynamic import rotation_of
from quantize.join import GROUPS
from quantize.pack import dequantize, unpack_codes
from quantize.rotate import restored
from quantize.scheme import AnyArray, Floats, Quantized, Scheme

# What stands behind a module's name in the name of its codes.
_CODES = ".weight_q"
_BLOCKS = {"MatMulNBits": True, "GatherBlockQuantized": False}  # whether activations are multiplied with them
_INTEGERS = "MatMulIntegerToFloat"


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight of one module.

    Attributes:
        path: of the module, e.g. ``decoder.layers.3.mlp.down_proj``.
        shape: N outputs and K inputs.
        read: rows start..stop as float32 [rows, K], in the order and at the scale of the inputs that the graph has in
            front of them: what it does to its inputs is undone.
    """

    path: str
    shape: tuple[int, int]
    read: Callable[[int, int], Floats]


def stored_weights(name: str, graph: ir.Graph, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[StoredWeight]:
    """Every module of a graph whose weight is quantized; of joined modules each one.

    Args:
        name: of the graph.
        graph: its weights may be external data, which is mapped and not read.
        shapes: module path → shape of its weight; a module that is not in it is passed over.
    """
    for node in graph:
        if node.domain != CONTRIB or node.op_type not in (*_BLOCKS, _INTEGERS):
            continue
        value = node.inputs[0 if node.op_type == "GatherBlockQuantized" else 1]
        if value is None or not str(value.name).endswith(_CODES):
            continue
        read = _integers(node) if node.op_type == _INTEGERS else _blocks(node)
        start = 0
        for path in _members(name, str(value.name).removesuffix(_CODES), node):
            if path in shapes:
                rows, columns = int(shapes[path][0]), int(np.prod(shapes[path][1:]))
                yield StoredWeight(path, (rows, columns), _part(read, start))
                start += rows


def _part(read: Callable[[int, int], Floats], first: int) -> Callable[[int, int], Floats]:
    return lambda start, stop: read(first + start, first + stop)


def _members(graph: str, module: str, node: ir.Node) -> list[str]:
    """Paths of the modules whose rows a product has, in their order."""
    for joined, members in GROUPS.items():
        parent = module.removesuffix(joined)
        if parent != module:
            return [f"{graph}.{parent}{member}" for member in members]
    parent, _, last = module.rpartition(".")
    # A table tied to the head is one initializer; each use goes by the module that it is.
    if last == "embed_tokens" and node.op_type == "MatMulNBits":
        last = "lm_head"
    elif last == "lm_head" and node.op_type == "GatherBlockQuantized":
        last = "embed_tokens"
    return [".".join(part for part in (graph, parent, last) if part)]


def _blocks(node: ir.Node) -> Callable[[int, int], Floats]:
    multiplied = _BLOCKS[node.op_type]
    operands = [node.inputs[i] for i in ((1, 2, 3) if multiplied else (0, 2, 3)) if i < len(node.inputs)]
    codes, scales = _values(operands[0]), _values(operands[1])
    points = _values(operands[2]) if len(operands) > 2 and operands[2] is not None else None
    bits, size = (node.attributes.get_int(key, 0) for key in ("bits", "block_size"))
    columns = node.attributes.get_int("K", 0) if multiplied else codes.shape[-1] * 8 // bits
    scheme = Scheme(bits, size, points is None)
    blocks = -(-columns // size)
    undo = _undo(node, columns) if multiplied else _nothing

    def read(start: int, stop: int) -> Floats:
        count = stop - start
        packed = np.ascontiguousarray(codes[start:stop]).reshape(count, -1)
        unpacked = unpack_codes(packed, bits, blocks * size).reshape(count, blocks, size)
        grid = scales.reshape(-1, blocks)[start:stop].astype(np.float32)
        zero = None
        if points is not None:
            rows = points.reshape(-1, -(-blocks * bits // 8))[start:stop]
            zero = unpack_codes(np.ascontiguousarray(rows), bits, blocks)
        return undo(dequantize(Quantized(unpacked, grid, zero), scheme, columns))

    return read


def _integers(node: ir.Node) -> Callable[[int, int], Floats]:
    """Of codes int8 [K, N] with a scale for each output."""
    codes, scales = _values(node.inputs[1]), _values(node.inputs[3])
    rotate = rotation_of(node)

    def read(start: int, stop: int) -> Floats:
        weight: Floats = np.ascontiguousarray(codes[:, start:stop].T).astype(np.float32)
        weight *= scales.reshape(-1)[start:stop, None]
        return restored(weight, rotate) if rotate else weight

    return read


def _nothing(weight: Floats) -> Floats:
    return weight


def _undo(node: ir.Node, columns: int) -> Callable[[Floats], Floats]:
    """What turns a product's columns into those of the module's own inputs.

    In front of a product there may be a Mul by one factor for each input, or a Gather that puts them in another order.
    """
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if before is None or len(before.inputs) < 2:
        return _nothing
    constants = [value for value in before.inputs if value is not None and value.is_initializer()]
    arrays = [_values(value) for value in constants if value.shape is not None and value.shape.numpy() == (columns,)]
    if len(arrays) != 1:
        return _nothing
    [array] = arrays
    if before.op_type == "Mul":
        return lambda weight: weight * array.astype(np.float32)
    if before.op_type == "Gather":
        places = np.argsort(array)
        return lambda weight: np.take(weight, places, axis=1)
    return _nothing


def _values(value: ir.Value | None) -> AnyArray:
    if value is None or value.const_value is None:
        raise ValueError("a quantized weight's operand has no value")
    return value.const_value.numpy()
