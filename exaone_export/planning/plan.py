"""The best recipe within a bound, for one checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exaone_export.calibration.encode import load_prompts
from exaone_export.planning.bound import Bound
from exaone_export.planning.sensitivity import Evaluator, measure_losses
from exporter.assets import find_assets
from exporter.needs import Plan as ExportPlan
from exporter.parts import INLINE_BYTES
from model.bundle import FLOAT_BYTES
from model.config import ExaoneConfig, load_config
from model.errors import UsageError
from model.load import load_exaone
from model.progress import NullProgress, Progress
from model.source import WeightSource
from model.tasks import AUTO, GENERATION, choose_task
from model.weights import Checkpoint, expected_tensors
from quantize.apply import Quantizer
from quantize.plan import Group, Option, choose, comments, find_groups, plan_recipe, possible
from quantize.recipe import Recipe
from quantize.sizes import expected_scheme, part_bytes

_WHAT = "cannot plan"
_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Planned:
    """A recipe within a bound, and what is predicted of its bundle.

    Attributes:
        file: where it is written.
        recipe: to export with.
        bits_per_weight: as the manifest will count them.
        bytes: that the bundle will have at most.
        predicted_kld: sum of the groups' losses, nats: what the language model's rounding costs on the prompts.
        measured_kld: the same with all groups rounded together.
        exact: whether every loss was measured; else most are reckoned from the weights' errors.
    """

    file: Path
    recipe: Recipe
    bits_per_weight: float
    bytes: int
    predicted_kld: float
    measured_kld: float
    exact: bool

    @property
    def summary(self) -> dict[str, Any]:
        """All but the recipe, as plain values."""
        return {name: value for name, value in vars(self).items() if name not in ("file", "recipe")} | {
            "file": str(self.file)
        }


def plan_quantization(
    source: Path,
    bound: Bound,
    *,
    dtype: str = "fp32",
    task: str = AUTO,
    calibration: Path | None = None,
    progress: Progress | None = None,
) -> Planned:
    """Chooses bits and block for every weight of a checkpoint, and writes the recipe.

    Args:
        source: the checkpoint's folder.
        bound: what to stay within, and where to write the recipe.
        dtype: of what stays float, scales included.
        task: as for an export; one that generates.
        calibration: prompts to measure on; None takes those that come with the package for calibration.
        progress: told how far it is.

    Raises:
        UsageError: the bound cannot be kept, the model does not generate or is quantized already, or prompts are wrong.
        CheckpointError, NumericalError: the checkpoint is damaged.
    """
    progress = progress or NullProgress()
    config = load_config(source)
    config = replace(config, task=choose_task(task, config.architecture, vision=config.vision is not None))
    if config.task not in GENERATION:
        raise UsageError(_WHAT, "--quantize auto", f"{config.task} tells no next token", "Name int8, int4 or a recipe")
    if config.quantization is not None:
        raise UsageError(_WHAT, "--quantize auto", "the checkpoint is quantized already", "Name int4 or a recipe")
    sizes = _Sizes(source, config, FLOAT_BYTES[dtype])
    groups = find_groups(config, sizes.shapes)
    choices = [possible(group, sizes.shapes, sizes.float_bytes) for group in groups]
    sizes.check(bound, groups, choices)
    prompts = load_prompts(source, calibration)
    evaluator = Evaluator(load_exaone(source), prompts, np.dtype(_scale_type(dtype)))
    losses, exact = measure_losses(evaluator, groups, choices, progress)
    options = [
        [Option(scheme, size, loss) for (scheme, size), loss in zip(own, found, strict=True)]
        for own, found in zip(choices, losses, strict=True)
    ]
    chosen, recipe = sizes.within(bound, groups, options)
    together = {path: o.scheme for g, o in zip(groups, chosen, strict=True) for path in g.paths}
    found = Planned(
        file=bound.file,
        recipe=recipe,
        bits_per_weight=sizes.bits_per_weight(recipe),
        bytes=sizes.bundle(recipe),
        predicted_kld=sum(option.loss for option in chosen),
        measured_kld=evaluator.divergence(together),
        exact=exact,
    )
    bound.file.write_text(comments(recipe, _explained(found, prompts.name, groups, options)), encoding="utf-8")
    return found


class _Sizes:
    """What a recipe makes of a checkpoint, in bytes."""

    def __init__(self, source: Path, config: ExaoneConfig, float_bytes: int) -> None:
        checkpoint = Checkpoint.open(source)
        self.float_bytes = float_bytes
        self._config = config
        self._refs: Mapping[str, WeightSource] = checkpoint.bind(config)
        self._assets = find_assets(source)
        shapes = expected_tensors(config, draft=checkpoint.has_draft_head).values()
        self._parameters = sum(math.prod(shape) for shape in shapes)
        self.shapes = {
            name.removesuffix(".weight"): ref.shape
            for name, ref in self._refs.items()
            if name.endswith(".weight") and len(ref.shape) > 1
        }

    def stored(self, recipe: Recipe) -> int:
        """Bytes of all weights; what two modules share counts once, but for small parts, which every graph has."""
        found: dict[object, int] = {}
        for name, ref in self._refs.items():
            path = name.removesuffix(".weight") if name.endswith(".weight") else ""
            scheme = expected_scheme(recipe, path, ref) if path else None
            # In float a tied head is stored the other way round than its table.
            turned = scheme is None and not path.endswith(".embed_tokens")
            for part, size in part_bytes(ref.shape, scheme, self.float_bytes).items():
                own = name.partition(".")[0] if size <= INLINE_BYTES else ""
                found[ref.file, ref.offset, scheme, turned, part, own] = size
        return sum(found.values())

    def bits_per_weight(self, recipe: Recipe) -> float:
        """As the manifest will say."""
        return 8 * self.stored(recipe) / self._parameters

    def bundle(self, recipe: Recipe) -> int:
        """Of the whole bundle, at most."""
        plan = ExportPlan(self._config, self._refs, Quantizer(recipe), self.float_bytes)
        return plan.need(self._assets.values()).bundle

    def check(self, bound: Bound, groups: Sequence[Group], choices: Sequence[Sequence[tuple[object, int]]]) -> None:
        """Refuses a bound that cannot be kept, before anything is measured."""
        smallest = [[Option(*own[0], 0.0)] for own in choices]  # type: ignore[arg-type]
        self.within(bound, groups, smallest)

    def within(
        self, bound: Bound, groups: Sequence[Group], options: Sequence[Sequence[Option]]
    ) -> tuple[list[Option], Recipe]:
        """The best choice that keeps a bound, and its recipe.

        Raises:
            UsageError: there is none.
        """
        least = [min(own, key=lambda option: option.bytes) for own in options]
        smallest = plan_recipe(_name(bound), groups, least)
        fixed = self.stored(smallest) - sum(option.bytes for option in least)
        if bound.max_bytes is not None:
            budget = bound.max_bytes - (self.bundle(smallest) - sum(option.bytes for option in least))
        else:
            assert bound.bits_per_weight is not None
            budget = math.floor(bound.bits_per_weight * self._parameters / 8) - fixed
        while True:
            chosen = choose(options, budget)
            if chosen is None:
                raise self._too_small(bound, smallest)
            recipe = plan_recipe(_name(bound), groups, chosen)
            excess = 0 if bound.max_bytes is None else self.bundle(recipe) - bound.max_bytes
            if excess <= 0:
                return chosen, recipe
            budget -= excess  # what lies between tensors, so that each begins at a round address

    def _too_small(self, bound: Bound, smallest: Recipe) -> UsageError:
        if bound.max_bytes is not None:
            where, least = "--max-bytes", f"{self.bundle(smallest):,} bytes"
        else:
            where, least = "--bits-per-weight", f"{math.ceil(1000 * self.bits_per_weight(smallest)) / 1000:.3f}"
        why = f"the smallest plan for this model takes {least}, vision encoder and norms included"
        return UsageError(_WHAT, where, why, "Allow at least that much")


def _name(bound: Bound) -> str:
    if bound.max_bytes is not None:
        return f"auto-{bound.max_bytes}-bytes"
    return f"auto-{bound.bits_per_weight:g}-bits"


def _scale_type(dtype: str) -> str | type:
    if dtype != "bf16":
        return _TYPES[dtype]
    import ml_dtypes

    return ml_dtypes.bfloat16


def _explained(found: Planned, prompts: str, groups: Sequence[Group], options: Sequence[Sequence[Option]]) -> list[str]:
    """Comment lines for the recipe: what it is, and every group's losses, the most sensitive first."""
    how = "each measured" if found.exact else "measured in a few layers, elsewhere reckoned from the weights' errors"
    lines = [
        "Planned by exaone-export: the least loss within a bound. It can be edited, and given to --quantize.",
        f"{found.bits_per_weight:.4f} bits per weight, at most {found.bytes:,} bytes.",
        f"KL divergence that rounding the language model costs on the prompts ({prompts}), nats: "
        f"{found.measured_kld:.4g} measured, {found.predicted_kld:.4g} as the sum of the groups'.",
        f"Losses of each group alone under its choices ({how}):",
    ]
    order = sorted(range(len(groups)), key=lambda i: -options[i][0].loss)
    for i in order:
        own = ", ".join(f"int{o.scheme.bits} g{o.scheme.block_size} {o.loss:.3g}" for o in options[i])
        lines.append(f"  {groups[i].name}: {own}")
    return lines
