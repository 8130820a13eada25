"""Keys and values cached as integers of 8 bits, with a scale for each token and head; for the CPU.

ONNX Runtime's own kernel takes one scale for a whole cache, which values, whose size nothing bounds, would sooner or
later leave. Here each head of a token gets a scale of its own for its keys and one for its values, their largest size,
so that nothing is ever cut off, whatever the checkpoint. Codes are 127ths of it. Those of keys are unsigned, 128 is
zero, and those of values signed: products of integers are fast with such left and right sides.

One token attends with products of integers. Its query, and later the weights of attention times the values' scales, are
written with two digits, 13 bits together: of one digit, the small weights beside a large one would all be zeros. A
query needs no look at its size, since its norm and the norm's gain bound it. No sum of two products leaves 16 bits,
in which some processors add them. Longer passes turn what is cached back into floats, for GroupQueryAttention.

A layer that keeps its window only writes in a ring (`exporter.int8_slots`): such caches never grow, and nothing in them
is moved.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.builder import CONTRIB, Builder, given
from exporter.int8_slots import Slots, find_slots
from exporter.passes_names import SYMBOLS
from exporter.translations import OPSET
from model.bundle import WINDOW_CACHE, past_key, past_value, present_key, present_value, scale_of

Floats = npt.NDArray[np.float32]

_ONE: Final = np.array(1, np.float32)
_CODE: Final = np.array(1 / 127, np.float32)
_KEY_ZERO, _VALUE_ZERO = np.array(128, np.uint8), np.array(0, np.int8)
# First digits are at most 63. Second ones are what is left, at most half of a first one's step, in 126ths of that.
_FIRST: Final = np.array(1 / 63, np.float32)
_SECOND: Final = np.array(1 / 126, np.float32)
_TINY: Final = np.array(1e-30, np.float32)
_WEIGHT_ZERO: Final = np.array(64, np.uint8)


def lower_int8_cache(model: ir.Model, rings: Collection[int]) -> int:
    """Makes every GroupQueryAttention over a whole cache in float32 one over a cache of integers; counts them.

    Inputs and outputs change: codes of keys uint8 and of values int8 [batch, kv_heads, slots, head_dim], and scales
    float32 [batch, kv_heads, slots, 1] beside each (`model.bundle.scale_of`). A present cache has the shape of the past
    one, which must have room for what is written.

    Args:
        model: traced with caches of everything.
        rings: layers whose cache holds their window only.
    """
    found = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    shared: dict[tuple[bool, int], Slots] = {}
    constants: dict[bytes, ir.Value] = {}
    for layer, node in enumerate(found):
        window = node.attributes["local_window_size"].as_int() if "local_window_size" in node.attributes else -1
        kind = layer in rings, window
        if kind not in shared:  # what stands before the first of them can be used by all
            build = _builder(node, constants)
            shared[kind] = find_slots(build, node, ring=kind[0], window=window)
            model.graph.insert_before(node, build.nodes)
        _replace(model.graph, node, layer, shared[kind], constants)
    for constant in constants.values():
        model.graph.register_initializer(constant)
    return len(found)


@dataclass(frozen=True)
class _Layer:
    """One attention: its sizes and what goes into both branches.

    Attributes:
        heads, kv_heads, width: query heads, key heads, and the width of a head.
        query, key, value: float32 [batch, sequence, heads * width], rotated.
        past: caches: keys, values, and the scales of both.
        new: what they take.
        units: float32 scalars, what a query's first and second digits count.
        worth: float32 [group, 2 * group], makes scores of products with both digits, but for the keys' scales.
    """

    heads: int
    kv_heads: int
    width: int
    query: ir.Value
    key: ir.Value
    value: ir.Value
    past: tuple[ir.Value, ...]
    new: tuple[ir.Value, ...]
    units: tuple[ir.Value, ir.Value]
    worth: ir.Value


def _builder(node: ir.Node, constants: dict[bytes, ir.Value]) -> Builder:
    """Of nodes in a node's place; all of them share their constants."""
    build = Builder(node.metadata_props, "int8")
    build.constants = constants
    return build


def _replace(graph: ir.Graph, node: ir.Node, number: int, shared: Slots, constants: dict[bytes, ir.Value]) -> None:
    past = _declare_past(graph, node, number, ring=shared.ring)
    build = _builder(node, constants)
    layer = _prepare(build, node, past, shared)
    graph.insert_before(node, build.nodes)
    attended = node.outputs[0]
    branches = {
        "then_branch": _integers(_builder(node, constants), node, layer, shared),
        "else_branch": _floats(_builder(node, constants), node, layer, shared),
    }
    choice = ir.node("If", [shared.products], branches, num_outputs=5, metadata_props=dict(node.metadata_props))
    choice.outputs[0].shape, choice.outputs[0].type = attended.shape, attended.type
    graph.insert_before(node, [choice])
    for value, like in zip(choice.outputs[1:], past, strict=True):
        value.shape, value.type = like.shape, like.type
    ir.convenience.replace_all_uses_with(attended, choice.outputs[0])
    _declare_present(graph, node, number, choice)
    graph.remove(node, safe=True)


