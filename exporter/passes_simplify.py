"""Folding and tidying, as onnxscript's optimizer does it, with those of its rules that fit these graphs.

Its own list also looks for pairs of slices that are one split, for which it walks the whole graph once for every slice:
a fifth of the time that tracing the largest model takes. No graph here has such a pair, nor convolutions.
"""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass, RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

_DEDUPLICATION = logging.getLogger("onnx_ir.passes.common.initializer_deduplication")
_ROUNDS = 2
# In the order of onnxscript's own list: of the rules that match a node the first is applied.
_RULES = RewriteRuleSet(
    [
        *rules.mul_by_1_rule.commute(),
        *rules.add_0_rule.commute(),
        rules.sub_0_rule,
        rules.div_by_1_rule,
        rules.two_reshapes_matmul_reshape_rule,
        rules.one_reshape_matmul_reshape_rule,
        rules.cast_constant_of_shape_rule,
        rules.cast_constant_of_shape_without_value_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.materialize_reshape_shape_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.flatten_to_reshape_rule,
        rules.reshape_reshape_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.squeeze_reshape_1d_rule,
    ]
)


def simplify(model: ir.Model) -> int:
    """Folds constants, removes casts, slices and nodes of no effect, merges equal ones; counts nodes saved."""
    before = len(model.graph)
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        folded = fold_constants_ir(model, onnx_shape_inference=True).modified
        rewritten = RewritePass(_RULES)(model).modified
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass()(model)
        if not (folded or rewritten):
            break
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    level = _DEDUPLICATION.level
    _DEDUPLICATION.setLevel(logging.ERROR)  # it warns of every weight that has no data yet
    try:
        common.DeduplicateInitializersPass()(model)
    finally:
        _DEDUPLICATION.setLevel(level)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)
    return before - len(model.graph)
