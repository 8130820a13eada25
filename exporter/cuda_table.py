"""Which types ONNX Runtime's CUDA kernels take, of the operators that the graphs use or might come to use.

Facts from docs/OperatorKernels.md of ONNX Runtime (commit 001d12d2623f, before version 1.31) and, of memory types and
of SimplifiedLayerNormalization's combinations, from the kernels' registrations. A kernel serves a version of the
standard if it begins with just that version, or names a last version that is not before it: one that is open-ended is
not taken for operators that changed later. Of ConstantOfShape, Flatten and Identity pull request 27728 says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_HALVES = "float16 bfloat16"
_FLOATS = f"float {_HALVES}"
_ALL_FLOATS = f"double {_FLOATS}"
_WHOLE = "int8 int16 int32 int64 uint8 uint16 uint32 uint64"
_NUMBERS = f"{_ALL_FLOATS} {_WHOLE}"
_ANY = f"bool {_NUMBERS}"
_SIZES = "int32 int64 uint32 uint64"
CONTRIB: Final = "com.microsoft"


@dataclass(frozen=True)
class Kernel:
    """Kernels of one operator for a range of its versions.

    Attributes:
        first, last: version that they begin with; the last one, None where open-ended.
        types: type variable of the operator's schema → types, separated by spaces.
        combinations: where not every choice of them is there, those that are: pairs of types of T and V.
    """

    first: int
    last: int | None
    types: dict[str, str]
    combinations: tuple[tuple[str, str], ...] = ()

    def serves(self, version: int) -> bool:
        """Whether ONNX Runtime takes it for an operator that last changed with `version`."""
        return version == self.first or (self.last is not None and self.first <= version <= self.last)


@dataclass(frozen=True)
class Signature:
    """Type variables of the inputs and outputs of an operator that the standard does not know, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def _since(first: int, types: str = _ANY, last: int | None = None, **more: str) -> tuple[Kernel, ...]:
    return (Kernel(first, last, {"T": types} | more),)


_MIXED = (("float", "float"), ("double", "double"), ("float16", "float16"), ("float", "float16"), ("float16", "float"),
          ("bfloat16", "bfloat16"))  # fmt: skip

KERNELS: Final[dict[tuple[str, str], tuple[Kernel, ...]]] = {
    ("", "Add"): _since(14, _NUMBERS),
    ("", "And"): _since(7, "bool", T1="bool"),
    ("", "ArgMax"): _since(13, "double float float16"),
    ("", "Attention"): _since(23, T1=_FLOATS, T2=_FLOATS, U=f"bool {_FLOATS}"),
    ("", "Cast"): _since(23, T1=_ANY, T2=_ANY),
    ("", "Clip"): _since(13, "double float float16 int64 int8 uint64 uint8"),
    ("", "Compress"): _since(11, _ANY, T1="bool"),
    ("", "Concat"): _since(13),
    ("", "ConstantOfShape"): _since(23, T1="int64", T2=_ANY),
    ("", "Cos"): _since(7, "double float float16"),
    ("", "CumSum"): _since(14, f"double float float16 {_SIZES}", T2="int32 int64"),
    ("", "Div"): _since(14, _NUMBERS),
    ("", "Equal"): _since(13, f"bool double float float16 {_SIZES}"),
    ("", "Erf"): _since(13, _ALL_FLOATS),
    ("", "Expand"): _since(13),
    ("", "Flatten"): _since(23),
    ("", "Gather"): _since(13, _ANY, Tind="int32 int64"),
    ("", "Gelu"): _since(20, _ALL_FLOATS),
    ("", "Greater"): _since(13, f"double float float16 {_SIZES}", T1="bool"),
    ("", "GreaterOrEqual"): _since(16, f"double float float16 {_SIZES}", T1="bool"),
    ("", "Identity"): _since(23, V=_ANY),
    ("", "Less"): _since(13, f"double float float16 {_SIZES}", T1="bool"),
    ("", "LessOrEqual"): _since(16, f"double float float16 {_SIZES}", T1="bool"),
    ("", "MatMul"): _since(13, _ALL_FLOATS),
    ("", "Max"): _since(13, f"{_ALL_FLOATS} {_SIZES}"),
    ("", "Min"): _since(13, f"{_ALL_FLOATS} {_SIZES}"),
    ("", "Mod"): _since(13, f"{_ALL_FLOATS} {_SIZES}"),
    ("", "Mul"): _since(14, _NUMBERS),
    ("", "Neg"): _since(13, f"{_ALL_FLOATS} int8 int16 int32 int64"),
    ("", "NonZero"): _since(13, "bool float float16 int32 int64 uint8"),
    ("", "Not"): _since(1, "bool"),
    ("", "Or"): _since(7, "bool", T1="bool"),
    ("", "Range"): _since(11, "double float int16 int32 int64"),
    ("", "ReduceMax"): _since(18, "double float float16 int32 int64"),
    ("", "ReduceSum"): _since(13, f"{_ALL_FLOATS} int32 int64"),
    ("", "Reshape"): _since(23),
    ("", "RotaryEmbedding"): _since(23, _FLOATS, M="int64"),
    ("", "ScatterElements"): _since(18, _ANY, Tind="int32 int64"),
    ("", "ScatterND"): _since(18),
    ("", "Shape"): _since(23, _ANY, T1="int64"),
    ("", "Sigmoid"): _since(13, _ALL_FLOATS),
    ("", "SimplifiedLayerNormalization"): (
        Kernel(1, None, {"T": _ALL_FLOATS, "U": "float double", "V": _ALL_FLOATS}, _MIXED),
    ),
    ("", "Sin"): _since(7, "double float float16"),
    ("", "Slice"): _since(13, _ANY, Tind="int32 int64"),
    ("", "Softmax"): _since(13, _ALL_FLOATS),
    ("", "Split"): _since(18),
    ("", "Sqrt"): _since(13, _ALL_FLOATS),
    ("", "Squeeze"): _since(23),
    ("", "Sub"): _since(14, _NUMBERS),
    ("", "Tile"): _since(13, f"{_ALL_FLOATS} int32 int64", T1="int64"),
    ("", "Transpose"): _since(23),
    ("", "Unsqueeze"): _since(23),
    ("", "Where"): _since(16, f"{_ALL_FLOATS} int32 int64 uint8", B="bool"),
    (CONTRIB, "GatherBlockQuantized"): _since(1, T1="uint8 int4 uint4", T2=_FLOATS, Tind="int32 int64"),
    (CONTRIB, "GroupQueryAttention"): _since(
        1, _HALVES, T_CACHE=f"{_HALVES} int8 float8e4m3fn", T_KV_SCALE="float", M="int32"
    ),
    (CONTRIB, "MatMulNBits"): _since(1, T1=_FLOATS, T2="uint8", T3=f"uint8 {_FLOATS}", T4="int32"),
    (CONTRIB, "MultiHeadAttention"): _since(1, _FLOATS, M="int32", QK=_FLOATS),
    (CONTRIB, "PackedMultiHeadAttention"): _since(1, "float float16", M="int32"),
    (CONTRIB, "QuickGelu"): _since(1, _ALL_FLOATS),
    (CONTRIB, "RotaryEmbedding"): _since(1, _FLOATS, M="int64"),
    (CONTRIB, "SkipSimplifiedLayerNormalization"): _since(1, _FLOATS, U="float"),
}

