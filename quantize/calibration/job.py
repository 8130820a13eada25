"""A calibration from outside: which weights it is for, where it works, what it says of itself. Needs no torch yet."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from model.bundle import VISION_ENCODER
from model.config import ExaoneConfig
from model.errors import UsageError
from model.progress import Progress
from model.source import WeightSource
from quantize.calibration.plan import Plan
from quantize.calibration.prompts import PromptSet
from quantize.calibration.store import Factor, Store, StoredWeight
from quantize.lazy import LazyParts, LazyWeight
from quantize.methods import NEEDS, NOTHING, USES
from quantize.nodes import WeightUse, scale_inputs
from quantize.recipe import Recipe

log = logging.getLogger("exaone_export.quantize")
_WHAT = "cannot calibrate"
_FLOAT = 4


class Calibration:
    """What the weights of one export are calibrated on.

    Args:
        prompts: at least one.

    Attributes:
        prompts: as given.
        store: where what became of the weights is, once `prepare` is done.
    """

    def __init__(self, prompts: PromptSet) -> None:
        self.prompts, self.store = prompts, Store()
        self._weights: dict[str, LazyParts] = {}
        self._stored: dict[str, StoredWeight] = {}

    @property
    def fingerprint(self) -> str:
        """Another text for other prompts."""
        return f"calibrated on {self.prompts.name[:60]} ({self.prompts.sha256[:12]})"

    def adopt(self, path: str, weight: LazyParts, module: str) -> LazyParts:
        """Takes note of a quantized weight; what the graph gets in its place.

        Args:
            path: of the module that uses it.
            weight: quantized where it is written.
            module: the one whose inputs decide how it is rounded: `path`, or for a table the head that is tied to it;
                empty for a table that is looked up only.

        Raises:
            UsageError: it is of the vision encoder, its method needs statistics, and no prompt has an image.
        """
        self._weights[path] = weight
        if not isinstance(weight, LazyWeight) or not module or USES[weight.scheme.method] == NOTHING:
            return weight
        if path.startswith(f"{VISION_ENCODER}.") and not self.prompts.image_tokens:
            if NEEDS[weight.scheme.method] == NOTHING:
                return weight
            why = f"no prompt has an image, which {weight.scheme.method} needs for {path}"
            raise UsageError(_WHAT, self.prompts.name, why, "Add prompts with images")
        stored = StoredWeight(weight, module, self.store)
        stored = self._stored.setdefault(stored.key, stored)
        self._weights[path] = stored
        return stored

    def scale_inputs(self, graph: ir.Graph, uses: Sequence[WeightUse], modules: Sequence[str]) -> None:
        """Lets products of the same activations read them divided by a scale that is found while calibrating.

        Args:
            graph: that holds the products, changed in place; none of them is replaced yet.
            uses: the products.
            modules: whose inputs decide about each of them.
        """
        columns = uses[0].source.shape[1]
        scale_inputs(graph, uses, np.ones(columns, np.float32))
        value = uses[0].node.inputs[0]
        node = value.producer() if value is not None else None
        factor = node.inputs[1] if node is not None else None
        if factor is None:
            raise ValueError(f"nothing scales the inputs of {uses[0].path}")
        kind = uses[0].source.tensor.dtype
        factor.const_value = Factor(str(factor.name), columns, kind, modules[0], self.store)

    def bytes(self, config: ExaoneConfig) -> int:
        """Bytes on the disk while it works: what becomes of the weights, and hidden states of up to three steps."""
        weights = sum(weight.stored_bits // 8 for weight in self._stored.values())
        tokens = self.prompts.text_tokens + self.prompts.image_tokens
        rows, patches = 3 * tokens, sum(prompt.patches for prompt in self.prompts.prompts)
        seen = 2 * patches * config.vision.hidden_size if config.vision is not None else 0
        return weights + _FLOAT * (rows * config.text.hidden_size + seen)

    def prepare(self, folder: Path, config: ExaoneConfig, refs: Mapping[str, WeightSource], progress: Progress) -> None:
        """Runs the model over the prompts, or the rest of it; afterwards the weights can be written.

        Args:
            folder: to work in, that of an earlier run with the same source and options, if there is one.
            config, refs: of the model.
            progress: is told how far it has come.

        Raises:
            CheckpointError: a weight cannot be read.
            NumericalError: a weight, or an input of one, is NaN or infinite.
        """
        if not self._stored:
            return
        from quantize.calibration.run import Run, open_folder, run_on
        from quantize.calibration.stages import Stages

        self.store.fingerprint = self._content()
        open_folder(self.store, folder)
        plan, device = Plan(self._weights, refs), run_on()
        stages = Stages(config, refs, self.prompts, plan.rows, device).every
        done = Run(stages, refs, plan, self.store, device).finish(progress)
        if done:
            log.info("%d of %d layers were calibrated before", done, len(stages))

    def _content(self) -> str:
        """A hash of everything that the store's bytes depend on, but for the checkpoint and the libraries."""
        listing = [f"{path} {weight.key}" for path, weight in sorted(self._weights.items())]
        return hashlib.sha256("\n".join((self.prompts.sha256, *listing)).encode()).hexdigest()


def uses_calibration(recipe: Recipe, *, needs: bool) -> Sequence[str]:
    """The methods of a recipe that statistics help, in order; with `needs`, those that do not work without."""
    table = NEEDS if needs else USES
    methods = [rule.scheme.method for rule in recipe.rules if rule.scheme is not None]
    return list(dict.fromkeys(method for method in methods if table[method] != NOTHING))
