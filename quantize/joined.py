"""The initializers of joined products: tensors one behind the other, whose bytes are their members'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.bind import DEDUP, READS, transposed_panels
from exporter.order import ORIGIN, origin_of
from quantize.columns import ROWS
from quantize.scheme import AnyArray


class JoinedTensor(ir.LazyTensor):
    """Tensors of one type one behind the other, along one axis.

    Along the first axis they are written member by member. Along the second they share rows, and are in memory
    together while they are written.

    Args:
        members: tensors that agree in all axes but that one.
        name: of the initializer.
        axis: 0, or 1 for matrices.

    Attributes:
        meta: as far as the members know it, which tensors are the same, and where their bytes come from.
    """

    __slots__ = ("_axis", "_members")

    def __init__(self, members: Sequence[ir.TensorProtocol], name: str, axis: int = 0) -> None:
        shape = list(shape_of(members[0]))
        shape[axis] = sum(shape_of(member)[axis] for member in members)
        super().__init__(self._evaluate, members[0].dtype, ir.Shape(shape), name=name)
        self._members = tuple(members)
        self._axis = axis
        if all(DEDUP in member.meta for member in members):
            self.meta[DEDUP] = "joined " + " & ".join(str(member.meta[DEDUP]) for member in members)
        origins = [origin for member in members if (origin := origin_of(member)) is not None]
        if origins:  # it is written when the source has come to its last member
            self.meta[ORIGIN] = max(origins)
        if all(READS in member.meta for member in members):
            self.meta[READS] = tuple(dict.fromkeys(file for member in members for file in member.meta[READS]))

    def tofile(self, file: Any) -> None:
        """Writes the members' bytes."""
        if self._axis:
            for panel in transposed_panels(self._turned(), self.dtype.numpy()):
                file.write(panel.view(np.uint8).data)
            return
        for member in self._members:
            writer: Any = member  # every class has `tofile`, the protocol does not yet
            writer.tofile(file)

    def _evaluate(self) -> ir.TensorProtocol:
        whole = np.concatenate([member.numpy() for member in self._members], self._axis)
        return ir.Tensor(whole, dtype=self.dtype, name=self.name)

    def _turned(self) -> AnyArray:
        """The transpose of the whole matrix: there, members lie one behind the other."""
        whole: AnyArray = np.empty(shape_of(self)[::-1], self.dtype.numpy())
        start = 0
        for member in self._members:
            part = whole[start : start + shape_of(member)[1]]
            start += len(part)
            if ROWS in member.meta:
                member.meta[ROWS](part)
            else:
                part[:] = member.numpy().T
        return whole


def shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """A tensor's shape, as numbers."""
    return tuple(int(size) for size in tensor.shape.numpy())
