"""Weights that the checkpoint holds quantized: taken over code by code where the kernels can read their grid.

MatMulNBits and GatherBlockQuantized want blocks of 16 to 128 neighbouring columns with a scale in the type of the
activations. Larger groups, and whole rows, become several blocks with the same scale. Columns that belong to groups in
another order (GPTQ's act-order) are put in order, and the activations are gathered in the same order in front of the
node. Everything else is dequantized row by row, as a float weight that a recipe may quantize again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter.bind import WeightTensor
from model.packed import Float8Weight, GridRows, IntegerWeight, Order
from quantize.blocks import imported_scheme
from quantize.lazy import LazyParts
from quantize.nodes import WeightUse, replace_use
from quantize.pack import pack_codes
from quantize.report import WeightReport
from quantize.scheme import BLOCK_SIZES, AnyArray, Codes, Scheme

EXACT = "repacked exactly"


@dataclass(frozen=True)
class _Plan:
    """How a weight is taken over: in which blocks, and its columns in which order (None: as they stand)."""

    scheme: Scheme
    order: Order | None


class ImportedWeight(LazyParts):
    """The parts of a weight that is quantized already, as the kernels read them.

    Args:
        use: what reads it.
        weight: as the checkpoint holds it.
        plan: see `_Plan`.
        threads: that work side by side.
    """

    def __init__(self, use: WeightUse, weight: IntegerWeight, plan: _Plan, threads: int) -> None:
        super().__init__(use.source, plan.scheme, threads)
        self.weight, self.order = weight, plan.order
        size = plan.scheme.block_size
        # Blocks of a group are neighbours, so that a group's number follows from a block's first column.
        self._groups = np.arange(-(-weight.shape[1] // size)) * size // weight.group_size

    def _packer(self) -> Callable[[slice], dict[str, AnyArray]]:
        if not self.weight.act_order:
            self.weight.column_groups()  # raises if they are in another order all the same
        grid = self.weight.open_grid()
        return lambda rows: self._pack(grid(rows.start, rows.stop))

    def _pack(self, rows: GridRows) -> dict[str, AnyArray]:
        bits, size = self.scheme.bits, self.scheme.block_size
        scales = self._cast_scales(rows.scales)[:, self._groups]
        points = None if rows.zero_points is None else rows.zero_points[:, self._groups]
        codes = rows.codes if self.order is None else np.take(rows.codes, self.order, axis=1)
        codes = _filled(codes, len(self._groups) * size, self.scheme.middle if points is None else points[:, -1:])
        parts: dict[str, AnyArray] = {
            "codes": pack_codes(codes.reshape(len(codes), -1, size), bits),
            "scales": scales,
        }
        if points is not None:
            parts["zero_points"] = pack_codes(points, bits)
        return parts


class GraphImporter:
    """Takes over the quantized weights of one graph."""

    def __init__(self, graph: ir.Graph, accuracy_level: int, threads: int) -> None:
        self._graph, self._accuracy_level, self._threads = graph, accuracy_level, threads
        self._first_path: dict[str, str] = {}
        self._gathered: dict[tuple[ir.Value, bytes], ir.Value] = {}

    def apply(self, use: WeightUse) -> WeightReport | str:
        """Replaces a node whose weight the kernels can read as it is.

        Returns:
            How the weight is stored now; or why its values are dequantized, which is empty for plain weights.

        Raises:
            CheckpointError: the tensor that orders a weight's columns is damaged.
            NumericalError: a scale that had to be looked at is NaN or infinite.
        """
        source = packed_source(use)
        if source is None:
            return ""
        if isinstance(source, Float8Weight):
            return f"dequantized: {source.label}: there is no kernel for 8-bit floats"
        plan = _plan(use, source)
        if isinstance(plan, str):
            return f"dequantized: {source.label}: {plan}"
        weight = ImportedWeight(use, source, plan, self._threads)
        if plan.order is not None:
            self._put_in_order(use, plan.order)
        replace_use(self._graph, use, weight, self._accuracy_level)
        first = self._first_path.setdefault(weight.key, use.path)
        shared_with = "" if first == use.path else first
        reason = EXACT if plan.order is None else f"{EXACT}, its columns in the order of their groups"
        return WeightReport(use.graph, use.path, use.parameters, weight.scheme, reason, weight.stored_bits, shared_with)

    def _put_in_order(self, use: WeightUse, order: Order) -> None:
        """Lets the node read its activations in the order of the weight's columns; equal orders are gathered once."""
        activations = use.node.inputs[0]
        if activations is None:
            raise ValueError(f"{use.path} has no activations")
        key = (activations, order.tobytes())
        if key not in self._gathered:
            name = f"{use.module}.weight_order"
            tensor = ir.tensor(order, dtype=ir.DataType.INT64, name=name)
            indices = ir.Value(
                name=name, shape=ir.Shape(order.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(indices)
            gather = ir.node("Gather", [activations, indices], {"axis": -1}, name=f"{use.module}/order")
            gathered = gather.outputs[0]
            gathered.name, gathered.shape, gathered.type = f"{use.module}.ordered", activations.shape, activations.type
            self._graph.insert_before(use.node, gather)
            self._gathered[key] = gathered
        use.node.replace_input_with(0, self._gathered[key])


def packed_source(use: WeightUse) -> IntegerWeight | Float8Weight | None:
    """The quantized weight of the checkpoint behind a float initializer; None for plain ones."""
    tensor = use.source.tensor
    source = tensor.source if isinstance(tensor, WeightTensor) else None
    return source if isinstance(source, IntegerWeight | Float8Weight) else None


def _plan(use: WeightUse, weight: IntegerWeight) -> _Plan | str:
    """How to take a weight over, or why it cannot be."""
    tensor, (_, columns) = use.source.tensor, weight.shape
    if use.kind == "other":
        return f"it is read by {use.node.op_type}, which has no kernel for quantized weights"
    if not use.source.reads_rows:
        return "the graph reads it the other way round"
    scheme = imported_scheme(weight, fill=use.kind == "matmul")
    if scheme is None:
        return f"groups of {weight.group_size} columns are not made of blocks of {BLOCK_SIZES[0]}"
    if not _holds_scales(weight, tensor.dtype):
        return f"{tensor.dtype.name.lower()} does not hold its scales exactly"
    groups = weight.column_groups() if weight.act_order else None
    if groups is None:
        return _Plan(scheme, None)
    if use.kind != "matmul":
        return "a table's columns cannot be read in another order"
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], np.arange(columns) // weight.group_size):
        return f"not all of its groups have {weight.group_size} columns"
    return _Plan(scheme, order)


def _holds_scales(weight: IntegerWeight, kind: ir.DataType) -> bool:
    """Whether the graph's float type holds the stored scales; looks at them only where their type does not tell."""
    stored = weight.scales.ref.dtype
    if kind == ir.DataType.FLOAT or (kind, stored) in ((ir.DataType.FLOAT16, "F16"), (ir.DataType.BFLOAT16, "BF16")):
        return True
    scales = weight.scales.read()
    with np.errstate(over="ignore"):
        return bool((scales.astype(kind.numpy()).astype(np.float32) == scales).all())


def _filled(codes: Codes, columns: int, value: Codes | int) -> Codes:
    """Codes [n, columns], those that are missing standing for zero."""
    missing = columns - codes.shape[1]
    if not missing:
        return np.ascontiguousarray(codes)
    rest = np.broadcast_to(np.asarray(value, np.uint8), (len(codes), missing))
    return np.concatenate((codes, rest), axis=1)
