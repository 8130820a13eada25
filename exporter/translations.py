"""What each operator of the traced program becomes in ONNX.

ONNX Runtime's own operators have no schema in the onnx package, so the few that are used are declared here,
as far as they are used. `SegmentAttention` is a placeholder that `exporter.lowering_segments` replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnxscript import opset23 as op
from onnxscript.values import Op, Opset

from exporter.builder import CONTRIB

OPSET = 23
PLACEHOLDER = "exaone"

_TYPES = ["tensor(bool)", "tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int32)", "tensor(int64)"]


def _declare(domain: str, name: str, inputs: tuple[str, ...], outputs: int, **attributes: type) -> Op:
    """An operator with as many outputs as are used; names of optional inputs end in "?"."""
    schema = onnx.defs.OpSchema
    kinds = {int: schema.AttrType.INT, float: schema.AttrType.FLOAT}
    optional, single = schema.FormalParameterOption.Optional, schema.FormalParameterOption.Single
    formal_inputs = [
        schema.FormalParameter(
            label.rstrip("?"), f"T{i}", "", param_option=optional if label.endswith("?") else single, min_arity=1
        )
        for i, label in enumerate(inputs)
    ]
    # The first output has the type of the first input; of the caches, likewise.
    formal_outputs = [schema.FormalParameter(f"output_{i}", "T0", "") for i in range(outputs)]
    return Op(
        Opset(domain, 1),
        name,
        schema(
            name,
            domain,
            1,
            inputs=formal_inputs,
            outputs=formal_outputs,
            type_constraints=[(f"T{i}", _TYPES, "") for i in range(len(inputs))],
            attributes=[schema.Attribute(key, kinds[kind], "", required=False) for key, kind in attributes.items()],
        ),
    )


SIMPLIFIED_LAYER_NORMALIZATION = _declare(
    "", "SimplifiedLayerNormalization", ("x", "scale"), 1, axis=int, epsilon=float, stash_type=int
)
GROUP_QUERY_ATTENTION = _declare(
    CONTRIB,
    "GroupQueryAttention",
    (
        "query",
        "key",
        "value",
        "past_key",
        "past_value",
        "seqlens_k",
        "total_sequence_length",
        "cos_cache?",
        "sin_cache?",
    ),
    3,
    num_heads=int,
    kv_num_heads=int,
    local_window_size=int,
    sliding_window_cache=int,
    do_rotary=int,
)
QUICK_GELU = _declare(CONTRIB, "QuickGelu", ("x",), 1, alpha=float)
ATTENTION = _declare("", "Attention", ("query", "key", "value", "mask"), 1, q_num_heads=int, kv_num_heads=int)
SEGMENT_ATTENTION = _declare(
    PLACEHOLDER, "SegmentAttention", ("query", "key", "value", "segments"), 1, num_heads=int, kv_num_heads=int
)


def _rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    return SIMPLIFIED_LAYER_NORMALIZATION(x, weight, axis=-1, epsilon=epsilon, stash_type=1)


def _gated(gate: Any, alpha: float) -> Any:
    return QUICK_GELU(gate, alpha=alpha)


def _group_query_attention(
    query: Any, key: Any, value: Any, past_key: Any, past_value: Any, lengths: Any, total: Any, cos: Any, sin: Any,
    num_heads: int, num_kv_heads: int, window: int, rotary: bool, window_cache: bool,
) -> Any:  # fmt: skip
    evicts: dict[str, Any] = {"sliding_window_cache": 1} if window_cache else {}
    return GROUP_QUERY_ATTENTION(
        query, key, value, past_key, past_value, lengths, total, *((cos, sin) if rotary else ()),
        num_heads=num_heads, kv_num_heads=num_kv_heads, local_window_size=window, do_rotary=int(rotary),
        **evicts,
    )  # fmt: skip


def _rotary(x: Any, cos: Any, sin: Any, num_heads: int) -> Any:
    front: Any = op.Constant(value_ints=[0])
    batch = (op.Unsqueeze(value, front) for value in (x, cos, sin))  # the kernel wants a batch of sequences
    return op.Squeeze(op.RotaryEmbedding(*batch, num_heads=num_heads), front)


def _attention(query: Any, key: Any, value: Any, visible: Any, num_heads: int, num_kv_heads: int) -> Any:
    # ONNX Runtime's kernel does not repeat a mask along the queries.
    queries: Any = op.Shape(query, start=1, end=2)
    one: Any = op.Constant(value_ints=[1])
    repeats: Any = op.Concat(one, one, queries, one, axis=0)
    mask = op.Expand(visible, repeats)
    return ATTENTION(query, key, value, mask, q_num_heads=num_heads, kv_num_heads=num_kv_heads)


def _segment_attention(query: Any, key: Any, value: Any, segments: Any, num_heads: int, num_kv_heads: int) -> Any:
    return SEGMENT_ATTENTION(query, key, value, segments, num_heads=num_heads, kv_num_heads=num_kv_heads)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    # The transposition is folded into the stored weight by exporter.passes_weights.
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _silu(x: Any) -> Any:
    return op.Mul(x, op.Sigmoid(x))


def _embedding(weight: Any, indices: Any, *_: Any) -> Any:
    return op.Gather(weight, indices, axis=0)


def _floor_divide(x: Any, divisor: Any) -> Any:
    # ONNX rounds towards zero; the models divide counts and positions only, which are never negative.
    return op.Div(x, divisor)


def _index(x: Any, indices: Sequence[Any]) -> Any:
    if len(indices) != 1:
        raise ValueError("only one index, of the first axis, is translated")
    return op.Gather(x, indices[0], axis=0)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators of the program → functions that record ONNX operators."""
    fused, aten = torch.ops.exaone, torch.ops.aten
    return {
        fused.rms_norm.default: _rms_norm,
        fused.gated.default: _gated,
        fused.group_query_attention.default: _group_query_attention,
        fused.rotary.default: _rotary,
        fused.attention.default: _attention,
        fused.segment_attention.default: _segment_attention,
        aten.linear.default: _linear,
        aten.silu.default: _silu,
        aten.embedding.default: _embedding,
        aten.floor_divide.default: _floor_divide,
        aten.index.Tensor: _index,
    }
