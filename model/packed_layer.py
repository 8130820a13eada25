"""One quantized layer of a checkpoint: types and shapes of its parts are checked, and a weight is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NoReturn

from model.errors import CheckpointError
from model.packed import Float8Weight, IntegerWeight
from model.quantization import AWQ, FLOAT, GPTQ, INT, Quantization, WeightScheme
from model.shards import FLOATS, WHAT, TensorRef
from model.unpack import (
    AWQ_PLACES,
    ONES,
    WORD,
    Matrix,
    PackedColumns,
    PackedInputs,
    PackedOutputs,
    PackedRows,
    Scales,
    SignedBytes,
)

Shape = tuple[int, ...]
FLOAT8 = ("F8_E4M3", "F8_E5M2")
BYTES = ("I8", *FLOAT8)  # a "weight" of these types is quantized
PARTS = frozenset(
    (
        *("qweight", "qzeros", "scales", "g_idx"),
        *("weight_packed", "weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point", "weight_g_idx"),
    )
)
_WORDS = ("I32",)
_WHOLE = ("I32", "I64")
_FIT = "Check that config.json belongs to these weights"


class PackedLayer:
    """A layer whose parts are taken one by one; each must have its use.

    Args:
        name: of the plain weight that the layer would have.
        shape: (N, K), outputs and inputs, as the model needs it.
        parts: last part of the name → tensor.
        quantization: what the configuration says.
    """

    def __init__(self, name: str, shape: Shape, parts: Mapping[str, TensorRef], quantization: Quantization) -> None:
        self._name, self._rows, self._columns = name, shape[0], shape[1]
        self._left, self._used = dict(parts), list[TensorRef]()
        self._quantization = quantization

    def weight(self) -> IntegerWeight | Float8Weight:
        """The weight.

        Raises:
            CheckpointError: a part is missing, too much, or of another type or shape than the configuration means.
        """
        if "qweight" in self._left:
            weight = self._awq() if self._quantization.method == AWQ else self._gptq()
        elif "weight_packed" in self._left:
            weight = self._packed_rows()
        elif "weight" in self._left:
            codes = self._take("weight", BYTES, (self._rows, self._columns))
            if codes.dtype in FLOAT8:
                return self._all_used(self._float8(codes))
            weight = self._signed_bytes(codes)
        else:
            self._fail(next(iter(self._left.values())), "the weight that it belongs to is missing")
        return self._all_used(weight)

    def _gptq(self) -> IntegerWeight:
        """``qweight`` [K / w, N] along the inputs, ``qzeros`` [groups, N / w] along the outputs, ``scales``."""
        method = self._quantization.method
        if method != GPTQ:
            self._fail(self._left["qweight"], f"a part of GPTQ or AWQ, but the configuration says {method}")
        bits = self._bits("qweight", lambda bits: (self._columns * bits // WORD, self._rows))
        if self._columns * bits % WORD or self._rows * bits % WORD:
            self._fail(self._left["qweight"], f"[{self._rows}, {self._columns}] does not fill words of {WORD} bits")
        codes = self._take("qweight", _WORDS)
        scheme, scales = self._scales("scales", bits, transposed=True)
        zeros = self._take("qzeros", _WORDS, (self._groups(scheme), self._rows * bits // WORD))
        less_one = self._quantization.zero_points_less_one
        weight = self._integers(
            scheme,
            PackedInputs(codes, bits),
            scales,
            PackedOutputs(zeros, bits, add=ONES[bits] if less_one else 0),
            self._optional("g_idx", _WHOLE, (self._columns,)),
        )
        return replace(weight, less_one=less_one)

    def _awq(self) -> IntegerWeight:
        """``qweight`` [K, N / 8] and ``qzeros`` [groups, N / 8] along the outputs in AutoAWQ's order, ``scales``."""
        if self._rows % 8:
            self._fail(self._left["qweight"], f"{self._rows} outputs are no multiple of 8")
        codes = self._take("qweight", _WORDS, (self._columns, self._rows // 8))
        scheme, scales = self._scales("scales", 4, transposed=True)
        zeros = self._take("qzeros", _WORDS, (self._groups(scheme), self._rows // 8))
        return self._integers(scheme, PackedOutputs(codes, 4, AWQ_PLACES), scales, PackedOutputs(zeros, 4, AWQ_PLACES))

    def _packed_rows(self) -> IntegerWeight:
        """``weight_packed`` [N, K / w] along the inputs, ``weight_zero_point`` [N / w, groups] along the outputs."""
        bits = self._bits("weight_packed", lambda bits: (self._rows, -(-self._columns * bits // WORD)))
        codes = self._take("weight_packed", _WORDS)
        scheme, scales = self._scales("weight_scale", bits)
        zero_points: Matrix | None = None
        if "weight_zero_point" in self._left:
            packed = self._left["weight_zero_point"].dtype in _WORDS  # older writers did not pack them
            tall = -(-self._rows * bits // WORD) if packed else self._rows
            zeros = self._take("weight_zero_point", (*_WORDS, "I8"), (tall, self._groups(scheme)))
            zero_points = PackedColumns(zeros, bits) if packed else SignedBytes(zeros, bits)
        columns = self._optional("weight_g_idx", _WHOLE, (self._columns,))
        stored_shape = self._optional("weight_shape", _WHOLE, (2,))
        weight = self._integers(scheme, PackedRows(codes, bits, self._columns), scales, zero_points, columns)
        return replace(weight, stored_shape=stored_shape)

    def _signed_bytes(self, codes: TensorRef) -> IntegerWeight:
        """``weight`` [N, K] int8, one value a byte even if values have 4 bits."""
        listed = {scheme.bits for scheme in self._quantization.schemes if scheme.kind == INT}
        bits = 4 if listed == {4} else 8
        scheme, scales = self._scales("weight_scale", bits)
        zero_points = None
        if "weight_zero_point" in self._left:
            zeros = self._take("weight_zero_point", ("I8",), *self._per_group(scheme))
            zero_points = SignedBytes(zeros, bits)
        columns = self._optional("weight_g_idx", _WHOLE, (self._columns,))
        return self._integers(scheme, SignedBytes(codes, bits), scales, zero_points, columns)

    def _float8(self, codes: TensorRef) -> Float8Weight:
        """``weight_scale`` or ``weight_scale_inv``: both are multiplied by, whatever the name says."""
        part = next((part for part in ("weight_scale", "weight_scale_inv") if part in self._left), None)
        if part is None:
            self._fail(codes, f"values of type {codes.dtype} without a scale", "Use a complete checkpoint")
        ref = self._take(part, (*FLOATS, "F8_E8M0"))
        schemes = [scheme for scheme in self._quantization.schemes if scheme.kind == FLOAT]
        if not schemes:
            self._fail(codes, f"values of type {codes.dtype}, of which the configuration says nothing")
        if ref.shape in ((), (1,), (1, 1)):
            block, kind = (self._rows, self._columns), "per tensor"
        elif ref.shape in ((self._rows,), (self._rows, 1)):
            block, kind = (1, self._columns), "per row"
        else:
            sizes = [scheme.block or (1, scheme.group_size or self._columns) for scheme in schemes]
            shapes = [(-(-self._rows // tall), -(-self._columns // wide)) for tall, wide in sizes]
            self._expect(ref, *shapes)
            block = sizes[shapes.index((ref.shape[0], ref.shape[1]))]
            kind = f"in blocks of {block[0]}x{block[1]}"
        zeros = self._optional("weight_zero_point", (*BYTES, *FLOATS))
        label = f"{self._quantization.method} {codes.dtype.lower()} {kind}"
        shape, parts = (self._rows, self._columns), tuple(self._used)
        return Float8Weight(self._name, shape, parts, label, codes, Scales(ref), block, zeros)

    def _bits(self, part: str, shape: Callable[[int], Shape]) -> int:
        """4 or 8, whichever gives a packed tensor its shape."""
        ref = self._left[part]
        bits = next((bits for bits in (4, 8) if ref.shape == shape(bits)), None)
        if bits is None:
            whole = [self._rows, self._columns]
            self._fail(ref, f"shape {list(ref.shape)} is {whole} packed in neither 4 nor 8 bits")
        return bits

    def _scales(self, part: str, bits: int, *, transposed: bool = False) -> tuple[WeightScheme, Scales]:
        """Scales [N, groups], or [groups, N], and the configuration's scheme that has as many."""
        ref = self._take(part, FLOATS)
        groups = ref.shape[0 if transposed else 1] if len(ref.shape) == 2 else 1
        scheme = self._scheme(bits, groups, ref)
        if transposed:
            self._expect(ref, (self._groups(scheme), self._rows))
        else:
            self._expect(ref, *self._per_group(scheme))
        return scheme, Scales(ref, transposed)

    def _scheme(self, bits: int, groups: int, scales: TensorRef) -> WeightScheme:
        listed = [scheme for scheme in self._quantization.schemes if (scheme.kind, scheme.bits) == (INT, bits)]
        fitting = [scheme for scheme in listed if self._groups(scheme) == groups]
        if self._quantization.overrides and groups > 0 and self._columns % groups == 0:
            # Single layers may differ in anything: their numbers tell the rest.
            size = fitting[0].group_size if fitting else self._columns // groups
            return WeightScheme(bits, INT, size, symmetric=False, act_order=True)
        if not fitting:
            meant = " or ".join(f"{self._groups(scheme)}" for scheme in listed)
            why = f"{bits} bits in {groups} groups of a row's {self._columns} columns, but the configuration means "
            self._fail(scales, why + (f"{meant} groups" if listed else "other numbers of bits"))
        symmetric = "weight_zero_point" not in self._left
        return next((scheme for scheme in fitting if scheme.symmetric == symmetric), fitting[0])

    def _groups(self, scheme: WeightScheme) -> int:
        return -(-self._columns // (scheme.group_size or self._columns))

    def _per_group(self, scheme: WeightScheme) -> tuple[Shape, ...]:
        """Shapes that something of every row and group may have: less than two dimensions where rows have one group."""
        shape = (self._rows, self._groups(scheme))
        return (shape,) if scheme.group_size else (shape, (self._rows,), (1, 1), (1,), ())

    def _integers(
        self,
        scheme: WeightScheme,
        codes: Matrix,
        scales: Scales,
        zero_points: Matrix | None,
        groups: TensorRef | None = None,
    ) -> IntegerWeight:
        method = self._quantization.method
        grouped = f"g{scheme.group_size}" if scheme.group_size else "per row"
        kind = "sym" if scheme.symmetric else "asym"
        order = " act-order" if scheme.act_order else ""
        return IntegerWeight(
            name=self._name,
            shape=(self._rows, self._columns),
            parts=tuple(self._used),
            label=f"{method} int{scheme.bits} {grouped} {kind}{order}",
            method=method,
            bits=scheme.bits,
            group_size=scheme.group_size or self._columns,
            codes=codes,
            scales=scales,
            zero_points=zero_points,
            symmetric=scheme.symmetric,
            groups=groups,
            act_order=scheme.act_order,
        )

    def _all_used(self, weight: IntegerWeight | Float8Weight) -> IntegerWeight | Float8Weight:
        for ref in self._left.values():
            self._fail(ref, f"it is no part of a weight stored as {weight.label}")
        return replace(weight, parts=tuple(self._used))

    def _take(self, part: str, dtypes: tuple[str, ...], *shapes: Shape) -> TensorRef:
        if part not in self._left:
            module = self._name.removesuffix(".weight")
            raise CheckpointError(WHAT, f"{module}.{part}", "this part of a quantized weight is missing", _FIT)
        ref = self._left.pop(part)
        if ref.dtype not in dtypes:
            self._fail(ref, f"values of type {ref.dtype}, where {' or '.join(dtypes)} are expected")
        if shapes:
            self._expect(ref, *shapes)
        self._used.append(ref)
        return ref

    def _optional(self, part: str, dtypes: tuple[str, ...], *shapes: Shape) -> TensorRef | None:
        return self._take(part, dtypes, *shapes) if part in self._left else None

    def _expect(self, ref: TensorRef, *shapes: Shape) -> None:
        if ref.shape not in shapes:
            self._fail(ref, f"shape {list(ref.shape)}, where {list(shapes[0])} is expected")

    def _fail(self, ref: TensorRef, why: str, remedy: str = _FIT) -> NoReturn:
        raise CheckpointError(WHAT, ref.name, why, remedy)
