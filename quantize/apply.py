"""A recipe applied to graphs: the room's main path.

No weight is read here: the graphs get lazy initializers, and whoever writes them to disk does the work, one
weight at a time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from model.bundle import GRAPHS
from model.config import ExaoneConfig
from model.errors import UsageError
from model.progress import Progress
from model.source import WeightSource
from quantize.calibration.job import Calibration
from quantize.calibration.needs import calibration_memory
from quantize.columns import ColumnWeight
from quantize.cuda import slow_products
from quantize.decide import Given, decide, products_of
from quantize.imported import GraphImporter, packed_source
from quantize.join import join_products
from quantize.lazy import LazyParts, LazyWeight
from quantize.methods import METHODS
from quantize.nodes import WeightUse, find_weights, replace_use
from quantize.recipe import Recipe, Rule
from quantize.report import QuantizationReport, WeightReport
from quantize.scheme import INT8, Scheme, Statistics
from quantize.sizes import expected_scheme, part_bytes

log = logging.getLogger("exaone_export.quantize")
# Modules that models have or lack, depending on their task.
_PARTS = ("embed_tokens", "lm_head", "score", "qa_outputs")
# What manifests call the recipe where there was none.
NONE, IMPORTED = "none", "imported"
_FLOAT32 = 4  # bytes
CPU = "cpu"
# accuracy_level of MatMulNBits, which only the CPU's kernel looks at: activations rounded to 8 bits, or as they are.
ROUNDED, EXACT = 4, 0


@dataclass(frozen=True)
class Quantizer:
    """A recipe as a change of graphs that the exporter applies before it writes them.

    Attributes:
        recipe: which weight gets which scheme; None only takes over what the checkpoint holds quantized.
        threads: that quantize side by side; the bytes do not depend on it.
        calibration: what methods that look at the weights' inputs are given; None for those that do not.
        target: what the graphs will run on, "cpu" or "cuda".
    """

    recipe: Recipe | None
    threads: int = 1
    calibration: Calibration | None = None
    target: str = CPU

    @property
    def fingerprint(self) -> str:
        """Another text for another recipe, or other prompts."""
        if self.recipe is None:
            return NONE
        own = f"{self.recipe.name[:60]} ({hashlib.sha256(self.recipe.to_toml().encode()).hexdigest()[:12]})"
        return own if self.calibration is None else f"{own}, {self.calibration.fingerprint}"

    @property
    def remarks(self) -> dict[str, Any]:
        """What the manifest's ``source`` says of it: the prompts that were looked at."""
        return {} if self.calibration is None else {"calibration": self.calibration.prompts.describe()}

    def working_bytes(self, config: ExaoneConfig) -> int:
        """Bytes on the disk that are needed until the bundle is complete, besides it; the graphs are quantized."""
        return 0 if self.calibration is None else self.calibration.bytes(config)

    def working_memory(self, config: ExaoneConfig, refs: Mapping[str, WeightSource]) -> int:
        """Bytes of memory that `prepare` takes."""
        if self.recipe is None or self.calibration is None:
            return 0
        return calibration_memory(self.recipe, self.calibration.prompts, config, refs)

    def prepare(self, folder: Path, config: ExaoneConfig, refs: Mapping[str, WeightSource], progress: Progress) -> None:
        """What has to be done before the first weight is written: see `Calibration.prepare`."""
        if self.calibration is not None:
            self.calibration.prepare(folder, config, refs, progress)

    def for_target(self, target: str) -> Quantizer:
        """The same for graphs that will run on "cpu" or "cuda".

        Raises:
            UsageError: naming the first rule for which the execution provider has no kernels.
        """
        rule = self.recipe.cpu_rule if self.recipe is not None else None
        if rule is not None and target != CPU:
            why = f'rule {rule.match!r} wants products of integers, activations = "int8", which only the CPU has'
            raise UsageError("cannot quantize", f"--target {target}", why, "Use int8 or int4 for it")
        recipe = self.recipe.for_target(target) if self.recipe is not None else None
        return replace(self, recipe=recipe, target=target)

    def part_bytes(self, path: str, source: WeightSource, float_bytes: int) -> dict[str, int]:
        """Bytes of each part that a weight will be stored in: see `quantize.sizes`.

        "rotation" is a matrix that all rotated weights of a graph share.
        """
        scheme = expected_scheme(self.recipe, path, source)
        turned = {"rotation": _FLOAT32 * scheme.rotate**2} if scheme is not None and scheme.rotate else {}
        return part_bytes(source.shape, scheme, float_bytes) | turned

    def __call__(self, models: Mapping[str, ir.Model]) -> QuantizationReport:
        """Quantizes the graphs in place."""
        if self.recipe is None:
            report = import_models(models, threads=self.threads)
        else:
            level = ROUNDED if self.target == CPU else EXACT
            report = quantize_models(
                models, self.recipe, accuracy_level=level, threads=self.threads, calibration=self.calibration
            )
        for warning in slow_products(models) if self.target != CPU else ():
            log.warning("%s", warning)
        return report


