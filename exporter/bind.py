"""Puts the checkpoint's weights behind a traced graph's initializers, without reading them.

A `WeightTensor` knows where its bytes lie and how the graph wants them; they are read, checked and converted piece by
piece when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.order import ORIGIN
from exporter.passes_weights import FACTOR, TRANSPOSED
from exporter.rotary_nodes import TABLES, compute_tables
from model.config import ExaoneConfig, TextConfig
from model.errors import NumericalError
from model.rotary import rope_tables, stores_tables
from model.shards import DTYPES
from model.source import WeightSource

CHUNK_BYTES = 16 << 20  # read, converted or written at a time
_ROWS, _COLUMNS = 256, 64  # transposed at a time; more columns where they are short
HALF_LARGEST = 65504.0
DEDUP = "dedup"
WEIGHT = "weight"  # the same for initializers that are computed together
READS = "reads"  # the source files that a tensor's bytes come from
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class WeightTensor(ir.LazyTensor):
    """A stored tensor as an initializer, read when asked for.

    Args:
        source: where the bytes lie; dimensions behind the first are flattened if `shape` has only two.
        dtype: FLOAT, FLOAT16 or BFLOAT16.
        shape: in the graph; [K, N] for a source of [N, K] if `transposed`.
        transposed: whether the graph has it the other way round.
        name: of the initializer.
        factor: that every value is multiplied by.

    Attributes:
        source, transposed, factor: as given.
        meta["dedup"]: a key equal for two tensors exactly if they are the same bytes of one source.
        meta["origin"]: file and offset, as `exporter.order` wants them.
        meta["reads"]: the files that hold its bytes.
    """

    __slots__ = ("factor", "source", "transposed")

    def __init__(
        self,
        source: WeightSource,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        *,
        transposed: bool,
        name: str,
        factor: float = 1.0,
    ) -> None:
        super().__init__(self._materialise, dtype, ir.Shape(shape), name=name)
        self.source, self.transposed, self.factor = source, transposed, factor
        place = f"{source.file.name}:{source.offset}:{source.nbytes}"
        scaled = "" if factor == 1.0 else f"|{factor!r}"
        self.meta[DEDUP] = f"{place}|{dtype.name}|{'KN' if transposed else 'NK'}{scaled}"
        self.meta[ORIGIN] = source.file.name, source.offset
        self.meta[READS] = tuple(dict.fromkeys(part.file for part in source.parts))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape before transposing: [N, K] of a linear layer."""
        shape = tuple(int(size) for size in self.shape.numpy())
        return shape[::-1] if self.transposed else shape

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop of the stored orientation, in the graph's dtype.

        Raises:
            NumericalError: a value is NaN, infinite, or too large for float16.
            CheckpointError: the file cannot be read any more.
        """
        return self.open()(start, stop)

    def open(self) -> Callable[[int, int], NDArray[Any]]:
        """As `rows`, for many calls: what a quantized source has to read whole is read once."""
        read, rest = self.source.open(), self.stored_shape[1:]
        return lambda start, stop: _convert(
            _multiplied(read(start, stop), self.factor), self.dtype, self.source
        ).reshape(stop - start, *rest)

    def chunks(self) -> Iterator[NDArray[Any]]:
        """All rows of the stored orientation in order, about `CHUNK_BYTES` at a time. Raises as `rows`."""
        shape = self.stored_shape
        step = max(1, CHUNK_BYTES // max(1, self.source.nbytes // max(1, shape[0])))
        rows = self.open()
        for start in range(0, shape[0], step):
            yield rows(start, min(start + step, shape[0]))

    def tofile(self, file: Any) -> None:
        """Writes the graph's bytes.

        A tensor that is to be transposed lies in memory as a whole, in the smaller of its types; others never do.
        """
        if self.transposed:
            wanted, stored = self.dtype.numpy(), DTYPES[self.source.dtype]
            whole = self._whole(min(wanted, stored, key=lambda dtype: dtype.itemsize))
            for panel in transposed_panels(whole, wanted):
                file.write(panel.view(np.uint8).data)
            return
        for chunk in self.chunks():
            write_array(chunk, file)

    def _materialise(self) -> ir.TensorProtocol:
        whole = self._whole(self.dtype.numpy())
        return ir.Tensor(whole.T if self.transposed else whole, dtype=self.dtype, name=self.name)

    def _whole(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """All rows of the stored orientation as `dtype`, which can hold what `rows` gives."""
        whole = np.empty(self.stored_shape, dtype)
        filled = 0
        for chunk in self.chunks():
            whole[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return whole


def transposed_panels(whole: NDArray[Any], dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """The rows of `whole.T` as `dtype`, some at a time.

    Transposed piece by piece, so that lines stay in a core's cache; a whole row would touch a page for every value.
    """
    rows, columns = whole.shape
    step = max(_COLUMNS, CHUNK_BYTES // max(1, rows * dtype.itemsize))
    for left in range(0, columns, step):
        part = whole[:, left : left + step]
        panel = np.empty(part.shape[::-1], dtype)
        for top in range(0, rows, _ROWS):
            panel[:, top : top + _ROWS] = part[top : top + _ROWS].T
        yield panel


def write_array(array: NDArray[Any], file: Any) -> None:
    """Writes an array's bytes in C order, copying at most `CHUNK_BYTES` at a time."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, CHUNK_BYTES // max(1, rows.nbytes // max(1, len(rows))))
    for start in range(0, len(rows), step):
        file.write(np.ascontiguousarray(rows[start : start + step]).view(np.uint8).data)


