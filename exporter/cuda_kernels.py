"""Where ONNX Runtime would run each node of a graph for CUDA, told from a table of its kernels.

No device is needed for it. Nodes that work on shapes run on the CPU by ONNX Runtime's own choice: those whose inputs
are all there, or are inputs of the graph or small constants. A node without a kernel that reads what lies on the device
falls back to the CPU, and its inputs are copied there and its results back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from exporter.cuda_table import HOST_INPUTS, HOST_RESULTS, KERNELS, SIGNATURES, Kernel, Signature

SMALL = 100  # values of a constant that may be read on the CPU instead
_HALVES = ("float16", "bfloat16")
_OFFSET = len("tensor(")


@dataclass(frozen=True)
class Fallback:
    """A node that runs on the CPU although it reads what lies on the device.

    Attributes:
        node: its name.
        op_type: its operator.
        why: what there is no kernel for.
    """

    node: str
    op_type: str
    why: str


@dataclass
class Placement:
    """Where the nodes of a graph run.

    Attributes:
        device, host: names of nodes with a kernel on the device, and of those on the CPU that work on shapes.
        fallbacks: nodes that should have had one.
        to_host, to_device: values that are copied between the two in every run, and the node that reads each.
    """

    device: list[str] = field(default_factory=list)
    host: list[str] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    to_host: list[tuple[str, str]] = field(default_factory=list)
    to_device: list[tuple[str, str]] = field(default_factory=list)

    @property
    def capturable(self) -> bool:
        """Whether a run can be recorded as a CUDA graph: nothing falls back and nothing is copied."""
        return not self.fallbacks and not self.to_host and not self.to_device


def place(graph: ir.Graph) -> Placement:
    """Says where each node of a graph would run; constants that nodes compute are folded before and left out."""
    placement = Placement()
    types = types_of(graph)
    constant: set[ir.Value] = set()
    on_host: set[ir.Value] = set()
    inputs = set(graph.inputs)
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        why = _missing(node, graph.opset_imports.get("", 1), types)
        if read and all(value in constant or _is_constant(value, inputs) for value in read):
            constant.update(node.outputs)
            continue
        if _works_on_shapes(node, on_host, constant, inputs, types) or (
            why and all(value in on_host or value in constant or _is_constant(value, inputs) for value in read)
        ):
            placement.host.append(node.name or node.op_type)
            on_host.update(node.outputs)
            continue
        if why:
            placement.fallbacks.append(Fallback(node.name or node.op_type, node.op_type, why))
            continue
        placement.device.append(node.name or node.op_type)
        if (node.domain, node.op_type) in HOST_RESULTS:
            on_host.update(node.outputs)
    _note_copies(graph, placement, on_host, constant)
    return placement


def types_of(graph: ir.Graph) -> dict[ir.Value, str]:
    """The types of all values, those that no pass has noted too, by ONNX Runtime's names ("float16", "int64")."""
    ends = (*graph.inputs, *graph.initializers.values())
    types = {value: _name(value.dtype) for value in ends if value.dtype is not None}
    for node in graph:
        signature, _ = _signature(node, graph.opset_imports.get("", 1))
        if signature is not None:
            _note_types(node, signature, _bind(node, signature, types), types)
    return types


def notes(models: Mapping[str, ir.Model]) -> tuple[str, ...]:
    """What users of graphs for CUDA should know of nodes that would run on the CPU, a sentence for each graph."""
    found = []
    for name, model in models.items():
        fallbacks = place(model.graph).fallbacks
        if fallbacks:
            first = f"{fallbacks[0].node} ({fallbacks[0].why})"
            found.append(f"{len(fallbacks)} nodes of {name} have no CUDA kernel and run on the CPU: {first} the first.")
    return tuple(found)


def _is_constant(value: ir.Value, inputs: set[ir.Value]) -> bool:
    return value.is_initializer() and value not in inputs


def _note_copies(graph: ir.Graph, placement: Placement, on_host: set[ir.Value], constant: set[ir.Value]) -> None:
    """Copies between nodes; those of inputs of the graph are the caller's, who chooses where they lie."""
    host = set(placement.host) | {fallback.node for fallback in placement.fallbacks}
    inputs = set(graph.inputs)
    for node in graph:
        name = node.name or node.op_type
        if any(output in constant for output in node.outputs):
            continue
        wanted = HOST_INPUTS.get((node.domain, node.op_type), frozenset())
        for i, value in enumerate(node.inputs):
            if value is None or value in inputs or value in constant or value.is_initializer():
                continue
            lies_on_host = value in on_host or _producer(value) in {fallback.node for fallback in placement.fallbacks}
            reads_on_host = name in host or i in wanted
            if lies_on_host and not reads_on_host and node.op_type != "Shape":
                placement.to_device.append((str(value.name), name))
            if reads_on_host and not lies_on_host:
                placement.to_host.append((str(value.name), name))


