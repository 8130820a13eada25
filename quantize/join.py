"""Products of the same activations in one: queries, keys and values; gate and up.

One token costs a product little more than reading its weights, but every node has its price besides: the activations
are rounded, the threads called together. So modules that read the same activations become one product, whose rows are
theirs one behind the other, and a Split. Their codes, scales and zero points stay what they were, and so does every
number that comes out.

Nothing is read here: what is joined writes the bytes of its members one after another when its own are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.bind import DEDUP, READS, WEIGHT
from exporter.order import ORIGIN, origin_of
from quantize.dynamic import CONTRIB

# The joined module → its members, all children of the same module of a decoder layer.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
# Operators whose initializers all have a row for each output, → the attribute that counts these. Input 0 is shared.
JOINABLE: Mapping[tuple[str, str], str] = {(CONTRIB, "MatMulNBits"): "N"}
_LAYERS = "layers."


class JoinedTensor(ir.LazyTensor):
    """Tensors of one type one behind the other, along their first axis; written member by member.

    Args:
        members: tensors that agree in all axes but the first.
        name: of the initializer.

    Attributes:
        meta: as far as the members know it, which tensors are the same, and where their bytes come from.
    """

    __slots__ = ("_members",)

    def __init__(self, members: Sequence[ir.TensorProtocol], name: str) -> None:
        first = _shape(members[0])
        rows = sum(_shape(member)[0] for member in members)
        super().__init__(self._evaluate, members[0].dtype, ir.Shape((rows, *first[1:])), name=name)
        self._members = tuple(members)
        if all(DEDUP in member.meta for member in members):
            self.meta[DEDUP] = "joined " + " & ".join(str(member.meta[DEDUP]) for member in members)
        origins = [origin for member in members if (origin := origin_of(member)) is not None]
        if origins:  # it is written when the source has come to its last member
            self.meta[ORIGIN] = max(origins)
        if all(READS in member.meta for member in members):
            self.meta[READS] = tuple(dict.fromkeys(file for member in members for file in member.meta[READS]))

    def tofile(self, file: Any) -> None:
        """Writes the members' bytes."""
        for member in self._members:
            writer: Any = member  # every class has `tofile`, the protocol does not yet
            writer.tofile(file)

    def _evaluate(self) -> ir.TensorProtocol:
        whole = np.concatenate([member.numpy() for member in self._members])
        return ir.Tensor(whole, dtype=self.dtype, name=self.name)


def join_products(graph: ir.Graph) -> int:
    """Joins what can be joined in a graph's decoder layers, in place; counts the products that are gone.

    Members must agree in everything but their number of rows: activations, bits, block size, zero points or none,
    the type of scales, accuracy level. Otherwise they stay apart.
    """
    gone = 0
    for name, nodes in _groups(graph):
        if _agree(nodes):
            _join(graph, name, nodes)
            gone += len(nodes) - 1
    return gone


def _groups(graph: ir.Graph) -> Iterator[tuple[str, list[ir.Node]]]:
    """Names of modules to be, with the products that they would consist of, in the order of `GROUPS`."""
    products = {_module(node): node for node in graph if (node.domain, node.op_type) in JOINABLE}
    for module in list(products):
        for joined, members in GROUPS.items():
            layer = module.removesuffix(members[0])
            if layer != module and layer.startswith(_LAYERS):
                nodes = [products.get(f"{layer}{member}") for member in members]
                found = [node for node in nodes if node is not None]
                if len(found) == len(nodes):
                    yield f"{layer}{joined}", found


def _module(node: ir.Node) -> str:
    """The module whose weight a product reads; empty where that is no initializer of its own."""
    value = node.inputs[1]
    if value is None or not value.is_initializer():
        return ""
    return str(value.name).rpartition(".")[0]


def _agree(nodes: Sequence[ir.Node]) -> bool:
    first = nodes[0]
    own = all(_is_own(value) for node in nodes for value in node.inputs[1:] if value is not None)
    return own and all(node.inputs[0] is first.inputs[0] and _kind(node) == _kind(first) for node in nodes)


def _is_own(value: ir.Value) -> bool:
    """Whether a value is an initializer that nobody else reads."""
    return value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_input()


def _kind(node: ir.Node) -> object:
    """The same for products that differ in their rows only."""
    rows = JOINABLE[node.domain, node.op_type]
    attributes = sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items() if name != rows)
    tensors = [None if value is None else _tensor(value) for value in node.inputs[1:]]
    weights = [None if tensor is None else (tensor.dtype, _shape(tensor)[1:]) for tensor in tensors]
    return node.domain, node.op_type, attributes, weights


def _join(graph: ir.Graph, name: str, nodes: Sequence[ir.Node]) -> None:
    rows = JOINABLE[nodes[0].domain, nodes[0].op_type]
    counts = [node.attributes[rows].as_int() for node in nodes]
    attributes = [attribute for attribute in nodes[0].attributes.values() if attribute.name != rows]
    joined = ir.Node(
        nodes[0].domain,
        nodes[0].op_type,
        [nodes[0].inputs[0], *_joined_weights(graph, name, nodes)],
        [*attributes, ir.AttrInt64(rows, sum(counts))],
        num_outputs=1,
        name=f"{name}/MatMul",
    )
    split = ir.node("Split", [joined.outputs[0], _sizes(graph, counts)], {"axis": -1}, num_outputs=len(nodes))
    split.name = f"{name}/Split"
    whole, old = joined.outputs[0], nodes[0].outputs[0]
    whole.name, whole.type = f"{joined.name}_output_0", old.type
    if old.shape is not None:
        whole.shape = ir.Shape([*list(old.shape)[:-1], sum(counts)])
    for new in (joined, split):
        new.metadata_props.update(nodes[0].metadata_props)
        new.meta.update(nodes[0].meta)
    place = {node: index for index, node in enumerate(graph)}
    graph.insert_before(min(nodes, key=place.__getitem__), [joined, split])
    for node, output in zip(nodes, split.outputs, strict=True):
        replaced = node.outputs[0]
        output.name, output.shape, output.type = replaced.name, replaced.shape, replaced.type
        replaced.replace_all_uses_with(output)
        old_inputs = [value for value in node.inputs[1:] if value is not None]
        graph.remove(node, safe=True)
        for value in old_inputs:
            del graph.initializers[str(value.name)]


def _joined_weights(graph: ir.Graph, name: str, nodes: Sequence[ir.Node]) -> list[ir.Value | None]:
    """The initializers of a joined product, registered next to each other so that they are written so."""
    values: list[ir.Value | None] = []
    columns = zip(*(node.inputs[1:] for node in nodes), strict=True)
    members = [[value for value in column if value is not None] for column in columns]
    parts = [[_tensor(value) for value in column] for column in members]
    weight = "|".join(str(tensor.meta.get(WEIGHT, tensor.name)) for tensor in parts[0])
    for column, tensors in zip(members, parts, strict=True):
        if not column:
            values.append(None)
            continue
        tensor = JoinedTensor(tensors, f"{name}.{str(column[0].name).rpartition('.')[2]}")
        tensor.meta[WEIGHT] = weight
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=kind, const_value=tensor)
        graph.register_initializer(value)
        values.append(value)
    return values


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


def _shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape.numpy())
