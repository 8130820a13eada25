"""What is done to which weight while a model is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from model.source import WeightSource
from quantize import awq, rotate, search
from quantize.calibration.store import INPUT_SCALE, StoredWeight
from quantize.lazy import LazyParts, LazyWeight
from quantize.methods import HESSIAN, NEEDS, NOTHING, SCALED, USES
from quantize.pack import dequantize, unpack_codes
from quantize.scheme import INT8, AnyArray, Floats, Quantized, Scheme, Statistics

Parts = Mapping[str, AnyArray]
# Weights that a method that prepares itself for a Hessian is given at a time (256 MiB), by one thread.
_PIECE = 1 << 26
# Rows of a weight that a scale of its input is chosen by.
_ROWS = 256
# Weights dequantized at a time.
_RESTORED = 1 << 22


class Plan:
    """The weights of a model, by the path of their module.

    Args:
        weights: those that are quantized; all others stay float.
        refs: canonical name → weight of the checkpoint.
    """

    def __init__(self, weights: Mapping[str, LazyParts], refs: Mapping[str, WeightSource]) -> None:
        self._weights, self._refs = weights, refs

    def need(self, path: str) -> str:
        """What of its inputs' statistics a module wants: "none", "mean_square" or "hessian"."""
        weight = self._weights.get(path)
        if not isinstance(weight, StoredWeight) or weight.module != path:
            return NOTHING
        return USES[weight.scheme.method]

    def changes(self, path: str) -> bool:
        """Whether a module's weight is another one in the quantized model."""
        return path in self._weights

    def known(self, paths: Sequence[str], statistics: Statistics) -> dict[str, Statistics]:
        """What each of some modules that read the same input is given: a scale of it, where their methods want one."""
        scaling = [path for path in paths if self._weights[path].scheme.method in SCALED]
        found = dict.fromkeys(paths, statistics)
        if scaling:
            weights = [self._sample(path) for path in scaling]
            scale = awq.input_scale(weights, statistics, self._weights[scaling[0]].scheme)
            found |= dict.fromkeys(scaling, replace(statistics, input_scale=scale))
        return found

    def _sample(self, path: str) -> Floats:
        """Rows of a weight, evenly chosen."""
        source = self._refs[f"{path}.weight"]
        read, count = source.open(), source.shape[0]
        rows = [read(row, row + 1) for row in range(0, count, -(-count // _ROWS))]
        return np.concatenate(rows).astype(np.float32)

    def quantize(self, path: str, statistics: Statistics | None) -> Parts:
        """The packed parts of a weight, as the quantized model has it, and the scale of its input if there is one.

        Raises:
            NumericalError: the weight holds NaN or Inf, or its scales do not fit the graph's float type.
        """
        weight = self._weights[path]
        if isinstance(weight, StoredWeight):
            weight = weight.weight
        if isinstance(weight, LazyWeight):
            weight = _with(weight, statistics)
        parts = {part: weight.take(part) for part in weight.shapes}  # codes come first, the others are then ready
        if statistics is not None and statistics.input_scale is not None:
            parts[INPUT_SCALE] = statistics.input_scale
        return parts

    def restored(self, path: str, parts: Parts) -> Iterator[tuple[slice, Floats]]:
        """The rows float32 [rows, K] that a weight's parts stand for, some at a time."""
        weight = self._weights[path]
        rows, columns = weight.source.shape
        step = max(1, _RESTORED // max(1, columns))
        restore = _columns if weight.scheme.activations == INT8 else _blocks
        for start in range(0, rows, step):
            some = slice(start, min(start + step, rows))
            values = restore(parts, some, weight.scheme, columns)
            if INPUT_SCALE in parts:
                values /= parts[INPUT_SCALE]
            yield some, values

    def rows(self, path: str, ids: Sequence[int]) -> Floats:
        """Rows of a table as the quantized model has them: float32 [ids, hidden].

        What a head that it is tied to will make of them is not known yet; searched ones are close to that.
        """
        read = self._refs[f"{path}.weight"].open()
        values = np.concatenate([read(row, row + 1) for row in ids]).astype(np.float32)
        weight = self._weights.get(path)
        if weight is None:
            return values
        scheme = replace(weight.scheme, scale_type=np.dtype(weight.scale_type.numpy()))
        method: Callable[..., Quantized] = search.quantize
        if isinstance(weight, LazyWeight) and NEEDS[scheme.method] == NOTHING:
            method = weight.method
        found = method(values, None, scheme)
        stored = replace(found, scales=found.scales.astype(scheme.scale_type).astype(np.float32))
        return dequantize(stored, scheme, values.shape[1])


def _with(weight: LazyWeight, statistics: Statistics | None) -> LazyWeight:
    """A weight of its own that knows its inputs; nobody else's lasts longer for it."""
    hessian = statistics is not None and USES[weight.scheme.method] == HESSIAN
    known = type(weight)(weight.source, weight.scheme, weight.method, statistics, 1 if hessian else weight.threads)
    if hessian:
        known.piece = _PIECE
    return known


def _blocks(parts: Parts, rows: slice, scheme: Scheme, columns: int) -> Floats:
    codes = unpack_codes(parts["codes"][rows], scheme.bits, scheme.block_size)
    scales, zero_points = parts["scales"][rows].astype(np.float32), None
    if "zero_points" in parts:
        zero_points = unpack_codes(parts["zero_points"][rows], scheme.bits, codes.shape[1])
    return dequantize(Quantized(codes, scales, zero_points), scheme, columns)


def _columns(parts: Parts, rows: slice, scheme: Scheme, columns: int) -> Floats:
    values: Floats = np.ascontiguousarray(parts["codes"][:, rows].T).astype(np.float32)
    values *= parts["scales"][rows].astype(np.float32)[:, None]
    return rotate.restored(values, scheme.rotate) if scheme.rotate else values
