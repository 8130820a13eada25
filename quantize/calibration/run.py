"""Runs a model over its calibration prompts step by step, and quantizes what it meets on the way.

Every module's inputs are those of the quantized model up to there (Frantar et al., GPTQ, arXiv 2210.17323, do it layer
by layer; here it is product by product). A step that is done is durable: whoever is killed goes on behind the last one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from exporter import disk
from model.progress import Progress
from quantize.calibration.plan import Parts
from quantize.calibration.stages import Refs, Stage
from quantize.calibration.states import States
from quantize.calibration.statistics import Moments
from quantize.calibration.store import Store
from quantize.methods import HESSIAN, NOTHING
from quantize.scheme import Floats, Statistics


class Weights(Protocol):
    """What is done to weights: `quantize.calibration.plan.Plan`."""

    def need(self, path: str) -> str:
        """What of its inputs' statistics a module wants."""

    def changes(self, path: str) -> bool:
        """Whether its weight is another one in the quantized model."""

    def known(self, paths: Sequence[str], statistics: Statistics) -> Mapping[str, Statistics]:
        """What modules that read the same input are given of its statistics."""

    def quantize(self, path: str, statistics: Statistics | None) -> Parts:
        """The packed parts of its weight."""

    def restored(self, path: str, parts: Parts) -> Iterator[tuple[slice, Floats]]:
        """The rows they stand for."""


class _Seen(Exception):
    """The module whose inputs are wanted has got them."""


class Run:
    """One pass over all steps.

    Args:
        stages: the steps, in order.
        refs: canonical name → weight.
        weights: what is done to them.
        store: where what became of them goes; its folder exists.
        device: where to run.
    """

    def __init__(self, stages: list[Stage], refs: Refs, weights: Weights, store: Store, device: torch.device) -> None:
        self._stages, self._refs, self._weights, self._store, self._device = stages, refs, weights, store, device
        self._states: dict[str, States] = {}

    def finish(self, progress: Progress) -> int:
        """Does the steps that are not done yet; the number of those that were.

        Raises:
            CheckpointError: a weight cannot be read.
            NumericalError: a weight or an input of one is NaN or infinite.
            OSError: the disk is full, or the like.
        """
        try:
            done = self._found()
            progress.start("calibrating", len(self._stages), "layers")
            progress.advance(done)
            for number in range(done, len(self._stages)):
                self._step(number)
                progress.advance(1)
            progress.finish()
        finally:
            for states in self._states.values():
                states.close()
        return done

    def _found(self) -> int:
        """How many of the first steps are done; the states behind them that later ones read are open then."""
        sealed: list[str] = []
        for number, stage in enumerate(self._stages):
            digest = self._store.find(number, stage.name)
            if digest is None:
                break
            sealed.append(digest)
        if len(sealed) == len(self._stages):
            return len(sealed)
        for count in range(len(sealed), 0, -1):
            if all(self._reopen(number, sealed[number]) for number in self._read_later(count)):
                return count
        return 0

    def _reopen(self, number: int, digest: str) -> bool:
        """Opens the states behind a step that is done, if they are still what they were."""
        stage = self._stages[number]
        path = self._store.path(number, stage.name, "states")
        if not path.is_file():
            return False
        states = self._states.pop(stage.name, None) or States(path, stage.counts, stage.width)
        self._states[stage.name] = states
        return states.holds(digest)

    def _read_later(self, count: int) -> list[int]:
        """The steps among the first `count` whose states later ones read."""
        wanted = {stage.name for later in self._stages[count:] for stage in later.inputs}
        return [number for number, stage in enumerate(self._stages[:count]) if stage.name in wanted]

    def _step(self, number: int) -> None:
        stage = self._stages[number]
        with torch.inference_mode():
            module = stage.load(self._refs, self._device)
            made: dict[str, Mapping[str, Any]] = {}
            for group in stage.groups:
                made |= self._quantize(stage, module, group)
            digest = self._go_on(number, stage, module)
        self._store.write(number, stage.name, made, digest)
        self._forget(number)

    def _quantize(self, stage: Stage, module: nn.Module, group: tuple[str, ...]) -> dict[str, Parts]:
        """Quantizes products with the same input; the parts of those that were calibrated."""
        paths = {name: f"{stage.prefix}.{name}" for name in group}
        needs = {path: self._weights.need(path) for path in paths.values()}
        looking = [path for path, need in needs.items() if need != NOTHING]
        known: Mapping[str, Statistics] = {}
        if looking:
            statistics = self._gather(stage, module, group[0], hessian=HESSIAN in needs.values())
            known = self._weights.known(looking, statistics)
        made = {}
        for name, path in paths.items():
            product = module.get_submodule(name)
            if path not in known and not (self._weights.changes(path) and isinstance(product, nn.Linear)):
                continue
            parts = self._weights.quantize(path, known.get(path))
            if path in known:
                made[path] = parts
            if isinstance(product, nn.Linear):
                for rows, values in self._weights.restored(path, parts):
                    product.weight[rows] = torch.from_numpy(values).to(self._device)
        return made

    def _gather(self, stage: Stage, module: nn.Module, name: str, *, hessian: bool) -> Statistics:
        """What goes into one product, over all prompts; nothing behind it is computed."""
        moments: Moments | None = None
        weights = torch.zeros(0)

        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal moments
            rows = inputs[0].flatten(0, -2)
            if moments is None:
                moments = Moments(rows.shape[1], hessian=hessian, device=self._device)
            moments.add(rows, weights)
            raise _Seen

        hook = module.get_submodule(name).register_forward_pre_hook(look)
        try:
            for index, some in enumerate(stage.weights):
                weights = torch.from_numpy(some).to(self._device)
                with contextlib.suppress(_Seen):
                    self._run(stage, module, index)
        finally:
            hook.remove()
        if moments is None:
            raise ValueError(f"nothing goes into {stage.prefix}.{name}")
        return moments.result(f"{stage.prefix}.{name}")

    def _run(self, stage: Stage, module: nn.Module, index: int) -> Tensor:
        return stage.run(module, index, stage.states(self._states, index, self._device))

    def _go_on(self, number: int, stage: Stage, module: nn.Module) -> str:
        """Runs the quantized step and keeps the states behind it, if they are read; their sha256."""
        if number not in self._read_later(number + 1):
            return ""
        states = States(self._store.path(number, stage.name, "states"), stage.counts, stage.width)
        self._states[stage.name] = states
        for index in range(len(stage.counts)):
            states.write(self._run(stage, module, index).float().cpu().numpy())
        return states.seal()

    def _forget(self, number: int) -> None:
        """Removes states that no later step reads."""
        kept = {self._stages[index].name for index in self._read_later(number + 1)}
        for index, stage in enumerate(self._stages[: number + 1]):
            if stage.name in self._states and stage.name not in kept:
                self._states.pop(stage.name).close()
                disk.remove_file(self._store.path(index, stage.name, "states"))


def run_on() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_folder(store: Store, folder: Path) -> None:
    """Lets a store use a folder, which is made if it is not there."""
    if not folder.is_dir():
        disk.make_folder(folder)
        disk.sync_folder(folder.parent)
    store.folder = folder
