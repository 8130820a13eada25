"""One weight, quantized when its bytes are asked for, by several threads and in bounded memory."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.bind import DEDUP, READS, WEIGHT, WeightTensor, write_array
from exporter.order import ORIGIN, origin_of
from exporter.parallel import in_order
from model.errors import NumericalError
from quantize.pack import pack_codes, packed_shapes
from quantize.scheme import AnyArray, Codes, Floats, Method, Quantized, Scheme, Statistics

# Weights that a thread reads, converts to float32 (2 MiB) and hands to a method at a time.
CHUNK = 1 << 19
_LINE = 16  # float32 values in a cache line
Reader = Callable[[int, int], AnyArray]  # rows start..stop of [N, K]


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

    def open(self) -> Reader:
        """A function that reads rows start..stop of [N, K]; only checkpoint tensors are read in pieces."""
        tensor = self.tensor
        if isinstance(tensor, WeightTensor) and self.reads_rows:
            return tensor.open()
        array = tensor.numpy()
        if self.by_columns:
            return lambda start, stop: _transposed(array[:, start:stop])
        return lambda start, stop: array[start:stop]

    @property
    def reads_rows(self) -> bool:
        """Whether it is a checkpoint's tensor whose rows are those of [N, K]."""
        return isinstance(self.tensor, WeightTensor) and self.tensor.transposed == self.by_columns


