"""What a weight gets: its rule's scheme, or what comes close; and what stands for it where its inputs are looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from model.errors import UsageError
from quantize.calibration.job import Calibration
from quantize.imported import packed_source
from quantize.lazy import LazyParts, LazyWeight
from quantize.methods import NEEDS, NOTHING, SCALED, USES
from quantize.nodes import WeightUse, find_weights
from quantize.recipe import DEFAULT, MOST_COLUMNS, WITHOUT_INPUTS, Recipe, Rule, fitting_scheme
from quantize.scheme import BLOCK_SIZES, INT8, Scheme, Statistics


@dataclass(frozen=True)
class Given:
    """What is known about inputs.

    Attributes:
        statistics: module path → what is known about the module's inputs.
        calibration: that will know more; None for none.
        products: key of a stored tensor → the first module that multiplies with it, and its scheme.
    """

    statistics: Mapping[str, Statistics]
    calibration: Calibration | None
    products: Mapping[str, tuple[str, Scheme]]

    def scheme(self, use: WeightUse, scheme: Scheme, reason: str) -> tuple[Scheme, str]:
        """What a weight gets in place of what `decide` says, and why it is not its rule's scheme; raises UsageError."""
        shared = self._head(use)
        if shared is not None and replace(scheme, method=shared.method) == shared:
            return shared, ""
        if NEEDS[scheme.method] == NOTHING or use.path in self.statistics:
            return scheme, reason
        if scheme.method in SCALED and packed_source(use) is not None:  # nothing was put in front of it
            without = "the checkpoint holds it quantized"
            return replace(scheme, method=WITHOUT_INPUTS), "; ".join(filter(None, (reason, without)))
        if self.calibration is None:
            why = f"{scheme.method} looks at the inputs of {use.path}, and nothing is known about them"
            raise UsageError("cannot quantize", f"method {scheme.method}", why, "Export with --calibration")
        return scheme, reason

    def adopt(self, use: WeightUse, weight: LazyWeight) -> LazyParts:
        """What stands for a weight in the graph."""
        if self.calibration is None:
            return weight
        module = use.path
        if use.kind == "gather":
            module = self.products[use.source.key][0] if weight.scheme == self._head(use) else ""
        return self.calibration.adopt(use.path, weight, module)

    def scale_inputs(self, graph: ir.Graph, uses: Sequence[tuple[WeightUse, Rule | None]]) -> None:
        """Puts scales in front of products whose rule says "awq", one for all that read the same activations."""
        if self.calibration is None:
            return
        groups: dict[int, list[WeightUse]] = {}
        for use, rule in uses:
            scheme, _ = decide(use, rule)
            if scheme is not None and scheme.method in SCALED and use.kind == "matmul" and packed_source(use) is None:
                groups.setdefault(id(use.node.inputs[0]), []).append(use)
        for group in groups.values():
            self.calibration.scale_inputs(graph, group, [self.products[use.source.key][0] for use in group])

    def _head(self, use: WeightUse) -> Scheme | None:
        """The scheme of the head that a looked-up table is tied to, if that one's inputs decide for both."""
        _, scheme = self.products.get(use.source.key, ("", None))
        if use.kind != "gather" or scheme is None or scheme.method in SCALED or USES[scheme.method] == NOTHING:
            return None
        return scheme


def products_of(models: Mapping[str, ir.Model], recipe: Recipe) -> dict[str, tuple[str, Scheme]]:
    """Key of a stored tensor → the first module that multiplies with it, and the scheme that its rule means."""
    found: dict[str, tuple[str, Scheme]] = {}
    for name, model in models.items():
        for use in find_weights(name, model.graph):
            scheme, _ = decide(use, recipe.match(use.path))
            if use.kind == "matmul" and scheme is not None and packed_source(use) is None:
                found.setdefault(use.source.key, (use.path, scheme))
    return found


def decide(use: WeightUse, rule: Rule | None) -> tuple[Scheme | None, str]:
    """The scheme a weight gets, and why it is not the rule's."""
    if rule is None:
        return None, "no rule of the recipe matches"
    if rule.scheme is None:
        return None, "the recipe keeps it float"
    if use.kind == "other":
        return None, f"it is read by {use.node.op_type}, which has no kernel for quantized weights"
    columns = use.source.shape[1]
    table = use.kind == "gather"
    scheme = fitting_scheme(rule.scheme, columns, table=table)
    if scheme is None and rule.scheme.activations == INT8 and not table:
        return None, f"its {columns} inputs are more than {MOST_COLUMNS}, or not a multiple of 4"
    if scheme is None:
        largest = rule.scheme.block_size or DEFAULT.block_size
        return None, f"its {columns} inputs divide by no block from {BLOCK_SIZES[0]} to {largest}"
    if rule.scheme.activations == INT8:
        if scheme.rotate != rule.scheme.rotate and not table:
            return scheme, f"its {columns} inputs do not divide by {rule.scheme.rotate}"
        return scheme, "its rows are looked up, not multiplied" if table else ""
    reasons = []
    if scheme.block_size != rule.scheme.block_size:
        reasons.append(f"its {columns} inputs do not divide by {rule.scheme.block_size}")
    if scheme.method != rule.scheme.method:
        reasons.append("its rows are looked up, not multiplied")
    return scheme, "; ".join(reasons)