def quantize_models(
    models: Mapping[str, ir.Model],
    recipe: Recipe,
    *,
    accuracy_level: int = ROUNDED,
    statistics: Mapping[str, Statistics] | None = None,
    threads: int = 1,
    calibration: Calibration | None = None,
) -> QuantizationReport:
    """Quantizes the weights of graphs in place, without reading any.

    Weights that the checkpoint holds quantized keep their codes where the kernels can read them, whatever the recipe
    says (see `quantize.imported`); the recipe decides about all others.

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
        statistics: module path → what is known about the module's inputs.
        threads: that quantize side by side when a weight is read; the bytes do not depend on it.
        calibration: takes the weights over whose methods it can help; it has to be prepared before they are read.

    Raises:
        UsageError: a method needs statistics, and there is neither a calibration nor any for that weight.
    """
    reports: list[WeightReport] = []
    used: set[Rule] = set()
    given = Given(statistics or {}, calibration, products_of(models, recipe) if calibration is not None else {})
    for name, model in models.items():
        graph = _GraphQuantizer(model.graph, accuracy_level, given, threads)
        importer = GraphImporter(model.graph, accuracy_level, threads)
        ruled = [(use, recipe.match(use.path)) for use in find_weights(name, model.graph)]
        given.scale_inputs(model.graph, ruled)
        for use, rule in ruled:
            used |= {rule} if rule else set()
            imported = importer.apply(use)
            if isinstance(imported, WeightReport):
                reports.append(imported)
                continue
            weight = graph.apply(use, rule)
            reports.append(replace(weight, reason="; ".join(filter(None, (imported, weight.reason)))))
        join_products(model.graph)
    unmatched = tuple(rule for rule in recipe.rules if rule not in used and not _for_absent_part(rule, models, reports))
    report = QuantizationReport(recipe.name, tuple(reports), unmatched, recipe.limits)
    for warning in report.warnings():
        log.warning("%s", warning)
    return report


def import_models(
    models: Mapping[str, ir.Model], *, accuracy_level: int = EXACT, threads: int = 1
) -> QuantizationReport:
    """Takes over the weights that the checkpoint holds quantized, in place, and leaves all others as they are.

    Args:
        models, threads: as in `quantize_models`.
        accuracy_level: likewise; 0 gives what the dequantized model gives, and is slow.
    """
    reports: list[WeightReport] = []
    for name, model in models.items():
        importer = GraphImporter(model.graph, accuracy_level, threads)
        for use in find_weights(name, model.graph):
            if packed_source(use) is None:
                continue
            imported = importer.apply(use)
            if isinstance(imported, str):
                bits = 8 * use.parameters * use.source.tensor.dtype.itemsize
                imported = WeightReport(use.graph, use.path, use.parameters, None, imported, int(bits))
            reports.append(imported)
        join_products(model.graph)
    taken = any(report.scheme is not None for report in reports)
    if taken and not accuracy_level:
        log.warning(
            "The checkpoint is quantized. Without a recipe its products are computed exactly, which is slow; "
            "--quantize int4 or int8 keeps its codes and uses the fast kernels"
        )
    return QuantizationReport(IMPORTED if taken else NONE, tuple(reports), ())


class _GraphQuantizer:
    """Applies rules to the weights of one graph, and remembers which of them are the same bytes."""

    def __init__(self, graph: ir.Graph, accuracy_level: int, given: Given, threads: int) -> None:
        self._graph = graph
        self._accuracy_level = accuracy_level
        self._given = given
        self._threads = threads
        self._weights: dict[str, LazyParts] = {}
        self._first_path: dict[str, str] = {}

    def apply(self, use: WeightUse, rule: Rule | None) -> WeightReport:
        """Replaces one node, or leaves it."""
        scheme, reason = decide(use, rule)
        if scheme is None:
            rows, columns = use.source.shape
            key, bits = f"{use.source.key}|float", rows * columns * use.source.tensor.dtype.itemsize * 8
        else:
            scheme, reason = self._given.scheme(use, scheme, reason)
            weight = self._given.adopt(use, self._lazy(use, scheme))
            key, bits = weight.key, weight.stored_bits
            weight = self._weights.setdefault(key, weight)
            replace_use(self._graph, use, weight, self._accuracy_level)
        first = self._first_path.setdefault(key, use.path)
        shared_with = "" if first == use.path else first
        return WeightReport(use.graph, use.path, use.parameters, scheme, reason, int(bits), shared_with)

    def _lazy(self, use: WeightUse, scheme: Scheme) -> LazyWeight:
        kind = ColumnWeight if scheme.activations == INT8 else LazyWeight
        known = self._given.statistics.get(use.path)
        return kind(use.source, scheme, METHODS[scheme.method], known, self._threads)


def _for_absent_part(rule: Rule, models: Mapping[str, ir.Model], weights: Sequence[WeightReport]) -> bool:
    """Whether a rule speaks of a graph, an embedding or a head that exists in general, but not in this model."""
    graph, module = rule.match.partition(".")[0], rule.match.rpartition(".")[2]
    if graph in GRAPHS and graph not in models:
        return True
    return module in _PARTS and not any(weight.path.endswith(f".{module}") for weight in weights)