class LazyParts(ABC):
    """The packed parts of a quantized weight: "codes", "scales" and, if asymmetric, "zero_points".

    Whoever writes them takes the codes first, which `write_codes` computes on the way, piece by piece; scales and
    zero points, a tenth of them, are kept until they are handed out once. So a writer reads the source once and
    never holds a whole weight. A part that is asked for again, or before the codes, is computed again, with the same
    result. Scales are of the source's float type, which is that of the activations.

    Args:
        source: the weight.
        scheme: how it is stored.
        threads: that work side by side; the result does not depend on it.

    Attributes:
        piece: weights that a thread works on at a time.
    """

    def __init__(self, source: Source, scheme: Scheme, threads: int = 1) -> None:
        self.source = source
        self.scheme = scheme
        self.threads = threads
        self.piece = CHUNK
        self._ready: dict[str, AnyArray] = {}
        self._lock = threading.Lock()

    @property
    def scale_type(self) -> ir.DataType:
        """What scales are stored in."""
        return self.source.tensor.dtype

    @property
    def key(self) -> str:
        """The same for two weights exactly if their parts are the same bytes."""
        return f"{self.source.key}|{self.scheme}|{self.scale_type.name}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Part → shape as the kernel wants it."""
        return packed_shapes(*self.source.shape, self.scheme)

    @property
    def stored_bits(self) -> int:
        """Size of all parts together."""
        sizes = {part: self.scale_type.itemsize if part == "scales" else 1 for part in self.shapes}
        return int(sum(8 * sizes[part] * math.prod(shape) for part, shape in self.shapes.items()))

    def take(self, part: str) -> AnyArray:
        """One part, shaped as the kernel wants it.

        Raises:
            NumericalError: the weight holds NaN or Inf, or its scales do not fit the graph's float type.
        """
        with self._lock:
            if part not in self._ready:
                codes = np.empty(self.shapes["codes"], np.uint8) if part == "codes" else None
                for rows, packed in self._compute():
                    if codes is not None:
                        codes[rows] = packed
                if codes is not None:
                    return codes
            return self._ready.pop(part)

    def write_codes(self, file: Any) -> None:
        """Writes the codes' bytes; raises as `take`, and what writing raises."""
        with self._lock:
            for _, packed in self._compute():
                file.write(packed.data)

    def part_type(self, part: str) -> ir.DataType:
        """What a part's elements are."""
        return self.scale_type if part == "scales" else ir.DataType.UINT8

    def tensor(self, name: str, part: str, shape: tuple[int, ...]) -> ir.LazyTensor:
        """The part as a tensor of the given name and (equivalent) shape, marked with its content."""
        tensor = _Part(self, part, self.part_type(part), shape, name)
        tensor.meta[DEDUP] = f"{self.key}|{part}"
        tensor.meta[ORIGIN] = origin_of(self.source.tensor)
        tensor.meta[WEIGHT] = self.key
        if READS in self.source.tensor.meta:
            tensor.meta[READS] = self.source.tensor.meta[READS]
        return tensor

    def _compute(self) -> Iterator[tuple[slice, Codes]]:
        """Rows and their packed codes, in order; afterwards the other parts are ready."""
        shapes = {part: shape for part, shape in self.shapes.items() if part != "codes"}
        small: dict[str, AnyArray] = {
            part: np.empty(shape, self.scale_type.numpy() if part == "scales" else np.uint8)
            for part, shape in shapes.items()
        }
        rows, columns = self.source.shape
        step = max(1, self.piece // max(1, columns))
        pieces = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        for piece, packed in zip(pieces, in_order(self._packer(), pieces, self.threads), strict=True):
            for part, array in small.items():
                array[piece] = packed[part]
            yield piece, packed["codes"]
        self._ready = small
        if isinstance(self.source.tensor, ir.ExternalTensor):
            self.source.tensor.release()

    @abstractmethod
    def _packer(self) -> Callable[[slice], dict[str, AnyArray]]:
        """A function that gives the parts of some rows."""

    def _cast_scales(self, scales: Floats) -> AnyArray:
        with np.errstate(over="ignore"):
            cast = scales.astype(self.scale_type.numpy())
        if not np.isfinite(cast).all():
            why = f"scales up to {np.abs(scales).max():g} do not fit {self.scale_type.name.lower()}"
            raise NumericalError("cannot quantize weight", self.source.name, why, "Use --dtype fp32")
        return cast


class LazyWeight(LazyParts):
    """A float weight that a method quantizes.

    Args:
        source, scheme, threads: see `LazyParts`.
        method: chooses scales and codes.
        statistics: of the weight's inputs, for methods that use them.
    """

    def __init__(
        self,
        source: Source,
        scheme: Scheme,
        method: Method,
        statistics: Statistics | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__(source, scheme, threads)
        self.method = method
        self.statistics = statistics
        self._stored = replace(scheme, scale_type=np.dtype(self.scale_type.numpy()))

    @property
    def key(self) -> str:
        """The same for two weights exactly if their parts are the same bytes."""
        return super().key + ("" if self.statistics is None else f"|{self.source.name}")

    def _packer(self) -> Callable[[slice], dict[str, AnyArray]]:
        read = self.source.open()
        return lambda rows: self._pack(read, rows)

    def _pack(self, read: Reader, rows: slice) -> dict[str, AnyArray]:
        """The parts of some rows."""
        weight = read(rows.start, rows.stop).astype(np.float32, order="C", copy=False)
        self._check_finite(weight, read)
        quantized = self._quantize(weight)
        bits = self.scheme.bits
        parts = {"codes": pack_codes(quantized.codes, bits), "scales": self._cast_scales(quantized.scales)}
        if quantized.zero_points is not None:
            parts["zero_points"] = pack_codes(quantized.zero_points, bits)
        return parts

    def _quantize(self, weight: Floats) -> Quantized:
        return self.method(weight, self.statistics, self._stored)

    def _check_finite(self, weight: Floats, read: Reader) -> None:
        if isinstance(self.source.tensor, WeightTensor) or not weight.size:  # the former checks what it reads
            return
        # Both give NaN where there is one, and an infinity is one of them.
        if not (np.isfinite(weight.min()) and np.isfinite(weight.max())):
            raise _not_finite(self.source, read)


class _Part(ir.LazyTensor):
    """One part of a quantized weight as an initializer; codes are written while they are computed."""

    __slots__ = ("_part", "_weight")

    def __init__(self, weight: LazyParts, part: str, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> None:
        super().__init__(self._evaluate_part, dtype, ir.Shape(shape), name=name)
        self._weight, self._part = weight, part

    def tofile(self, file: Any) -> None:
        """Writes the part's bytes."""
        if self._part == "codes":
            self._weight.write_codes(file)
        else:
            write_array(self._weight.take(self._part), file)

    def _evaluate_part(self) -> ir.TensorProtocol:
        shape = tuple(int(size) for size in self.shape.numpy())
        return ir.tensor(self._weight.take(self._part).reshape(shape), dtype=self.dtype, name=self.name)


def _transposed(columns: AnyArray) -> AnyArray:
    """The transpose in C order, sixteen columns of it at a time: they fill a cache line before the next is begun."""
    rows = np.empty(columns.shape[::-1], columns.dtype)
    for start in range(0, len(columns), _LINE):
        rows[:, start : start + _LINE] = columns[start : start + _LINE].T
    return rows


def _not_finite(source: Source, read: Reader) -> NumericalError:
    """Says where the first NaN or Inf of a weight [N, K] is, and how many there are."""
    first: list[int] | None = None
    count, (rows, columns) = 0, source.shape
    step = max(1, CHUNK // max(1, columns))
    for start in range(0, rows, step):
        bad = np.argwhere(~np.isfinite(read(start, min(start + step, rows)).astype(np.float32)))
        count += len(bad)
        if first is None and len(bad):
            first = [start + int(bad[0, 0]), int(bad[0, 1])]
    why = f"{count} of its values are NaN or infinite, the first at {first}"
    return NumericalError(
        "cannot quantize weight", source.name, why, "Download the checkpoint again, or ask who made it"
    )