def bind(models: Mapping[str, ir.Model], refs: Mapping[str, WeightSource], config: ExaoneConfig) -> None:
    """Gives every parameter of the traced graphs its lazy weight, in place.

    Args:
        models: graph name → traced graph, initializers named after the module's parameters.
        refs: canonical name → weight of the checkpoint, as `Checkpoint.bind` gives it.
        config: for the rotary tables, which no checkpoint holds.

    Raises:
        ValueError: graph and checkpoint do not fit, which is a fault of this package.
    """
    used: set[str] = set()
    tables = _RopeTables(config.text)
    for graph, model in models.items():
        if not stores_tables(config.text):
            compute_tables(model.graph, config.text)
        for value in model.graph.initializers.values():
            name = str(value.name)
            key = f"{graph}.{name}"
            if key in refs:
                value.const_value = _weight(value, refs[key])
                used.add(refs[key].name)
            elif name in TABLES:
                value.const_value = tables.tensor(value)
            elif value.const_value is None:
                raise ValueError(f"the initializer {key} has no source")
    unused = [key for key, ref in refs.items() if ref.name not in used]
    if unused:
        raise ValueError(f"no graph uses {unused[:5]}")


def _weight(value: ir.Value, ref: WeightSource) -> WeightTensor:
    if value.dtype not in _FLOATS or value.shape is None:
        raise ValueError(f"the initializer {value.name} has no float type or no shape")
    shape = tuple(int(size) for size in value.shape.numpy())
    transposed = value.metadata_props.get(TRANSPOSED) == "1"
    stored = shape[::-1] if transposed else shape
    if stored[:1] != ref.shape[:1] or int(np.prod(stored)) != int(np.prod(ref.shape)):
        raise ValueError(
            f"the initializer {value.name} of shape {list(shape)} does not fit {ref.name} {list(ref.shape)}"
        )
    factor = float(value.metadata_props.get(FACTOR, 1))
    return WeightTensor(ref, value.dtype, shape, transposed=transposed, name=str(value.name), factor=factor)


class _RopeTables:
    """The rotary tables, computed together when the first is asked for; each is handed out once and forgotten."""

    def __init__(self, text: TextConfig) -> None:
        self._text = text
        self._ready: dict[str, NDArray[np.float32]] = {}

    def tensor(self, value: ir.Value) -> ir.LazyTensor:
        """The table that an initializer is named after, in its type."""
        text, dtype, name = self._text, value.dtype, str(value.name)
        if dtype not in _FLOATS:
            raise ValueError(f"the rotary table {name} has no float type")

        def compute() -> ir.TensorProtocol:
            return ir.Tensor(self._take(name).astype(dtype.numpy(), copy=False), dtype=dtype, name=name)

        shape = (text.max_position_embeddings, text.head_dim // 2)
        tensor = ir.LazyTensor(compute, dtype, ir.Shape(shape), name=name)
        tensor.meta[DEDUP] = f"rope:{name}|{dtype.name}"
        tensor.meta[READS] = ()
        return tensor

    def _take(self, name: str) -> NDArray[np.float32]:
        if name not in self._ready:
            self._ready = dict(zip(TABLES, rope_tables(self._text), strict=True))
        return self._ready.pop(name)


def _multiplied(array: NDArray[Any], factor: float) -> NDArray[Any]:
    return array if factor == 1.0 else array.astype(np.float32) * np.float32(factor)


def _convert(array: NDArray[Any], dtype: ir.DataType, ref: WeightSource) -> NDArray[Any]:
    """Checks values and converts them to the graph's type."""
    if not _all_finite(array):
        raise _not_finite(ref)
    target = np.dtype(dtype.numpy())
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(target)
    if target != np.float32 and not _all_finite(converted):
        largest = float(np.abs(array.astype(np.float32)).max())
        raise NumericalError(
            "cannot convert weight", ref.name,
            f"it holds {largest:g}, more than {dtype.name.lower()} can ({HALF_LARGEST:g} in float16)",
            "Use --dtype fp32 or bf16",
        )  # fmt: skip
    return converted


# Exponent bits of each type; all ones mean NaN or infinity.
_EXPONENTS = {2: {"float16": 0x7C00, "bfloat16": 0x7F80}, 4: {"float32": 0x7F800000}}


def _all_finite(array: NDArray[Any]) -> bool:
    width = array.dtype.itemsize
    exponent = _EXPONENTS[width][array.dtype.name]
    bits: NDArray[Any] = array.view(np.uint16 if width == 2 else np.uint32)
    return not array.size or int((bits & exponent).max()) != exponent


def _not_finite(ref: WeightSource) -> NumericalError:
    """Says where a tensor's first NaN or infinity is, and how many it has."""
    first: list[int] | None = None
    count = 0
    step = max(1, CHUNK_BYTES // max(1, ref.nbytes // ref.shape[0]))
    for start in range(0, ref.shape[0], step):
        rows = ref.rows(start, min(start + step, ref.shape[0])).astype(np.float32)
        bad = np.argwhere(~np.isfinite(rows))
        count += len(bad)
        if first is None and len(bad):
            first = [int(i) for i in bad[0]]
            first[0] += start
    values = "value is" if count == 1 else "values are"
    return NumericalError(
        "bad weight", ref.name, f"{count} {values} NaN or infinite, the first at {first}",
        "Download the checkpoint again, or ask who made it",
    )  # fmt: skip