def _producer(value: ir.Value) -> str:
    node = value.producer()
    return (node.name or node.op_type) if node is not None else ""


def _works_on_shapes(
    node: ir.Node, on_host: set[ir.Value], constant: set[ir.Value], inputs: set[ir.Value], types: Mapping[ir.Value, str]
) -> bool:
    """ONNX Runtime's rule for nodes that it leaves to the CPU although there is a kernel."""
    read = [(i, value) for i, value in enumerate(node.inputs) if value is not None]
    if not any(value in on_host for _, value in read) or any(types.get(value) in _HALVES for _, value in read):
        return False
    wanted = HOST_INPUTS.get((node.domain, node.op_type), frozenset())
    for i, value in read:
        if value in inputs or value in constant or _is_small(value):
            continue
        if value not in on_host or i in wanted:
            return False
    return True


def _is_small(value: ir.Value) -> bool:
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and tensor.size <= SMALL


def _missing(node: ir.Node, version: int, types: Mapping[ir.Value, str]) -> str:
    """Why there is no kernel for a node, empty if there is."""
    key = (node.domain, node.op_type)
    signature, changed = _signature(node, version)
    if signature is None:
        return f"{node.op_type} is not known"
    bound = _bind(node, signature, types)
    known = KERNELS.get(key)
    if known is None:
        return f"there is no kernel for {node.op_type}"
    serving = tuple(kernel for kernel in known if kernel.serves(changed))
    if not serving:
        return f"there is a kernel for {node.op_type}, but for another version than {changed}"
    if any(_fits(kernel, bound) for kernel in serving):
        return ""
    held = ", ".join(f"{variable} = {name}" for variable, name in sorted(bound.items()))
    return f"the kernel for {node.op_type} does not take {held}"


def _fits(kernel: Kernel, bound: Mapping[str, str]) -> bool:
    for variable, name in bound.items():
        allowed = kernel.types.get(variable)
        if allowed is not None and name not in allowed.split():
            return False
    return not kernel.combinations or (bound.get("T", ""), bound.get("V", "")) in kernel.combinations


def _signature(node: ir.Node, version: int) -> tuple[Signature | None, int]:
    """Types of a node's inputs and outputs by their variables, and the version that its operator last changed with."""
    own = SIGNATURES.get((node.domain, node.op_type))
    if own is not None or node.domain:
        return own, 1
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return None, 1
    inputs, outputs = [x.type_str for x in schema.inputs], [x.type_str for x in schema.outputs]
    only = {c.type_param_str: c.allowed_type_strs[0] for c in schema.type_constraints if len(c.allowed_type_strs) == 1}
    variadic = schema.inputs and schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    inputs += [inputs[-1]] * (len(node.inputs) - len(inputs)) if variadic else []
    outputs += [outputs[-1]] * max(0, len(node.outputs) - len(outputs))
    return Signature(tuple(inputs), tuple(only.get(name, name) for name in outputs)), schema.since_version


def _bind(node: ir.Node, signature: Signature, types: Mapping[ir.Value, str]) -> dict[str, str]:
    """Type variable → type, as far as the inputs say."""
    bound: dict[str, str] = {}
    for variable, value in zip(signature.inputs, node.inputs, strict=False):
        if value is not None and value in types and not variable.startswith("tensor("):
            bound.setdefault(variable, types[value])
    if node.op_type == "Cast" and "to" in node.attributes:
        bound["T2"] = _name(ir.DataType(node.attributes["to"].as_int()))
    return bound


def _note_types(node: ir.Node, signature: Signature, bound: Mapping[str, str], types: dict[ir.Value, str]) -> None:
    for variable, value in zip(signature.outputs, node.outputs, strict=False):
        if variable.startswith("tensor("):
            types[value] = variable[_OFFSET:-1]
        elif variable in bound:
            types[value] = bound[variable]
        elif value.dtype is not None:
            types[value] = _name(value.dtype)


def _name(kind: ir.DataType) -> str:
    return {"FLOAT": "float", "DOUBLE": "double"}.get(kind.name, kind.name.lower())
