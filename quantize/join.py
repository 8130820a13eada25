"""Products of the same activations in one: queries, keys and values; gate and up.

One token costs a product little more than reading its weights, but every node has its price besides: the activations
are rounded, the threads called together. So modules that read the same activations become one product, whose rows are
theirs one behind the other, and a Split. Their codes, scales and zero points stay what they were, and so does every
number that comes out.

Nothing is read here: what is joined writes the bytes of its members when its own are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter.bind import WEIGHT
from exporter.builder import CONTRIB
from quantize.joined import JoinedTensor, shape_of

# The joined module → its members, all children of the same module of a decoder layer.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_LAYERS = "layers."


@dataclass(frozen=True)
class _Operator:
    """How products of one operator are joined.

    Attributes:
        axes: inputs that have something for each output → the axis along which they have it; all others are shared.
        rows: the attribute that counts outputs; empty if there is none.
        behind: operators that may stand behind a product, each with its one input; what they read besides is shared.
    """

    axes: Mapping[int, int]
    rows: str = ""
    behind: tuple[str, ...] = ()


JOINABLE: Mapping[tuple[str, str], _Operator] = {
    (CONTRIB, "MatMulNBits"): _Operator({1: 0, 2: 0, 3: 0}, "N"),
    (CONTRIB, "MatMulIntegerToFloat"): _Operator({1: 1, 3: 0}, behind=("Mul", "Cast")),
}


@dataclass(frozen=True)
class _Product:
    """A product, and the nodes behind it that belong to it."""

    node: ir.Node
    behind: tuple[ir.Node, ...]

    @property
    def operator(self) -> _Operator:
        return JOINABLE[self.node.domain, self.node.op_type]

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return self.node, *self.behind

    @property
    def output(self) -> ir.Value:
        return self.nodes[-1].outputs[0]

    @property
    def count(self) -> int:
        """Number of outputs."""
        weight = self.node.inputs[1]
        if self.operator.rows or weight is None:
            return self.node.attributes[self.operator.rows].as_int()
        return shape_of(_tensor(weight))[self.operator.axes[1]]

    @property
    def weights(self) -> list[ir.Value]:
        """The initializers of its own."""
        values = (self.node.inputs[i] for i in self.operator.axes if i < len(self.node.inputs))
        return [value for value in values if value is not None]

    @property
    def kind(self) -> object:
        """Equal for products that differ in their own weights and their number of outputs only."""
        attributes = [_attributes(node, self.operator.rows) for node in self.nodes]
        inputs = [self._described(i, value) for i, value in enumerate(self.node.inputs)]
        others = [tuple(map(id, node.inputs[1:])) for node in self.behind]
        return [(node.domain, node.op_type) for node in self.nodes], attributes, inputs, others

    def _described(self, i: int, value: ir.Value | None) -> object:
        axis = self.operator.axes.get(i)
        if axis is None or value is None:
            return id(value)
        shape = shape_of(_tensor(value))
        return _tensor(value).dtype, shape[:axis] + shape[axis + 1 :]


def join_products(graph: ir.Graph) -> int:
    """Joins what can be joined in a graph's decoder layers, in place; counts the products that are gone.

    Members must agree in everything but their number of rows: activations, bits, block size, zero points or none,
    the type of scales, accuracy level. Otherwise they stay apart.
    """
    gone = 0
    for name, products in _groups(graph):
        if _agree(products):
            split = _join(graph, name, products)
            _hand_over_whole(graph, split)
            gone += len(products) - 1
    return gone


def _hand_over_whole(graph: ir.Graph, split: ir.Node) -> None:
    """Leaves dividing to an attention that reads queries, keys and values just as the joined product gives them."""
    uses = [list(output.uses()) for output in split.outputs]
    if len(uses) != 3 or any(len(use) != 1 or use[0].idx != i for i, use in enumerate(uses)):
        return
    attention = uses[0][0].node
    if attention.op_type != "GroupQueryAttention" or any(use[0].node is not attention for use in uses):
        return
    attention.replace_input_with(0, split.inputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    sizes = split.inputs[1]
    graph.remove(split, safe=True)
    if sizes is not None and not sizes.uses():
        del graph.initializers[str(sizes.name)]


def _groups(graph: ir.Graph) -> Iterator[tuple[str, list[_Product]]]:
    """Names of modules to be, with the products that they would consist of, in the order of `GROUPS`."""
    products = {_module(node): _product(node) for node in graph if (node.domain, node.op_type) in JOINABLE}
    for module in list(products):
        for joined, members in GROUPS.items():
            layer = module.removesuffix(members[0])
            if layer != module and layer.startswith(_LAYERS):
                wanted = [products.get(f"{layer}{member}") for member in members]
                found = [product for product in wanted if product is not None]
                if len(found) == len(wanted):
                    yield f"{layer}{joined}", found


def _module(node: ir.Node) -> str:
    """The module whose weight a product reads; empty where that is no initializer of its own."""
    value = node.inputs[1]
    if value is None or not value.is_initializer():
        return ""
    return str(value.name).rpartition(".")[0]


def _product(node: ir.Node) -> _Product:
    behind: list[ir.Node] = []
    last = node
    for op_type in JOINABLE[node.domain, node.op_type].behind:
        users = list(last.outputs[0].uses())
        if len(users) != 1 or users[0].node.op_type != op_type or users[0].idx or last.outputs[0].is_graph_output():
            break
        last = users[0].node
        behind.append(last)
    return _Product(node, tuple(behind))


def _agree(products: Sequence[_Product]) -> bool:
    own = all(_is_own(value) for product in products for value in product.weights)
    return own and all(product.kind == products[0].kind for product in products)


def _is_own(value: ir.Value) -> bool:
    """Whether a value is an initializer that nobody else reads."""
    return value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_input()


def _attributes(node: ir.Node, without: str) -> list[tuple[str, str]]:
    return sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items() if name != without)


def _join(graph: ir.Graph, name: str, products: Sequence[_Product]) -> ir.Node:
    counts = [product.count for product in products]
    joined = _joined_nodes(graph, name, products)
    split = ir.node("Split", [joined[-1].outputs[0], _sizes(graph, counts)], {"axis": -1}, num_outputs=len(products))
    split.name = f"{name}/Split"
    for new, old in zip(joined, products[0].nodes, strict=True):
        value, replaced = new.outputs[0], old.outputs[0]
        value.name, value.type = f"{new.name}_output_0", replaced.type
        if replaced.shape is not None:
            value.shape = ir.Shape([*list(replaced.shape)[:-1], sum(counts)])
    for new in (*joined, split):
        new.metadata_props.update(products[0].node.metadata_props)
        new.meta.update(products[0].node.meta)
    place = {node: index for index, node in enumerate(graph)}
    graph.insert_before(min((product.node for product in products), key=place.__getitem__), [*joined, split])
    for product, output in zip(products, split.outputs, strict=True):
        replaced = product.output
        output.name, output.shape, output.type = replaced.name, replaced.shape, replaced.type
        replaced.replace_all_uses_with(output)
        weights = product.weights
        for node in reversed(product.nodes):
            graph.remove(node, safe=True)
        for value in weights:
            del graph.initializers[str(value.name)]
    return split


def _joined_nodes(graph: ir.Graph, name: str, products: Sequence[_Product]) -> list[ir.Node]:
    """The first product and what stands behind it, once more, with the weights of all."""
    first = products[0]
    rows = first.operator.rows
    nodes: list[ir.Node] = []
    for old in first.nodes:
        inputs = [nodes[-1].outputs[0], *old.inputs[1:]] if nodes else _joined_inputs(graph, name, products)
        attributes = [attribute for attribute in old.attributes.values() if attribute.name != rows]
        if rows and not nodes:
            attributes.append(ir.AttrInt64(rows, sum(product.count for product in products)))
        suffix = "" if not nodes else f"/{old.op_type}"
        nodes.append(ir.Node(old.domain, old.op_type, inputs, attributes, num_outputs=1, name=f"{name}/MatMul{suffix}"))
    return nodes


def _joined_inputs(graph: ir.Graph, name: str, products: Sequence[_Product]) -> list[ir.Value | None]:
    """Inputs of a joined product; its initializers are registered next to each other so that they are written so."""
    first = products[0]
    parts = [_tensor(product.weights[0]) for product in products]
    weight = "|".join(str(tensor.meta.get(WEIGHT, tensor.name)) for tensor in parts)
    inputs = list(first.node.inputs)
    for i, axis in first.operator.axes.items():
        members = [product.node.inputs[i] for product in products] if i < len(inputs) else []
        values = [value for value in members if value is not None]
        if not values:
            continue
        tensor = JoinedTensor([_tensor(v) for v in values], f"{name}.{str(values[0].name).rpartition('.')[2]}", axis)
        tensor.meta[WEIGHT] = weight
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=kind, const_value=tensor)
        graph.register_initializer(value)
        inputs[i] = value
    return inputs


def _sizes(graph: ir.Graph, counts: Sequence[int]) -> ir.Value:
    """How a product's outputs are divided, as a constant that layers share."""
    name = "rows_" + "_".join(str(count) for count in counts)
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(counts, np.int64), name=name)
        shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=name, shape=shape, type=kind, const_value=tensor))
    return graph.initializers[name]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ValueError(f"the initializer {value.name} has no value")
    return value.const_value
