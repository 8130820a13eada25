"""Graph edits: a MatMul with a weight becomes MatMulNBits, a Gather from a table GatherBlockQuantized.

A bias stays an Add behind the node: the kernel could take it as an input, but onnxruntime's fastest CUDA kernels
want weights without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from exporter.builder import CONTRIB
from quantize.dynamic import integer_matmul
from quantize.lazy import LazyParts, Source
from quantize.scheme import INT8, Floats

SUFFIX = ".weight"
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

Kind = Literal["matmul", "gather", "other"]

# A table tied to the head is one initializer; each use goes by the module that it is.
_TIED: dict[tuple[str, Kind], str] = {("embed_tokens", "matmul"): "lm_head", ("lm_head", "gather"): "embed_tokens"}


@dataclass(frozen=True)
class WeightUse:
    """One node that reads one weight.

    Attributes:
        graph: name of the graph.
        path: full module path, e.g. ``decoder.layers.3.mlp.down_proj``.
        kind: what the node does with it; "other" has no quantized kernel.
        node: the node that is replaced.
        value: the weight's initializer, two-dimensional and float.
        source: what it holds, with rows as the kernels want them.
        transpose: the Transpose between initializer and node, if there is one.
    """

    graph: str
    path: str
    kind: Kind
    node: ir.Node
    value: ir.Value
    source: Source
    transpose: ir.Node | None = None

    @property
    def parameters(self) -> int:
        """Number of weights."""
        rows, columns = self.source.shape
        return rows * columns

    @property
    def module(self) -> str:
        """The module's name inside its graph."""
        return self.path.partition(".")[2]


def find_weights(graph_name: str, graph: ir.Graph) -> list[WeightUse]:
    """Every node that reads a two-dimensional float initializer called ``<module>.weight``, in graph order."""
    uses = [use for value in graph.initializers.values() for use in _uses_of(graph_name, value)]
    order = {node: index for index, node in enumerate(graph)}
    return sorted(uses, key=lambda use: order.get(use.node, len(order)))


def _uses_of(graph_name: str, value: ir.Value) -> Iterator[WeightUse]:
    name, tensor = value.name or "", value.const_value
    if not name.endswith(SUFFIX) or tensor is None or len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
        return
    for node, index in value.uses():
        readers = [(node, index)]
        transpose = None
        if node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0):
            transpose, readers = node, list(node.outputs[0].uses())
        for reader, position in readers:
            kind = _kind(reader, position, transpose is not None)
            source = Source(tensor, kind == "matmul" and transpose is None, f"{graph_name}.{name}")
            path = _module_path(graph_name, name.removesuffix(SUFFIX), kind)
            yield WeightUse(graph_name, path, kind, reader, value, source, transpose)


def _module_path(graph_name: str, module: str, kind: Kind) -> str:
    parent, _, last = module.rpartition(".")
    return ".".join(part for part in (graph_name, parent, _TIED.get((last, kind), last)) if part)


def _kind(node: ir.Node, index: int, transposed: bool) -> Kind:
    if node.domain not in ("", "ai.onnx"):
        return "other"
    if node.op_type == "MatMul" and index == 1:
        return "matmul"
    if node.op_type == "Gather" and index == 0 and not transposed and node.attributes.get_int("axis", 0) == 0:
        return "gather"
    return "other"


def replace_use(graph: ir.Graph, use: WeightUse, weight: LazyParts, accuracy_level: int) -> None:
    """Puts the quantized node in the place of `use.node`; the float initializer goes once nobody reads it.

    Args:
        graph: the graph that holds the node, changed in place.
        use: a MatMul or a Gather; a Gather's K is a multiple of the block.
        weight: the quantized weight.
        accuracy_level: of MatMulNBits: 4 lets the kernel round activations to int8 (fast on CPU), 0 keeps them.
    """
    if weight.scheme.activations == INT8:
        nodes = integer_matmul(graph, use.node, weight.scheme, _initializers(graph, use, weight), use.module)
    elif use.kind == "matmul":
        nodes = [_matmul(graph, use, weight, accuracy_level)]
    else:
        nodes = [_gather(graph, use, weight)]
    for new in nodes:
        new.metadata_props.update(use.node.metadata_props)
        new.meta.update(use.node.meta)
    ir.convenience.replace_nodes_and_values(
        graph, use.node, [use.node], nodes, list(use.node.outputs), list(nodes[-1].outputs)
    )
    if use.transpose is not None and not use.transpose.outputs[0].uses():
        graph.remove(use.transpose, safe=True)
    name = str(use.value.name)
    if name in graph.initializers and not use.value.uses():
        del graph.initializers[name]
    graph.opset_imports.setdefault(CONTRIB, 1)


