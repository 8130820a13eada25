"""What became of the weights of a set of graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model.bundle import WeightInfo
from quantize.recipe import Rule
from quantize.scheme import Scheme


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
        return WeightInfo(
            scheme.bits, scheme.block_size, scheme.symmetric, scheme.method, self.parameters, self.reason,
            scheme.activations, scheme.rotate,
        )  # fmt: skip


@dataclass(frozen=True)
class QuantizationReport:
    """What a recipe did to a set of graphs, and what it holds them to when they are verified."""

    recipe: str
    weights: tuple[WeightReport, ...]
    unmatched_rules: tuple[Rule, ...]
    limits: Mapping[str, float] = field(default_factory=dict)

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