SIGNATURES: Final[dict[tuple[str, str], Signature]] = {
    ("", "SimplifiedLayerNormalization"): Signature(("T", "V"), ("V", "U")),
    (CONTRIB, "GatherBlockQuantized"): Signature(("T1", "Tind", "T2", "T1"), ("T2",)),
    (CONTRIB, "GroupQueryAttention"): Signature(
        ("T", "T", "T", "T_CACHE", "T_CACHE", "M", "M", "T", "T", "tensor(int64)", "T", "T", "T_KV_SCALE",
         "T_KV_SCALE", "T", "T"),
        ("T", "T_CACHE", "T_CACHE", "T"),
    ),
    (CONTRIB, "MatMulNBits"): Signature(("T1", "T2", "T1", "T3", "T4", "T1"), ("T1",)),
    (CONTRIB, "MultiHeadAttention"): Signature(("T",) * 4 + ("M",) + ("T",) * 3 + ("M", "M"), ("T", "T", "T", "QK")),
    (CONTRIB, "PackedMultiHeadAttention"): Signature(("T", "T", "T", "T", "M", "M", "T"), ("T",)),
    (CONTRIB, "QuickGelu"): Signature(("T",), ("T",)),
    (CONTRIB, "RotaryEmbedding"): Signature(("T", "M", "T", "T"), ("T",)),
    (CONTRIB, "SkipSimplifiedLayerNormalization"): Signature(("T",) * 4, ("T", "U", "U", "T")),
}  # fmt: skip

# Inputs that the kernels read from the CPU's memory, and operators whose results are there.
HOST_INPUTS: Final[dict[tuple[str, str], frozenset[int]]] = {
    ("", "Clip"): frozenset({1, 2}),
    ("", "ConstantOfShape"): frozenset({0}),
    ("", "CumSum"): frozenset({1}),
    ("", "Expand"): frozenset({1}),
    ("", "Range"): frozenset({0, 1, 2}),
    ("", "ReduceMax"): frozenset({1}),
    ("", "ReduceSum"): frozenset({1}),
    ("", "Reshape"): frozenset({1}),
    ("", "Slice"): frozenset({1, 2, 3, 4}),
    ("", "Split"): frozenset({1}),
    ("", "Squeeze"): frozenset({1}),
    ("", "Tile"): frozenset({1}),
    ("", "Unsqueeze"): frozenset({1}),
    (CONTRIB, "GroupQueryAttention"): frozenset({6}),
}
HOST_RESULTS: Final = frozenset({("", "Shape"), ("", "Size")})
