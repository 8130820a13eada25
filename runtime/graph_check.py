"""What is looked at in a graph's file before ONNX Runtime sees it; a bundle may come from anybody.

The manifest's hashes say whether a file is what the bundle's maker wrote, not whether the maker was honest. So all that
follows holds for files whose hashes are right as well: operators are those of a list, tensors lie in the graph's own
data files and nowhere else, inside them, apart from one another and as long as their shapes say, and the parts of
quantized weights fit each other and have finite scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from model.bundle import GraphInfo, TensorInfo, bundle_path
from model.bundle_files import ordinary_size
from model.errors import BundleError, EnvironmentFault, printable
from runtime.finite import FLOATS, Extent, first_not_finite
from runtime.onnx_file import read_onnx
from runtime.onnx_parts import BITS, ExternalData, Initializer, Node, OnnxFile, Value
from runtime.operators import ALLOWED, NEWEST_OPSET

_MATMUL, _GATHER, _PRODUCT = (
    f"com.microsoft.{op}" for op in ("MatMulNBits", "GatherBlockQuantized", "MatMulIntegerToFloat")
)
# Operators with quantized weights → which inputs are scales.
SCALES: Final[Mapping[str, tuple[int, ...]]] = {
    _MATMUL: (2,), _GATHER: (2,),
    "com.microsoft.MatMulIntegerToFloat": (2, 3), "com.microsoft.DynamicQuantizeMatMul": (2,),
    "DequantizeLinear": (1,), "QuantizeLinear": (1,), "com.microsoft.GroupQueryAttention": (12, 13),
}  # fmt: skip
# In the name of a data file it makes ONNX Runtime take the offset for an address in memory.
_ADDRESS: Final = "_ORT_MEM_ADDR_"
_MOST_HEADS: Final = 1 << 16
_UINT8: Final = 2
_FLOATS: Final = {1: 4, 10: 2, 16: 2}
_KINDS: Final = {
    "float32": 1, "float": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "double": 11,
    "float64": 11, "bfloat16": 16,
}  # fmt: skip
# What ONNX Runtime says of a graph that is newer than itself: the graph's version, and the latest that it knows.
_NEWER: Final = (
    ("opset", re.compile(r"Opset (\d+) is under development.* till opset (\d+)")),
    ("IR version", re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")),
)


def check_graph(folder: Path, graph: GraphInfo) -> OnnxFile:
    """Reads a graph's structure and the scales of its quantized weights, and refuses what no exported graph has.

    Args:
        folder: the bundle, whose files have the sizes that its manifest says.
        graph: its entry in the manifest.

    Returns:
        The structure.

    Raises:
        BundleError: says what is wrong.
        EnvironmentFault: the graph is newer than the list of operators.
    """
    found = read_onnx(bundle_path(folder, graph.file))
    opset, unknown = found.opsets.get("", 0), sorted(found.ops.keys() - ALLOWED)
    if opset > NEWEST_OPSET and unknown:
        why = f"it is written in opset {opset} and holds {printable(unknown[0], 60)!r}, known is up to {NEWEST_OPSET}"
        raise EnvironmentFault("cannot load graph", graph.file, why, "Upgrade exaone-export and onnxruntime")
    if foreign := _foreign_problem(found):
        raise BundleError("refusing bundle", graph.file, foreign, "Do not use this bundle")
    if why := structure_problem(folder, graph, found) or scale_problem(folder, graph, found):
        raise BundleError("damaged bundle", graph.file, why, "Export or copy the bundle again")
    return found


def structure_problem(folder: Path, graph: GraphInfo, found: OnnxFile) -> str:
    """What in a graph is not as in an exported one; empty for nothing. No weight is read."""
    return (
        _foreign_problem(found)
        or _place_problem(folder, graph, found)
        or next(_weight_problems(found), "")
        or _interface_problem(graph, found)
    )


def _foreign_problem(found: OnnxFile) -> str:
    foreign = sorted(found.ops.keys() - ALLOWED)
    if foreign:
        return f"it holds the operator {printable(foreign[0], 60)!r}, which no exported graph has"
    return "it brings functions of its own" if found.functions else ""


def _interface_problem(graph: GraphInfo, found: OnnxFile) -> str:
    """An input or output that is not as the manifest says: by name, type, or a size that both know."""
    for side, declared, actual in (("inputs", graph.inputs, found.inputs), ("outputs", graph.outputs, found.outputs)):
        names = {tensor.name for tensor in declared}
        differing = dict.fromkeys(names ^ {n for n in actual if n not in found.initializers or n in names}, "name")
        for tensor in declared:
            if tensor.name not in differing:
                optional = side == "inputs" and tensor.name in found.initializers
                what = _difference(tensor, actual[tensor.name])
                differing |= {tensor.name: what} if what else {}
                differing |= {tensor.name: "default"} if tensor.optional != optional else {}
        for name, what in sorted(differing.items()):
            return f"{side} are not those of the manifest ({printable(name, 60)!r} differs: its {what})"
    return ""


def _difference(tensor: TensorInfo, value: Value) -> str:
    """In what an input or output is not as the manifest says; sizes count where both know them."""
    sizes = [*zip(tensor.shape, value.shape, strict=False)]
    if any(isinstance(one, int) and other is not None and one != other for one, other in sizes):
        return "size"
    if len(tensor.shape) != len(value.shape):
        return "rank"
    dtype = tensor.dtype.removeprefix("tensor(").removesuffix(")").lower()
    return "" if _KINDS.get(dtype) == value.kind else "type"


def data_file(graph: GraphInfo, location: str) -> str:
    """The bundle's name of a data file that a graph names from where it lies itself."""
    return (PurePosixPath(graph.file).parent / location).as_posix()