def _declare_past(graph: ir.Graph, node: ir.Node, layer: int, *, ring: bool) -> tuple[ir.Value, ...]:
    """Makes a layer's two inputs codes, and adds their scales behind them."""
    codes = given(node, 3), given(node, 4)
    scales = []
    types = ir.DataType.UINT8, ir.DataType.INT8
    for value, name, dtype in zip(codes, (past_key(layer), past_value(layer)), types, strict=True):
        if value.name != name or value.shape is None:
            raise ValueError(f"{value.name} is not {name}")
        dims = list(value.shape)
        if ring:
            dims[2] = ir.SymbolicDim(WINDOW_CACHE)
            value.metadata_props.pop(SYMBOLS, None)  # it is no longer as long as other caches
        value.shape, value.type = ir.Shape(dims), ir.TensorType(dtype)
        scales.append(
            ir.Value(name=scale_of(name), shape=ir.Shape([*dims[:3], 1]), type=ir.TensorType(ir.DataType.FLOAT))
        )
    place = graph.inputs.index(codes[1]) + 1
    for value in reversed(scales):
        graph.inputs.insert(place, value)
    return *codes, *scales


def _declare_present(graph: ir.Graph, node: ir.Node, layer: int, choice: ir.Node) -> None:
    place = list(graph.outputs).index(node.outputs[1])
    for i, name in enumerate((present_key(layer), present_value(layer))):
        choice.outputs[1 + i].name, choice.outputs[3 + i].name = name, scale_of(name)
    for _ in range(2):
        del graph.outputs[place]
    for value in reversed(choice.outputs[1:]):
        graph.outputs.insert(place, value)


