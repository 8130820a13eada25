"""Nodes written one after another, with the constants they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

# The domain of ONNX Runtime's own operators.
CONTRIB: Final = "com.microsoft"

Constant = int | float | list[int] | npt.NDArray[Any]


class Builder:
    """Collects nodes and the constants they need; calling it adds a node and gives its first output.

    Args:
        metadata: properties that every node gets.
        prefix: of the constants' names: whole numbers are named by their value, arrays are counted.

    Attributes:
        nodes: what was added, in order.
        constants: initializers by their type, shape and bytes; whoever takes the nodes registers them.
    """

    def __init__(self, metadata: Mapping[str, str], prefix: str) -> None:
        self.metadata, self.prefix = dict(metadata), prefix
        self.nodes: list[ir.Node] = []
        self.constants: dict[bytes, ir.Value] = {}

    def __call__(self, op_type: str, *inputs: ir.Value | Constant, domain: str = "", **attributes: Any) -> ir.Value:
        values = [x if isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        node = ir.node(op_type, values, attributes, domain=domain, metadata_props=dict(self.metadata))
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: Constant) -> ir.Value:
        """An initializer of int64, or of an array's own type; the same for the same value."""
        array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
        key = repr((array.dtype, array.shape)).encode() + array.tobytes()
        if key not in self.constants:
            name = f"{self.prefix}_{f'array{len(self.constants)}' if array is value else value}"
            self.constants[key] = ir.val(name, const_value=ir.tensor(array, name=name))
        return self.constants[key]


def given(node: ir.Node, index: int) -> ir.Value:
    """An input that must be there."""
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"{node.op_type} without its input {index}")
    return value
