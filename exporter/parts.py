"""What a graph's weights are written in: parts, each of which is finished or not, but never half-finished.

A part is one weight: its consecutive large initializers (codes, scales and zero points of a quantized one; the only one
of a float one). Small tensors that stand before it, and its own, go along, so that the part depends on no later one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from exporter.bind import READS, WEIGHT
from exporter.order import in_source_order

INLINE_BYTES = 1024  # smaller tensors stay inside the .onnx file


@dataclass
class Part:
    """Initializers that are written together.

    Attributes:
        name: "<graph>/<first of them>".
        small: lazy ones that go into the .onnx file.
        large: those that go into the data file.
    """

    name: str
    small: list[ir.Value] = field(default_factory=list)
    large: list[ir.Value] = field(default_factory=list)

    def reads(self) -> frozenset[Path] | None:
        """The source files that its tensors are read from; None if a tensor does not say."""
        files: set[Path] = set()
        for value in (*self.small, *self.large):
            tensor = tensor_of(value)
            if READS in tensor.meta:
                files.update(tensor.meta[READS])
            elif isinstance(tensor, ir.LazyTensor):
                return None
        return frozenset(files)


def split(graph: str, model: ir.Model) -> list[Part]:
    """A graph's parts, in the order in which the source has them."""
    parts: list[Part] = []
    waiting: list[ir.Value] = []
    weight: object = None
    for value in in_source_order(model.graph.initializers.values()):
        tensor = tensor_of(value)
        mine = tensor.meta.get(WEIGHT)
        joins = mine is not None and mine == weight
        if is_large(tensor):
            if not joins:
                parts.append(Part(f"{graph}/{value.name}", small=waiting))
                waiting, weight = [], mine
            parts[-1].large.append(value)
        elif isinstance(tensor, ir.LazyTensor):
            (parts[-1].small if joins else waiting).append(value)
    if waiting:
        parts.append(Part(f"{graph}/{waiting[0].name}", small=waiting))
    return parts


def digest(parts: Iterable[Part]) -> str:
    """A hash of the parts' names, types and shapes."""
    listing = [
        [part.name, *([str(value.name), tensor_of(value).dtype.name, _shape(value)] for value in initializers)]
        for part in parts
        for initializers in (part.small, part.large)
    ]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def last_reads(parts: list[Part]) -> dict[str, set[Path]]:
    """Part → the files that no later part reads; a part that does not say which it reads may read any."""
    last: dict[Path, str] = {}
    every = {path for part in parts for path in part.reads() or ()}
    for part in parts:
        reads = part.reads()
        last |= dict.fromkeys(every if reads is None else reads, part.name)
    done: dict[str, set[Path]] = {}
    for path, name in last.items():
        done.setdefault(name, set()).add(path)
    return done


def total_bytes(parts: Iterable[Part]) -> int:
    """Bytes of the large tensors."""
    return sum(tensor_of(value).nbytes for part in parts for value in part.large)


def is_large(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor goes into the data file."""
    return tensor.nbytes > INLINE_BYTES


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """An initializer's tensor."""
    if value.const_value is None:
        raise ValueError(f"the initializer {value.name} has no value")
    return value.const_value


def _shape(value: ir.Value) -> list[int]:
    return [int(size) for size in tensor_of(value).shape.numpy()]
