"""The operators that a graph may hold before ONNX Runtime sees it.

All of them compute their outputs from their inputs and nothing else: none opens a file, loads a library, keeps a state
or holds compiled code, as ``com.microsoft.EPContext``, ``PythonOp`` or an operator of a foreign domain can, and none
goes on for ever, as `Loop` can. Bodies of `If` and `Scan` hold such operators only. Those that the exporter writes, of
every task, target and recipe, and plain arithmetic that other versions of its libraries might write instead.
"""

from __future__ import annotations

from typing import Final

_ONNX: Final = """
Abs Add And ArgMax ArgMin Attention BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip Compress
Concat Constant ConstantOfShape Conv Cos CumSum DequantizeLinear Div DynamicQuantizeLinear Einsum Equal Erf Exp Expand
EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid Identity If IsInf
IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul MatMulInteger Max Mean Min Mod Mul Neg
NonZero Not OneHot Or Pad Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL2 ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape RotaryEmbedding Round Scan ScatterElements
ScatterND Shape Sigmoid Sign SimplifiedLayerNormalization Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum
Swish Tanh TensorScatter Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
_CONTRIB: Final = """
BiasGelu DynamicQuantizeMatMul FastGelu FusedMatMul GatherBlockQuantized Gelu GroupQueryAttention MatMulIntegerToFloat
MatMulNBits MultiHeadAttention PackedMultiHeadAttention QuickGelu RotaryEmbedding SkipLayerNormalization
SkipSimplifiedLayerNormalization
"""

# As `runtime.onnx_file` names them: with the domain where that is not ONNX's own.
ALLOWED: Final = frozenset((*_ONNX.split(), *(f"com.microsoft.{name}" for name in _CONTRIB.split())))
# ONNX's version that the list was made from.
NEWEST_OPSET: Final = 26
