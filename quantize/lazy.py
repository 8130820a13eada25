"""One weight, quantized when its bytes are asked for, in bounded memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from exporter.bind import DEDUP, WeightTensor
from model.errors import NumericalError
from quantize.pack import pack_codes, packed_shapes
from quantize.scheme import AnyArray, Floats, Method, Scheme, Statistics

# Weights converted to float32 and handed to a method at a time (32 MiB).
CHUNK = 1 << 23


@dataclass(frozen=True)
class Source:
    """A float weight in a graph.

    Attributes:
        tensor: the weight as it is stored, of any float type; read only when asked for.
        by_columns: it is stored [K, N], as MatMul wants it; else [N, K], as Gather does.
        name: graph and initializer, e.g. ``decoder.lm_head.weight``.
    """

    tensor: ir.TensorProtocol
    by_columns: bool
    name: str

    @property
    def key(self) -> str:
        """The same for two sources exactly if they are the same stored tensor, whichever way the graph wants it."""
        tensor = self.tensor
        if isinstance(tensor, WeightTensor):
            place = tensor.source
            return f"{place.file}:{place.offset}:{place.nbytes}:{tensor.transposed == self.by_columns}"
        if isinstance(tensor, ir.ExternalTensor):
            return f"{tensor.path}:{tensor.offset}:{tensor.length}:{self.by_columns}"
        return self.name

    @property
    def shape(self) -> tuple[int, int]:
        """N outputs (or table rows) and K inputs."""
        first, second = (int(size) for size in self.tensor.shape.numpy())
        return (second, first) if self.by_columns else (first, second)

    def open(self) -> Callable[[int, int], AnyArray]:
        """A function that reads rows start..stop of [N, K]; only checkpoint tensors are read in pieces."""
        tensor = self.tensor
        if self._reads_rows(tensor):
            return tensor.rows
        array = tensor.numpy()
        rows = array.T if self.by_columns else array
        return lambda start, stop: rows[start:stop]

    def _reads_rows(self, tensor: ir.TensorProtocol) -> TypeGuard[WeightTensor]:
        return isinstance(tensor, WeightTensor) and tensor.transposed == self.by_columns


class LazyWeight:
    """The packed parts of a quantized weight: "codes", "scales" and, if asymmetric, "zero_points".

    The first part that is asked for computes all. Each is kept until it has been handed out once, so a writer
    that takes a weight's parts one after another holds one packed weight at a time and reads the source once.
    A part that is asked for again is computed again, with the same result. Scales are of the source's float type,
    which is that of the activations.
    """

    def __init__(
        self,
        source: Source,
        scheme: Scheme,
        method: Method,
        statistics: Statistics | None = None,
    ) -> None:
        self.source = source
        self.scheme = scheme
        self.method = method
        self.statistics = statistics
        self.scale_type = source.tensor.dtype
        self._ready: dict[str, AnyArray] = {}
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """The same for two weights exactly if their parts are the same bytes."""
        calibrated = "" if self.statistics is None else f"|{self.source.name}"
        return f"{self.source.key}|{self.scheme}|{self.scale_type.name}{calibrated}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Part → shape as MatMulNBits wants it."""
        return packed_shapes(*self.source.shape, self.scheme)

    @property
    def stored_bits(self) -> int:
        """Size of all parts together."""
        sizes = {part: self.scale_type.itemsize if part == "scales" else 1 for part in self.shapes}
        return int(sum(8 * sizes[part] * math.prod(shape) for part, shape in self.shapes.items()))

    def take(self, part: str) -> AnyArray:
        """One part, shaped as MatMulNBits wants it.

        Raises:
            NumericalError: the weight holds NaN or Inf, or its scales do not fit the graph's float type.
        """
        with self._lock:
            if part not in self._ready:
                self._ready = self._compute()
            return self._ready.pop(part)

    def tensor(self, name: str, part: str, shape: tuple[int, ...]) -> ir.LazyTensor:
        """The part as a tensor of the given name and (equivalent) shape, marked with its content."""

        def evaluate() -> ir.TensorProtocol:
            return ir.tensor(self.take(part).reshape(shape), dtype=dtype, name=name)

        dtype = self.scale_type if part == "scales" else ir.DataType.UINT8
        tensor = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)
        tensor.meta[DEDUP] = f"{self.key}|{part}"
        return tensor

    def _compute(self) -> dict[str, AnyArray]:
        result: dict[str, AnyArray] = {
            part: np.empty(shape, self.scale_type.numpy() if part == "scales" else np.uint8)
            for part, shape in self.shapes.items()
        }
        self._fill(result)
        if isinstance(self.source.tensor, ir.ExternalTensor):
            self.source.tensor.release()
        return result

    def _fill(self, result: dict[str, AnyArray]) -> None:
        bits = self.scheme.bits
        for part, weight in self._chunks():
            quantized = self.method(weight, self.statistics, self.scheme)
            result["codes"][part] = pack_codes(quantized.codes, bits)
            result["scales"][part] = self._cast_scales(quantized.scales)
            if quantized.zero_points is not None:
                result["zero_points"][part] = pack_codes(quantized.zero_points, bits)

    def _chunks(self) -> Iterator[tuple[slice, Floats]]:
        read = self.source.open()
        rows, columns = self.source.shape
        step = max(1, CHUNK // max(1, columns))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            chunk = read(start, stop).astype(np.float32, order="C", copy=False)
            with np.errstate(over="ignore", invalid="ignore"):
                finite = np.isfinite(chunk.sum())
            # A sum of finite numbers may overflow too: look closer before refusing.
            if not finite and not np.isfinite(chunk).all():
                raise _not_finite(self.source, read, step)
            yield slice(start, stop), chunk

    def _cast_scales(self, scales: Floats) -> AnyArray:
        with np.errstate(over="ignore"):
            cast = scales.astype(self.scale_type.numpy())
        if not np.isfinite(cast).all():
            why = f"scales up to {np.abs(scales).max():g} do not fit {self.scale_type.name.lower()}"
            raise NumericalError("cannot quantize weight", self.source.name, why, "Use --dtype fp32")
        return cast


def _not_finite(source: Source, read: Callable[[int, int], AnyArray], step: int) -> NumericalError:
    """Says where the first NaN or Inf of a weight [N, K] is, and how many there are."""
    first: list[int] | None = None
    count, rows = 0, source.shape[0]
    for start in range(0, rows, step):
        bad = np.argwhere(~np.isfinite(read(start, min(start + step, rows)).astype(np.float32)))
        count += len(bad)
        if first is None and len(bad):
            first = [start + int(bad[0, 0]), int(bad[0, 1])]
    why = f"{count} of its values are NaN or infinite, the first at {first}"
    return NumericalError(
        "cannot quantize weight", source.name, why, "Download the checkpoint again, or ask who made it"
    )