def _place_problem(folder: Path, graph: GraphInfo, found: OnnxFile) -> str:
    """Whether tensors lie outside the data files, over one another, or take more or fewer bytes than their shapes."""
    sizes: dict[str, int] = {}
    before = ExternalData("", "", 0, 0)
    for data in sorted(found.external, key=lambda data: (data.location, data.offset, data.length)):
        shown, name = printable(data.tensor, 60), data_file(graph, data.location)
        plain = data.location == PurePosixPath(data.location).as_posix() and _ADDRESS not in data.location
        if not plain or name not in graph.data:
            return f"{shown!r} lies in {printable(data.location, 60)!r}, which is not the graph's data file"
        if name not in sizes:
            size = ordinary_size(bundle_path(folder, name))
            if isinstance(size, str):
                return f"its data file {name}: {size}"
            sizes[name] = size
        if data.offset + data.length > sizes[name]:
            return f"{shown!r} lies beyond the end of {name}"
        tensor = found.initializers[data.tensor]
        if data.length != tensor.nbytes:
            return f"{shown!r} takes {data.length} bytes, its shape {tensor.nbytes}"
        if data.offset % max(1, BITS[tensor.kind] // 8):
            return f"{shown!r} begins in the middle of a number"
        # A tied weight has two names for the same bytes.
        same = (data.offset, data.length) == (before.offset, before.length)
        if data.location == before.location and data.offset < before.offset + before.length and not same:
            return f"{shown!r} and {printable(before.tensor, 60)!r} overlap in {name}"
        before = data
    return ""


def _weight_problems(found: OnnxFile) -> Iterator[str]:
    """Quantized weights whose parts do not fit each other."""
    for node in found.nodes:
        for name, heads in node.numbers.items():
            if name.endswith("num_heads") and not 0 <= heads <= _MOST_HEADS:  # ONNX Runtime divides by the low 32 bits
                yield f"{printable(node.op, 60)} with {heads} heads"
        parts = [found.initializers.get(name) for name in node.inputs] + [None] * 6
        if node.op == _MATMUL:
            why = _matmul_problem(node, parts)
        elif node.op == _GATHER:
            why = _gather_problem(node, parts)
        else:
            continue
        if why:
            yield f"{printable(next(filter(None, node.inputs[1:2] or ('',)), ''), 60)!r}: {why}"


def _matmul_problem(node: Node, parts: list[Initializer | None]) -> str:
    rows, columns, bits, size = (node.numbers.get(name, 0) for name in ("N", "K", "bits", "block_size"))
    codes, scales, zeros = parts[1:4]
    if len(node.inputs) > 4 and node.inputs[4]:
        return "its columns are in another order (g_idx)"
    if bits not in (2, 4, 8) or size < 16 or size & (size - 1) or not 0 < rows < 1 << 31 or not 0 < columns < 1 << 31:
        return f"{rows} x {columns} weights of {bits} bits in blocks of {size}"
    if codes is None or scales is None or (len(node.inputs) > 3 and node.inputs[3] and zeros is None):
        return "its codes, scales or zero points are computed"
    blocks = -(-columns // size)
    if codes.kind != _UINT8 or codes.nbytes != rows * blocks * (size * bits // 8):
        return f"its codes have the shape {list(codes.shape)}"
    if scales.kind not in _FLOATS or scales.nbytes != rows * blocks * _FLOATS[scales.kind]:
        return f"its scales have the shape {list(scales.shape)}, {rows * blocks} are needed"
    # Zero points that are packed like codes cannot be out of range; those of other types can, and are not written.
    if zeros is not None and (zeros.kind != _UINT8 or zeros.nbytes != rows * -(-blocks * bits // 8)):
        return f"its zero points have the shape {list(zeros.shape)} or another type than uint8"
    return ""


def _gather_problem(node: Node, parts: list[Initializer | None]) -> str:
    codes, scales, zeros = parts[0], parts[2], parts[3]
    bits, size = node.numbers.get("bits", 4), node.numbers.get("block_size", 128)
    if codes is None or scales is None or len(codes.shape) != 2 or len(scales.shape) != 2:
        return "its codes or scales are computed, or no matrices"
    if bits not in (4, 8) or size < 16 or size & (size - 1) or codes.kind != _UINT8:
        return f"codes of {bits} bits in blocks of {size}"
    rows, blocks = scales.shape
    columns = codes.shape[1] * 8 // bits
    if codes.shape[0] != rows or blocks != -(-columns // size) or scales.kind not in _FLOATS:
        return f"its scales have the shape {list(scales.shape)}, its codes {list(codes.shape)}"
    if zeros is not None and (zeros.kind != _UINT8 or zeros.nbytes != rows * -(-blocks * bits // 8)):
        return f"its zero points have the shape {list(zeros.shape)} or another type than uint8"
    return ""


def scale_problem(folder: Path, graph: GraphInfo, found: OnnxFile) -> str:
    """The first scale of a quantized weight that is NaN or infinite, which no kernel minds; empty for none.

    Negative scales are ordinary: they let a block use the code that has no counterpart of the other sign.
    """
    names = scale_names(found)
    for name, tensor in ((name, found.initializers[name]) for name in sorted(names)):
        if tensor.kind in FLOATS and tensor.nbytes and tensor.place is None and tensor.inside == (0, 0):
            return f"{printable(name, 60)!r} has a scale that is written as a whole number"
    try:
        bad = first_not_finite(float_extents(folder, graph, found, names))
    except OSError as reason:
        return reason.strerror or "its data cannot be read"
    return f"{printable(bad.name, 60)!r} has scales that are NaN or infinite" if bad else ""


def scale_names(found: OnnxFile) -> set[str]:
    """Names of stored tensors that are scales of quantized weights."""
    used = {node.inputs[place] for node in found.nodes for place in SCALES.get(node.op, ()) if place < len(node.inputs)}
    return used & found.initializers.keys()


def float_extents(folder: Path, graph: GraphInfo, found: OnnxFile, names: Iterable[str]) -> list[Extent]:
    """Where the named tensors that are floats lie, in the order in which they are best read."""
    extents = []
    for name in names:
        tensor = found.initializers[name]
        if tensor.kind not in FLOATS or not tensor.nbytes:
            continue
        if tensor.place is None:
            path, offset = bundle_path(folder, graph.file), tensor.inside[0]
            if tensor.inside == (0, 0):  # one number of two bytes, written as a whole number
                continue
        else:
            path, offset = bundle_path(folder, data_file(graph, tensor.place.location)), tensor.place.offset
        extents.append(Extent(name, path, offset, tensor.nbytes, tensor.kind))
    return sorted(extents, key=lambda extent: (str(extent.path), extent.offset))


def too_new(graph: GraphInfo, said: str, version: str) -> EnvironmentFault | None:
    """The error for what ONNX Runtime of this version says of a graph, if that is that the graph is newer than it."""
    for what, pattern in _NEWER:
        if match := pattern.search(" ".join(said.split())):
            why = f"onnxruntime {version} is too old for it: {what} {match[1]}, known is up to {match[2]}"
            return EnvironmentFault("cannot load graph", graph.file, why, "Upgrade onnxruntime")
    return None