def _prepare(build: Builder, node: ir.Node, past: tuple[ir.Value, ...], shared: Slots) -> _Layer:
    """Rotates, and writes new keys and values as codes and scales [batch, sequence, kv_heads, ...]."""
    query, key, value = (given(node, i) for i in range(3))
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    width = past[0].shape[3] if past[0].shape is not None else None
    if not isinstance(width, int):
        raise ValueError(f"the width of {past[0].name} must be known")
    # |x| of a normalised head is at most the root of its width times the gain, and turning changes no length.
    gain = build("ReduceMax", build("Abs", _gain(query)), keepdims=0)
    unit = build("Max", build("Mul", gain, np.array(width**0.5 * _FIRST, np.float32)), _TINY)
    units = unit, build("Mul", unit, _SECOND)
    worth = build("Mul", unit, _pair(heads // kv_heads, float(_CODE * width**-0.5)))
    if node.attributes["do_rotary"].as_int():
        angles = shared.positions, given(node, 7), given(node, 8)
        query = build("RotaryEmbedding", query, *angles, domain=CONTRIB, num_heads=heads)
        key = build("RotaryEmbedding", key, *angles, domain=CONTRIB, num_heads=kv_heads)
    both = build("Reshape", build("Concat", key, value, axis=2), [0, 0, 2 * kv_heads, width])
    scales = build("ReduceMax", build("Abs", both), [3], keepdims=1)
    # Where all are 0, so is the scale, and whatever the division gives stays without effect.
    parts = _split(build, build("Div", both, scales))
    codes = [
        build("QuantizeLinear", part, _CODE, zero) for part, zero in zip(parts, (_KEY_ZERO, _VALUE_ZERO), strict=True)
    ]
    new = *codes, *_split(build, scales)
    return _Layer(heads, kv_heads, width, query, key, value, past, new, units, worth)


def _split(build: Builder, whole: ir.Value) -> tuple[ir.Value, ...]:
    """Halves along the third axis: of keys, and of values."""
    node = ir.node("Split", [whole], {"axis": 2, "num_outputs": 2}, num_outputs=2, metadata_props=build.metadata)
    build.nodes.append(node)
    return tuple(node.outputs)


def _gain(query: ir.Value) -> ir.Value:
    """The gain of the norm that queries come from."""
    node = query.producer()
    while node is not None and node.op_type != "SimplifiedLayerNormalization":
        node = given(node, 0).producer()
    if node is None:
        raise ValueError("the queries of an int8 cache must come from a norm")
    return given(node, 1)


def _written(build: Builder, layer: _Layer, places: ir.Value) -> list[ir.Value]:
    """The caches with the new tokens: keys, values, scales; in place where past and present share a buffer."""
    return [build("ScatterND", past, places, new) for past, new in zip(layer.past, layer.new, strict=True)]


def _integers(build: Builder, node: ir.Node, layer: _Layer, shared: Slots) -> ir.Graph:
    """One token per row: into the cache, and one product of integers with all keys, one with all values."""
    group = layer.heads // layer.kv_heads
    keys, values, *scales = _written(build, layer, shared.places)
    key_scales, value_scales = (build("Reshape", x, [0, 0, 1, -1]) for x in scales)
    query = build("Reshape", layer.query, [-1, layer.kv_heads, group, layer.width])
    turned = build("Transpose", query, perm=[0, 1, 3, 2])
    digits = _digits(build, turned, layer.units, _VALUE_ZERO, axis=3)
    products = build("MatMulIntegerToFloat", keys, digits, _ONE, _ONE, _KEY_ZERO, domain=CONTRIB)
    scores = build("FusedMatMul", layer.worth, products, domain=CONTRIB, transB=1)
    weights = build("Softmax", build("Add", build("Mul", scores, key_scales), shared.hidden), axis=-1)

    scaled = build("Mul", weights, value_scales)
    largest = build("ReduceMax", scaled, [3], keepdims=1)
    shares = np.array(1 / 63, np.float32), np.array(1 / 63 / 126, np.float32)
    digits = _digits(build, build("Div", scaled, largest), shares, _WEIGHT_ZERO, axis=2)
    products = build("MatMulIntegerToFloat", digits, values, _ONE, _ONE, _WEIGHT_ZERO, domain=CONTRIB)
    sums = build("MatMul", _pair(group, float(_CODE * _FIRST)), products)
    attended = build("Reshape", build("Mul", sums, largest), [-1, 1, layer.heads * layer.width])
    return _branch("single", build, [attended, keys, values, *scales], node, layer)


def _pair(group: int, worth: float) -> Floats:
    """[group, 2 * group]: adds second digits to first ones, of which one is worth so much."""
    return (worth * np.concatenate((np.eye(group), _SECOND * np.eye(group)), 1)).astype(np.float32)


def _digits(
    build: Builder,
    x: ir.Value,
    units: tuple[ir.Value | Floats, ir.Value | Floats],
    zero: npt.NDArray[Any],
    *,
    axis: int,
) -> ir.Value:
    """x in whole units and, behind them along an axis, what is left in smaller ones."""
    first = build("QuantizeLinear", x, units[0], zero)
    rest = build("Sub", x, build("DequantizeLinear", first, units[0], zero))
    return build("Concat", first, build("QuantizeLinear", rest, units[1], zero), axis=axis)


def _floats(build: Builder, node: ir.Node, layer: _Layer, shared: Slots) -> ir.Graph:
    """Any number of tokens: over what was cached before, as floats, and themselves as they are."""
    earlier = []
    for past in layer.past:
        if shared.ring:
            earlier.append(build("Gather", past, shared.before, axis=2))
        else:
            earlier.append(build("Slice", past, [0], shared.before, [2]))
    keys, values = (
        build("Mul", build("DequantizeLinear", codes, _CODE, zero), scales)
        for codes, scales, zero in zip(earlier[:2], earlier[2:], (_KEY_ZERO, _VALUE_ZERO), strict=True)
    )
    attention = ir.node(
        "GroupQueryAttention",
        [layer.query, layer.key, layer.value, keys, values, shared.lengths, shared.total],
        {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "local_window_size": shared.window, "do_rotary": 0},
        domain=CONTRIB, num_outputs=3, metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    build.nodes.append(attention)
    attended, places = attention.outputs[0], shared.places
    if shared.ring:
        # The new tokens take slots of old ones that the pass still sees: they are written after it.
        after = build("Mul", build("Shape", attended, start=0, end=1), 0)
        places = build("Add", places, after)
    return _branch("several", build, [attended, *_written(build, layer, places)], node, layer)


def _branch(name: str, build: Builder, results: list[ir.Value], node: ir.Node, layer: _Layer) -> ir.Graph:
    likes = node.outputs[0], *layer.past
    labels = "attended", "keys", "values", "key_scales", "value_scales"
    for value, like, label in zip(results, likes, labels, strict=True):
        value.name, value.shape, value.type = f"{name}_{label}", like.shape, like.type
    return ir.Graph([], results, nodes=build.nodes, name=name, opset_imports={"": OPSET, CONTRIB: 1})
