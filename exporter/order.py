"""The order in which a graph's weights are written: the one in which they lie in the source.

A shard of a checkpoint is then read from its beginning to its end, once, and is not needed any more. That is what lets
shards be fetched while the export runs, and removed behind it.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

ORIGIN = "origin"
Origin = tuple[str, int]  # a file's name, and an offset in bytes
_NOWHERE: Origin = ("", -1)


def origin_of(tensor: ir.TensorProtocol | None) -> Origin | None:
    """Where a tensor's bytes come from, or those that it is computed from; None for what is not read from a file."""
    if tensor is None:
        return None
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.location), tensor.offset or 0
    origin: Origin | None = tensor.meta.get(ORIGIN)
    return origin


def in_source_order(values: Iterable[ir.Value]) -> list[ir.Value]:
    """Initializers by the place of their tensors in the source; those without one first, equal ones as they come."""
    return sorted(values, key=lambda value: origin_of(value.const_value) or _NOWHERE)
