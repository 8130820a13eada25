"""The graph passes, in their order. Each changes a model in place and returns how often it did its work.

Weights have no data at this point, so no pass looks into one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir
from onnx_ir.passes import common

from exporter.cuda_passes import add_next_ids, capture_lengths, compare_without_equal, fuse_norms
from exporter.lowering_decode import lower_decode_attention
from exporter.lowering_int8 import lower_int8_cache
from exporter.lowering_packed import lower_packed_attention
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
    ("lower_packed_attention", lower_packed_attention),
    ("lower_segment_attention", lower_segment_attention),
    ("lower_decode_attention", lower_decode_attention),
    ("fuse_norms", fuse_norms),
    ("capture_lengths", capture_lengths),
    ("compare_without_equal", compare_without_equal),
    ("add_next_ids", add_next_ids),
    ("remove_leftovers", remove_leftovers),
    ("label_layers", label_layers),
    ("name_nodes", name_nodes),
    ("name_shapes", name_shapes),
    ("forget_tracing", forget_tracing),
)

CPU_ONLY = frozenset({"lower_decode_attention"})
CUDA_ONLY = frozenset(
    {"lower_packed_attention", "fuse_norms", "capture_lengths", "compare_without_equal", "add_next_ids"}
)

# The CPU's attention does not normalise queries and keys.
NEVER_SHARED = frozenset({"fuse_norms"})


def run_passes(
    model: ir.Model,
    for_cpu: bool = False,
    for_cuda: bool = False,
    rings: Collection[int] | None = None,
    shared: bool = False,
) -> dict[str, int]:
    """Runs all passes on a traced model and returns what each did, by its name.

    With `for_cpu` those too that are good for the CPU only, with `for_cuda` those that are good for CUDA only. With
    `rings` keys and values are cached as integers, see `exporter.lowering_int8`. With `shared` those are left out that
    make nodes the CPU cannot run.
    """
    left_out = (frozenset() if for_cpu else CPU_ONLY) | (frozenset() if for_cuda else CUDA_ONLY)
    left_out |= NEVER_SHARED if shared else frozenset()
    counts = {}
    for name, run in PASSES:
        if name == "lower_decode_attention" and rings is not None:
            counts["lower_int8_cache"] = lower_int8_cache(model, rings)
        elif name not in left_out:
            counts[name] = run(model)
    return counts


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs, subgraphs included, by its name."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
