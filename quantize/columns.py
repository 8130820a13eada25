"""A weight as products of integers want it: int8 [K, N], and one float32 scale for each of the N outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.bind import transposed_panels
from quantize.lazy import LazyWeight, Reader, Source
from quantize.scheme import AnyArray, Method, Scheme, Statistics

# Scales are read by the kernel itself, whatever type the graph's activations have.
SCALE = ir.DataType.FLOAT
_SIGN = 0x80  # a code differs from its value, 128 less, in this bit


class ColumnWeight(LazyWeight):
    """A float weight of which every row gets one scale, stored the other way round.

    Its codes, a byte a weight, lie in memory as a whole until they are written; another weight is not begun before.

    Args:
        source, scheme, method, statistics, threads: see `quantize.lazy.LazyWeight`.
    """

    def __init__(
        self,
        source: Source,
        scheme: Scheme,
        method: Method,
        statistics: Statistics | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__(source, scheme, method, statistics, threads)
        self.scale_type = SCALE

    def part_type(self, part: str) -> ir.DataType:
        """INT8 for the codes."""
        return ir.DataType.INT8 if part == "codes" else super().part_type(part)

    def take(self, part: str) -> AnyArray:
        """One part: codes int8 [K, N] or scales float32 [N]; raises as `LazyParts.take`."""
        if part != "codes":
            return super().take(part)
        with self._lock:
            return np.ascontiguousarray(self._whole().T)

    def write_codes(self, file: Any) -> None:
        """Writes the codes' bytes; raises as `take`, and what writing raises."""
        with self._lock:
            for panel in transposed_panels(self._whole(), np.dtype(np.int8)):
                file.write(panel.data)

    def _whole(self) -> NDArray[np.int8]:
        """The codes [N, K]; afterwards the scales are ready."""
        whole = np.empty(self.source.shape, np.int8)
        for rows, codes in self._compute():
            whole[rows] = codes
        return whole

    def _pack(self, read: Reader, rows: slice) -> dict[str, AnyArray]:
        parts = super()._pack(read, rows)
        codes = parts["codes"].reshape(rows.stop - rows.start, -1)
        return {"codes": (codes ^ np.uint8(_SIGN)).view(np.int8), "scales": parts["scales"].reshape(-1)}
