"""Passes on weights and on the shapes of what passes by them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

TRANSPOSED = "transposed"
FACTOR = "factor"  # a power of two, that whoever binds data multiplies it by


def fold_transposes(model: ir.Model) -> int:
    """Declares every weight that is only used transposed as its transpose, [in, out].

    Such an initializer gets `metadata_props["transposed"]` "1": whoever binds data transposes it.
    """
    folded = 0
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or weight.const_value is not None:
            continue
        if weight.shape is None or len(weight.shape) != 2 or len(weight.uses()) != 1:
            continue
        weight.shape = ir.Shape([weight.shape[1], weight.shape[0]])
        weight.metadata_props[TRANSPOSED] = "1"
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        folded += 1
    return folded


def fix_reshapes(model: ir.Model) -> int:
    """Gives reshapes a constant shape where the traced one only repeats dimensions of the input.

    A free dimension at the same place becomes 0 (copy), one other free dimension -1 (infer).
    """
    fixed = 0
    shapes: dict[tuple[int, ...], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        wanted, data = node.inputs[1], node.inputs[0]
        target = _constant_shape(data, node.outputs[0])
        if target is None or wanted is None or wanted.const_value is not None:
            continue
        if target not in shapes:
            name = "shape_" + "_".join(str(size) for size in target).replace("-", "m")
            constant = ir.val(name, const_value=ir.tensor(np.array(target, np.int64), name=name))
            model.graph.register_initializer(constant)
            shapes[target] = constant
        node.replace_input_with(1, shapes[target])
        node.attributes.pop("allowzero", None)
        fixed += 1
    return fixed


def _constant_shape(data: ir.Value | None, output: ir.Value) -> tuple[int, ...] | None:
    if data is None or data.shape is None or output.shape is None:
        return None
    target: list[int] = []
    for axis, size in enumerate(output.shape):
        if isinstance(size, int):
            target.append(size)
        elif size.value is not None and axis < len(data.shape) and data.shape[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) > 1 or any(size == 0 for size in output.shape):
        return None
    return tuple(target)