def scale_inputs(graph: ir.Graph, uses: Sequence[WeightUse], scale: Floats) -> None:
    """Divides what products read by `scale`, once for all of them; their weights are to be multiplied by it.

    The Mul by the reciprocals stands in front of the first of the products. To be called before any is replaced.

    Args:
        graph: the graph that holds the nodes, changed in place.
        uses: MatMuls that read the same activations [..., K].
        scale: float32 [K], as `quantize.awq.input_scale` chooses it: its reciprocals are exact in every type.

    Raises:
        ValueError: a use is no MatMul, reads other activations than the first, or has not K inputs.
    """
    read = uses[0].node.inputs[0]
    if read is None or any(use.kind != "matmul" or use.node.inputs[0] is not read for use in uses):
        raise ValueError(f"{uses[0].path} and others are no products of the same activations")
    if any(use.source.shape[1] != len(scale) for use in uses):
        raise ValueError(f"{uses[0].path} and others have not {len(scale)} inputs")
    kind, name = uses[0].source.tensor.dtype, f"{uses[0].module}.input_scale"
    tensor = ir.tensor((np.float32(1) / scale).astype(kind.numpy()), dtype=kind, name=name)
    factor = ir.Value(name=name, shape=ir.Shape(scale.shape), type=ir.TensorType(kind), const_value=tensor)
    graph.register_initializer(factor)
    scaled = ir.node("Mul", [read, factor], name=f"{uses[0].module}/input_scale")
    output = scaled.outputs[0]
    output.name, output.shape, output.type = f"{uses[0].module}.scaled_input", read.shape, read.type
    place = {node: index for index, node in enumerate(graph)}
    nodes = [use.node for use in uses]
    scaled.metadata_props.update(nodes[0].metadata_props)
    scaled.meta.update(nodes[0].meta)
    graph.insert_before(min(nodes, key=place.__getitem__), scaled)
    for node in nodes:
        node.replace_input_with(0, output)


def _matmul(graph: ir.Graph, use: WeightUse, weight: LazyParts, accuracy_level: int) -> ir.Node:
    rows, columns = weight.source.shape
    attributes = {"K": columns, "N": rows, "bits": weight.scheme.bits, "block_size": weight.scheme.block_size}
    if accuracy_level:
        attributes["accuracy_level"] = accuracy_level
    inputs = [use.node.inputs[0], *_initializers(graph, use, weight)]
    return _node("MatMulNBits", inputs, attributes, use.node)


def _gather(graph: ir.Graph, use: WeightUse, weight: LazyParts) -> ir.Node:
    attributes = {
        "bits": weight.scheme.bits,
        "block_size": weight.scheme.block_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    data, *grid = _initializers(graph, use, weight)
    return _node("GatherBlockQuantized", [data, use.node.inputs[1], *grid], attributes, use.node)


def _node(op_type: str, inputs: list[ir.Value | None], attributes: dict[str, int], old: ir.Node) -> ir.Node:
    integers = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    return ir.Node(CONTRIB, op_type, inputs, integers, num_outputs=1, name=old.name)


def _initializers(graph: ir.Graph, use: WeightUse, weight: LazyParts) -> list[ir.Value | None]:
    """Codes, scales and, if asymmetric, zero points, registered next to each other so that they are written so."""
    names = {"codes": "weight_q", "scales": "weight_scales", "zero_points": "weight_zero_points"}
    values: list[ir.Value | None] = []
    for part, shape in weight.shapes.items():
        if part == "codes" and use.kind == "gather":
            shape = (shape[0], shape[1] * shape[2])
        name = f"{use.module}.{names[part]}"
        if name not in graph.initializers:
            tensor = weight.tensor(name, part, shape)
            kind = ir.TensorType(tensor.dtype)
            graph.register_initializer(ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor))
        values.append(graph.initializers[name])
    return values
