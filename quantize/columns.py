"""A weight as products of integers want it: int8 [K, N], and one float32 scale for each of the N outputs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.bind import transposed_panels
from quantize.lazy import LazyWeight, Reader
from quantize.rotate import rotated, rotated_statistics
from quantize.scheme import AnyArray, Floats, Quantized, Statistics

ROWS = "rows"  # of codes [K, N]: a function that puts them [N, K] into an array
_SIGN = 0x80  # a code differs from its value, 128 less, in this bit


class ColumnWeight(LazyWeight):
    """A float weight of which every row gets one scale, stored the other way round.

    Its codes, a byte a weight, lie in memory as a whole until they are written; another weight is not begun before.

    Args:
        source, scheme, method, statistics, threads: see `quantize.lazy.LazyWeight`.
    """

    @property
    def scale_type(self) -> ir.DataType:
        """FLOAT: the kernel reads scales itself, whatever type the graph's activations have."""
        return ir.DataType.FLOAT

    def part_type(self, part: str) -> ir.DataType:
        """INT8 for the codes."""
        return ir.DataType.INT8 if part == "codes" else super().part_type(part)

    def take(self, part: str) -> AnyArray:
        """One part: codes int8 [K, N] or scales float32 [N]; raises as `LazyParts.take`."""
        if part != "codes":
            return super().take(part)
        return np.ascontiguousarray(self.rows().T)

    def write_codes(self, file: Any) -> None:
        """Writes the codes' bytes; raises as `take`, and what writing raises."""
        for panel in transposed_panels(self.rows(), np.dtype(np.int8)):
            file.write(panel.data)

    def tensor(self, name: str, part: str, shape: tuple[int, ...]) -> ir.LazyTensor:
        """The part as a tensor, which knows for codes how to get them row by row."""
        tensor = super().tensor(name, part, shape)
        if part == "codes":
            tensor.meta[ROWS] = self.rows
        return tensor

    def rows(self, out: NDArray[np.int8] | None = None) -> NDArray[np.int8]:
        """The codes the other way round, [N, K]; afterwards the scales are ready. Raises as `take`.

        Args:
            out: where to put them; None for a new array.
        """
        whole = np.empty(self.source.shape, np.int8) if out is None else out
        with self._lock:
            for rows, codes in self._compute():
                whole[rows] = codes
        return whole

    @cached_property
    def _known(self) -> Statistics | None:
        """Of the inputs as they are when they are multiplied."""
        if self.statistics is None or not self.scheme.rotate:
            return self.statistics
        return rotated_statistics(self.statistics, self.scheme.rotate)

    def _quantize(self, weight: Floats) -> Quantized:
        if self.scheme.rotate:
            weight = rotated(weight, self.scheme.rotate)
        return self.method(weight, self._known, self._stored)

    def _pack(self, read: Reader, rows: slice) -> dict[str, AnyArray]:
        parts = super()._pack(read, rows)
        codes = parts["codes"].reshape(rows.stop - rows.start, -1)
        return {"codes": (codes ^ np.uint8(_SIGN)).view(np.int8), "scales": parts["scales"].reshape(-1)}
