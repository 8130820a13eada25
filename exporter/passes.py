"""The graph passes, in their order. Each changes a model in place and returns how often it did its work.

Weights have no data at this point, so no pass looks into one.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

from exporter.lowering_decode import lower_decode_attention
from exporter.lowering_segments import lower_segment_attention
from exporter.passes_names import forget_tracing, label_layers, name_nodes, name_shapes
from exporter.passes_simplify import simplify
from exporter.passes_weights import fix_reshapes, fold_transposes


def remove_leftovers(model: ir.Model) -> int:
    """Merges equal nodes and removes what nothing uses; counts nodes saved."""
    before = len(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    return before - len(model.graph)


PASSES: tuple[tuple[str, Callable[[ir.Model], int]], ...] = (
    ("simplify", simplify),
    ("fold_transposes", fold_transposes),
    ("fix_reshapes", fix_reshapes),
    ("lower_segment_attention", lower_segment_attention),
    ("lower_decode_attention", lower_decode_attention),
    ("remove_leftovers", remove_leftovers),
    ("label_layers", label_layers),
    ("name_nodes", name_nodes),
    ("name_shapes", name_shapes),
    ("forget_tracing", forget_tracing),
)

CPU_ONLY = frozenset({"lower_decode_attention"})


def run_passes(model: ir.Model, for_cpu: bool = False) -> dict[str, int]:
    """Runs all passes on a traced model and returns what each did, by its name.

    With `for_cpu` those too that are good for the CPU only.
    """
    return {name: run(model) for name, run in PASSES if for_cpu or name not in CPU_ONLY}


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs, subgraphs included, by its name."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
