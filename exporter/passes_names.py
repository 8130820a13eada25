"""Passes on names and annotations: readable, the same on every machine, and without traces of the tracing."""

from __future__ import annotations

import ast
import re
from collections import Counter

import onnx_ir as ir

LAYER = "layer_ann"  # the key ONNX Runtime assigns layers to devices by
_SCOPES = "pkg.torch.onnx.name_scopes"
SYMBOLS = "exaone.symbols"  # the tracer's names of an input's or output's dimensions
_PATH = "exaone.path"
_LAYER_PATH = re.compile(r"^(?:layers|blocks)\.\d+")
_HEAD_PATH = re.compile(r"^(?:norm|lm_head|merger)(?:\.|$)")


def label_layers(model: ir.Model) -> int:
    """Stamps `layer_ann` on every node: "layers.N", "blocks.N", "embed" before them and "head" after."""
    nodes = list(model.graph)
    labels = [_layer_of(_path(node)) for node in nodes]
    numbered = [i for i, label in enumerate(labels) if label not in ("", "head")]
    first, last = (numbered[0], numbered[-1]) if numbered else (len(nodes), -1)
    current = "embed"
    for i, node in enumerate(nodes):
        if labels[i]:
            current = labels[i]
        elif i < first:
            current = "embed"
        elif i > last:
            current = "head" if numbered else "embed"
        node.metadata_props[LAYER] = current
        for inner in (inner for graph in _subgraphs(node) for inner in graph):
            inner.metadata_props[LAYER] = current
    return len(nodes)


def name_nodes(model: ir.Model) -> int:
    """Names nodes by module and operator, their results and the constants alike; counts nodes."""
    taken: Counter[str] = Counter()
    _name_constants(model.graph, "constant")
    for node in model.graph:
        _name_node(node, _path(node) or node.metadata_props.get(LAYER, ""), taken)
        for graph in _subgraphs(node):
            _name_constants(graph, f"{node.name}/constant")
            for value in graph.inputs:
                value.name = f"{node.name}/{value.name}"
            for inner in graph:
                _name_node(inner, node.name or "", taken)
            for value in graph.outputs:
                value.name = f"{node.name}/{value.name}"
    return sum(taken.values())


def name_shapes(model: ir.Model) -> int:
    """Carries the inputs' names of free dimensions through the graph; what has no name stays free and unnamed."""
    names = _dimension_names(model.graph)
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    declared = {size for value in model.graph.inputs for size in _free(value)}
    changed = 0
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.shape is None or id(value) in ends:
                continue
            sizes = [
                size if isinstance(size, int) else names.get(str(size.value), _known(size, declared))
                for size in value.shape
            ]
            value.shape = ir.Shape(sizes)
            changed += 1
    return changed


def forget_tracing(model: ir.Model) -> int:
    """Removes torch's notes (source lines, paths, signatures) everywhere; counts what had some."""
    found = 0
    for owner in (model, model.graph):
        found += bool(owner.metadata_props) or bool(owner.doc_string)
        owner.metadata_props.clear()
        owner.doc_string = None
    model.producer_name, model.producer_version = "exaone-export", None
    for node in model.graph.all_nodes():
        found += len(node.metadata_props) > 1
        kept = {LAYER: node.metadata_props[LAYER]} if LAYER in node.metadata_props else {}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        for key in [key for key in value.metadata_props if key.startswith("pkg.")]:
            del value.metadata_props[key]
    return found


def _path(node: ir.Node) -> str:
    """Path of the module that a node was traced in, e.g. "layers.0.self_attn.q_proj"."""
    known = node.metadata_props.get(_PATH)
    if known is not None:
        return known
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    path = str(scopes[-2]) if len(scopes) > 1 else ""
    node.metadata_props[_PATH] = path
    return path


def _layer_of(path: str) -> str:
    match = _LAYER_PATH.match(path)
    if match:
        return match.group()
    return "head" if _HEAD_PATH.match(path) else ""


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def _name_node(node: ir.Node, path: str, taken: Counter[str]) -> None:
    name = f"{path}/{node.op_type}" if path else node.op_type
    taken[name] += 1
    node.name = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"
    for i, value in enumerate(node.outputs):
        if not value.is_graph_output():
            value.name = f"{node.name}_output_{i}"


def _name_constants(graph: ir.Graph, name: str) -> None:
    constants = [
        value for value in graph.initializers.values() if value.const_value is not None and not value.is_graph_input()
    ]
    for value in constants:
        del graph.initializers[str(value.name)]
    for i, value in enumerate(constants):
        value.name = f"{name}_{i}"
        graph.initializers[value.name] = value


def _free(value: ir.Value) -> list[str]:
    return [str(size.value) for size in value.shape or () if not isinstance(size, int)]


def _known(size: ir.SymbolicDim, declared: set[str]) -> str | None:
    return str(size.value) if str(size.value) in declared else None


def _dimension_names(graph: ir.Graph) -> dict[str, str]:
    """The tracer's expressions of free dimensions → our names, as noted on inputs and outputs."""
    names: dict[str, str] = {}
    for value in (*graph.inputs, *graph.outputs):
        symbols = value.metadata_props.pop(SYMBOLS, "")
        for size, symbol in zip(value.shape or (), symbols.split("|"), strict=False):
            if not isinstance(size, int) and size.value is not None:
                names.setdefault(symbol, str(size.value))
    return names
