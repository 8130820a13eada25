"""What of an ``.onnx`` file is kept when it is read: see `runtime.onnx_file`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

# Bits of a value of each of ONNX's types that has a size.
BITS: Final = (
    dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8)
    | dict.fromkeys((4, 5, 10, 16), 16)
    | dict.fromkeys((1, 6, 12), 32)
    | dict.fromkeys((7, 11, 13, 14), 64)
    | {15: 128}
    | dict.fromkeys((21, 22, 23), 4)
    | dict.fromkeys((25, 26), 2)
)


@dataclass(frozen=True)
class ExternalData:
    """Where a tensor's bytes lie: `length` bytes at `offset` of the file `location`."""

    tensor: str
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class Initializer:
    """A tensor that the graph holds.

    Attributes:
        shape: its dimensions.
        nbytes: what they and its type come to.
        kind: ONNX's number of its type.
        place: where its bytes lie in another file; None where they are in the graph's own.
        inside: first byte in the graph's own file, and the one behind the last.
    """

    shape: tuple[int, ...]
    nbytes: int
    kind: int = 0
    place: ExternalData | None = None
    inside: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Node:
    """An operator, with its domain where that is not ONNX's own, its inputs' names, "" where one is left out, and the
    attributes of it that are whole numbers, which are unsigned here.
    """

    op: str
    inputs: tuple[str, ...]
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """An input or output of a graph: ONNX's number of its type, and its sizes, None where they are free."""

    kind: int
    shape: tuple[int | None, ...]


@dataclass
class OnnxFile:
    """One graph file.

    Attributes:
        ops: operator → number of nodes, subgraphs included; with its domain where that is not ONNX's own.
        functions: number of functions the file brings along.
        external: tensors that lie in other files.
        nodes: all of them, subgraphs included.
        initializers: by name, those of subgraphs included.
        inputs, outputs: of the graph itself, by name; initializers may be among the inputs.
        ir_version: of the format.
        opsets: domain → version of its operators.
    """

    ops: dict[str, int] = field(default_factory=dict)
    functions: int = 0
    external: list[ExternalData] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    initializers: dict[str, Initializer] = field(default_factory=dict)
    inputs: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    ir_version: int = 0
    opsets: dict[str, int] = field(default_factory=dict)
