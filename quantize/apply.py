"""A recipe applied to graphs: the room's main path.

No weight is read here: the graphs get lazy initializers, and whoever writes them to disk does the work, one
weight at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from model.bundle import GRAPHS, WeightInfo
from quantize.lazy import LazyWeight
from quantize.methods import METHODS
from quantize.nodes import WeightUse, find_weights, replace_use
from quantize.recipe import Recipe, Rule, fitting_scheme
from quantize.scheme import BLOCK_SIZES, Scheme, Statistics

log = logging.getLogger("exaone_export.quantize")


@dataclass(frozen=True)
class WeightReport:
    """How one weight is stored.

    Attributes:
        graph: name of its graph.
        path: full module path, e.g. ``decoder.layers.3.mlp.down_proj``.
        parameters: number of weights.
        scheme: the scheme in use; None if it stays float.
        reason: why it stays float, or has another block size than its rule says; else empty.
        stored_bits: on disk, scales and zero points included.
        shared_with: path of an earlier weight of the same graph with the same bytes; else empty.
    """

    graph: str
    path: str
    parameters: int
    scheme: Scheme | None
    reason: str
    stored_bits: int
    shared_with: str = ""

    @property
    def info(self) -> WeightInfo:
        """The weight's entry in a bundle's manifest."""
        if self.scheme is None:
            return WeightInfo(0, 0, False, "", self.parameters, self.reason)
        scheme = self.scheme
        return WeightInfo(scheme.bits, scheme.block_size, scheme.symmetric, scheme.method, self.parameters, self.reason)


@dataclass(frozen=True)
class QuantizationReport:
    """What a recipe did to a set of graphs."""

    recipe: str
    weights: tuple[WeightReport, ...]
    unmatched_rules: tuple[Rule, ...]

    @property
    def parameters(self) -> int:
        """Number of weights, those shared by two modules of a graph counted once."""
        return sum(weight.parameters for weight in self._stored())

    @property
    def bits_per_weight(self) -> float:
        """Mean bits on disk of a weight, scales and zero points included; 0 for no weights."""
        parameters = self.parameters
        return sum(weight.stored_bits for weight in self._stored()) / parameters if parameters else 0.0

    @property
    def kept_float(self) -> tuple[WeightReport, ...]:
        """The weights that stay float."""
        return tuple(weight for weight in self.weights if weight.scheme is None)

    def parameters_by_scheme(self) -> dict[str, int]:
        """``{"int4 g32 sym rtn": parameters, ..., "float": parameters}``."""
        totals: dict[str, int] = {}
        for weight in self._stored():
            label = "float" if weight.scheme is None else str(weight.scheme)
            totals[label] = totals.get(label, 0) + weight.parameters
        return totals

    def manifest_weights(self) -> dict[str, WeightInfo]:
        """Module path → how it is stored, as a bundle's manifest lists it."""
        return {weight.path: weight.info for weight in self.weights}

    def warnings(self) -> list[str]:
        """What the user may not have meant, as sentences."""
        return [
            f"recipe {self.recipe}: rule {rule.match!r} decides about no weight of this model"
            for rule in self.unmatched_rules
        ]

    def _stored(self) -> list[WeightReport]:
        return [weight for weight in self.weights if not weight.shared_with]


def quantize_models(
    models: Mapping[str, ir.Model],
    recipe: Recipe,
    *,
    accuracy_level: int = 4,
    statistics: Mapping[str, Statistics] | None = None,
) -> QuantizationReport:
    """Quantizes the weights of graphs in place, without reading any.

    The weights are two-dimensional float initializers named ``<module>.weight``, of any tensor kind: lazy ones
    over a checkpoint, or external data of a float bundle. Their replacements are lazy; reading one raises
    NumericalError where the weight holds NaN or Inf. Read the initializers of one weight one after another,
    each once: that way every weight is quantized once and forgotten.

    Args:
        models: graph name ("decoder", ...) → graph.
        recipe: which weight gets which scheme.
        accuracy_level: of MatMulNBits: 4 lets the CPU kernel round activations to int8 per block, which adds about
            0.5 % to a product's error; 0 keeps them in float, but is four times slower for one token with 4 bits
            and 200 times with 8, where it unpacks the whole weight every time.
        statistics: module path → what calibration knows about the module's inputs.
    """
    reports: list[WeightReport] = []
    used: set[Rule] = set()
    for name, model in models.items():
        graph = _GraphQuantizer(model.graph, accuracy_level, statistics or {})
        for use in find_weights(name, model.graph):
            rule = recipe.match(use.path)
            used |= {rule} if rule else set()
            reports.append(graph.apply(use, rule))
    unmatched = tuple(rule for rule in recipe.rules if rule not in used and not _for_absent_graph(rule, models))
    report = QuantizationReport(recipe.name, tuple(reports), unmatched)
    for warning in report.warnings():
        log.warning("%s", warning)
    return report


class _GraphQuantizer:
    """Applies rules to the weights of one graph, and remembers which of them are the same bytes."""

    def __init__(self, graph: ir.Graph, accuracy_level: int, statistics: Mapping[str, Statistics]) -> None:
        self._graph = graph
        self._accuracy_level = accuracy_level
        self._statistics = statistics
        self._weights: dict[str, LazyWeight] = {}
        self._first_path: dict[str, str] = {}

    def apply(self, use: WeightUse, rule: Rule | None) -> WeightReport:
        """Replaces one node, or leaves it."""
        scheme, reason = _decide(use, rule)
        if scheme is None:
            rows, columns = use.source.shape
            key, bits = f"{use.source.key}|float", rows * columns * use.source.tensor.dtype.itemsize * 8
        else:
            weight = LazyWeight(use.source, scheme, METHODS[scheme.method], self._statistics.get(use.path))
            key, bits = weight.key, weight.stored_bits
            weight = self._weights.setdefault(key, weight)
            replace_use(self._graph, use, weight, self._accuracy_level)
        first = self._first_path.setdefault(key, use.path)
        shared_with = "" if first == use.path else first
        return WeightReport(use.graph, use.path, use.parameters, scheme, reason, int(bits), shared_with)


def _decide(use: WeightUse, rule: Rule | None) -> tuple[Scheme | None, str]:
    """The scheme a weight gets, and why it is not the rule's."""
    if rule is None:
        return None, "no rule of the recipe matches"
    if rule.scheme is None:
        return None, "the recipe keeps it float"
    if use.kind == "other":
        return None, f"it is read by {use.node.op_type}, which has no kernel for quantized weights"
    columns = use.source.shape[1]
    scheme = fitting_scheme(rule.scheme, columns)
    if scheme is None:
        return None, f"its {columns} inputs divide by no block from {BLOCK_SIZES[0]} to {rule.scheme.block_size}"
    if scheme != rule.scheme:
        return scheme, f"its {columns} inputs do not divide by {rule.scheme.block_size}"
    return scheme, ""


def _for_absent_graph(rule: Rule, models: Mapping[str, ir.Model]) -> bool:
    """Whether a rule speaks of a graph that exists in general, but not in this model."""
    graph = rule.match.partition(".")[0]
    return graph in GRAPHS and graph not in models
