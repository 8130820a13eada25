"""Changes to graphs that leave them well formed: numbers that are none, and attributes that kernels compute with."""

from __future__ import annotations

from random import Random
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz.mutators import INTEGERS

_NONE: Final = (float("nan"), float("inf"), -float("inf"))
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
# Operator → which of its inputs are scales.
_SCALES: Final = {
    "MatMulNBits": (2,), "GatherBlockQuantized": (2,), "DequantizeLinear": (1,), "QuantizeLinear": (1,),
    "MatMulIntegerToFloat": (2, 3), "DynamicQuantizeMatMul": (2,), "GroupQueryAttention": (12, 13),
}  # fmt: skip
_HEADS: Final = ("num_heads", "kv_num_heads", "q_num_heads", "rotary_embedding_dim", "local_window_size", "axis")


def planted(raw: bytes, random: Random) -> bytes:
    """A graph with one such change."""
    model = onnx.load_model_from_string(raw)
    change = random.choice((_attribute, _attribute, _heads, _none_inside, _as_numbers, _scale))
    change(model, random)
    found: bytes = model.SerializeToString()
    return found


def bad_scale(model: onnx.ModelProto) -> str:
    """The name of a scale in the graph's own file that holds NaN or an infinity; "" for none."""
    inside = {tensor.name: tensor for tensor in model.graph.initializer if _is_inside(tensor)}
    for node in model.graph.node:
        for place in _SCALES.get(node.op_type, ()):
            tensor = inside.get(node.input[place]) if place < len(node.input) else None
            if tensor is not None and not np.isfinite(numpy_helper.to_array(tensor).astype(np.float64)).all():
                return str(tensor.name)
    return ""


def _is_inside(tensor: TensorProto) -> bool:
    return tensor.data_location != TensorProto.EXTERNAL and tensor.data_type in _FLOATS


def _attribute(model: onnx.ModelProto, random: Random) -> None:
    """Some node's whole number or list of them."""
    found = [one for node in model.graph.node for one in node.attribute if one.type in (onnx.AttributeProto.INT, 7)]
    if found:
        one = random.choice(found)
        if one.type == onnx.AttributeProto.INT:
            one.i = _extreme(random)
        elif one.ints:
            one.ints[random.randrange(len(one.ints))] = _extreme(random)


def _heads(model: onnx.ModelProto, random: Random) -> None:
    """One that kernels divide by, in all nodes or in one, there or not."""
    name, value = random.choice(_HEADS), _extreme(random)
    nodes = [node for node in model.graph.node if any(one.name.endswith("num_heads") for one in node.attribute)]
    for node in nodes if random.random() < 0.5 else nodes[:1]:
        kept = [one for one in node.attribute if one.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _extreme(random: Random) -> int:
    """As the file holds it: 64 bits with a sign."""
    value = random.choice(INTEGERS) % (1 << 64)
    return value - (1 << 64) if value >> 63 else value


def _none_inside(model: onnx.ModelProto, random: Random) -> None:
    """NaN or an infinity in bytes."""
    found = [tensor for tensor in model.graph.initializer if _is_inside(tensor) and tensor.raw_data]
    if found:
        tensor = random.choice(found)
        values = numpy_helper.to_array(tensor).copy()
        values.ravel()[random.randrange(values.size)] = random.choice(_NONE)
        tensor.raw_data = values.tobytes()


def _as_numbers(model: onnx.ModelProto, random: Random) -> None:
    """A tensor's values one by one, in the field of their type, one of them NaN or an infinity."""
    found = [t for t in model.graph.initializer if _is_inside(t) and t.raw_data and t.data_type == TensorProto.FLOAT]
    if found:
        tensor = random.choice(found)
        values = numpy_helper.to_array(tensor).ravel().tolist()
        values[random.randrange(len(values))] = random.choice(_NONE)
        tensor.ClearField("raw_data")
        tensor.float_data.extend(values)


def _scale(model: onnx.ModelProto, random: Random) -> None:
    """One more scale, of a whole tensor, as a number of some type, which a node uses."""
    kind = random.choice(_FLOATS)
    code = helper.make_tensor("more_code", TensorProto.INT8, [], [1])
    model.graph.initializer.extend([helper.make_tensor("more_scale", kind, [], [random.choice(_NONE)]), code])
    node = helper.make_node("DequantizeLinear", ["more_code", "more_scale"], ["more_weight"])
    model.graph.node.insert(random.randrange(len(model.graph.node) + 1), node)
