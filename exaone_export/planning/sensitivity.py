"""What each group of weights costs in answers, measured on the eager model as KL divergence from itself in float.

Exactly: one group at a time is rounded with one choice, and the prompts run. That is as many passes as there are
groups times choices, too many for a large model. There the error of what a group's layers give, relative to what they
give, is reckoned from a few rows of every weight instead; divergence grows with it in proportion, by a factor that is
measured on groups of every kind in a few layers, and interpolated between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exaone_export.verifying.layers import input_powers
from exaone_export.verifying.scores import compare
from model.exaone import Exaone
from model.progress import Progress
from quantize.calibration.prompts import Prompt, PromptSet
from quantize.methods import METHODS
from quantize.pack import dequantize
from quantize.plan import Group
from quantize.recipe import fitting_scheme
from quantize.scheme import Floats, Scheme

# Operations that are spent on exact losses; more take hours.
EXACT_OPERATIONS = 2e13
_TOKENS = 2048  # scored, of all prompts together
_PIECE = 1 << 20  # weights rounded at a time
_ROWS = 256  # of a weight that its error is reckoned from
_LAYERS = 4  # whose factors are measured

Choices = Sequence[tuple[Scheme, int]]


@dataclass(frozen=True)
class _Asked:
    """A prompt whose images are encoded already."""

    ids: npt.NDArray[np.int64]
    features: Tensor | None
    logits: npt.NDArray[np.float32]


class Evaluator:
    """Runs prompts through a model of which some weights are replaced.

    Args:
        model: eager, float32; its weights are put back after every use.
        prompts: to run; evenly chosen ones where they have many tokens.
        scale_type: float type that scales will be stored in.
    """

    def __init__(self, model: Exaone, prompts: PromptSet, scale_type: np.dtype[np.generic]) -> None:
        self.model = model
        self._scale_type = scale_type
        self._media = prompts.media
        chosen = evenly(prompts.prompts)
        with torch.inference_mode(), input_powers(model) as powers:
            self._asked = [self._ask(prompt) for prompt in chosen]
        self._powers = powers
        self.tokens = sum(len(asked.ids) for asked in self._asked)

    def _ask(self, prompt: Prompt) -> _Asked:
        model, features = self.model, None
        if prompt.pixels is not None and model.vision_encoder is not None:
            features = model.vision_encoder(torch.from_numpy(prompt.pixels()), torch.from_numpy(prompt.grids))
        return _Asked(prompt.ids, features, self._logits(prompt.ids, features))

    def _logits(self, ids: npt.NDArray[np.int64], features: Tensor | None) -> npt.NDArray[np.float32]:
        model, given = self.model, torch.from_numpy(ids)[None]
        if model.embedding is None:
            inputs = given
        else:
            none = model.decoder.norm.weight.new_zeros((0, model.config.text.hidden_size))
            inputs = model.embedding(given, none if features is None else features)
        keep = torch.zeros(1, dtype=torch.int64)
        logits, _, _ = model.decoder(inputs, torch.ones_like(given), model.decoder.empty_cache(1), keep)
        values: npt.NDArray[np.float32] = logits[0].numpy()
        return values

    def divergence(self, rounded: Mapping[str, Scheme]) -> float:
        """Mean KL divergence, nats, with some modules' weights rounded: path → scheme."""
        with torch.inference_mode(), self._replaced(rounded):
            parts = []
            for asked in self._asked:
                positions = np.flatnonzero(~np.isin(asked.ids[1:], self._media)).astype(np.int64)
                logits = self._logits(asked.ids, asked.features)
                parts.append(compare(logits, asked.logits, asked.ids, positions).divergence)
        return float(np.concatenate(parts).mean())

    @contextmanager
    def _replaced(self, rounded: Mapping[str, Scheme]) -> Iterator[None]:
        kept = []
        try:
            for path, scheme in rounded.items():
                parameter = self.model.get_parameter(f"{path}.weight")
                kept.append((parameter, parameter.data))
                parameter.data = torch.from_numpy(self.rounded(path, scheme))
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    def rounded(self, path: str, scheme: Scheme, rows: slice = slice(None)) -> Floats:
        """A module's weight, or some rows of it, as a scheme stores it: float32 [N, K]."""
        weight = self.weight(path)[rows]
        fitting = fitting_scheme(scheme, weight.shape[1], table=path.endswith(".embed_tokens"))
        if fitting is None:
            return weight
        fitting, step = replace(fitting, scale_type=self._scale_type), max(1, _PIECE // weight.shape[1])
        return np.concatenate(
            [
                dequantize(METHODS[fitting.method](weight[at : at + step], None, fitting), fitting, weight.shape[1])
                for at in range(0, len(weight), step)
            ]
        )

    def weight(self, path: str) -> Floats:
        """A module's weight, float32 [N, K]."""
        values: Floats = self.model.get_parameter(f"{path}.weight").data.numpy()
        return values

    def noise(self, group: Group, scheme: Scheme) -> float:
        """Error of what a group's modules give over what they give, both squared, reckoned from a few rows of each."""
        signal = error = 0.0
        for path in group.paths:
            weight = self.weight(path)
            rows = slice(None, None, max(1, len(weight) // _ROWS))
            power = self._powers.get(path, np.ones(weight.shape[1]))
            power = power / power.mean() * len(weight)  # as if the module had all its rows, and inputs of one size
            difference = self.rounded(path, scheme, rows) - weight[rows]
            chosen = len(weight[rows])
            signal += float((weight[rows].astype(np.float64) ** 2).sum(0) @ power) / chosen
            error += float((difference.astype(np.float64) ** 2).sum(0) @ power) / chosen
        return error / signal if signal else 0.0


def evenly(prompts: Sequence[Prompt], tokens: int = _TOKENS) -> list[Prompt]:
    """Prompts with about so many tokens together, from the whole list."""
    total = sum(prompt.ids.size for prompt in prompts)
    step = max(1, round(total / tokens))
    return list(prompts[::step])


def measure_losses(
    evaluator: Evaluator, groups: Sequence[Group], choices: Sequence[Choices], progress: Progress
) -> tuple[list[list[float]], bool]:
    """The loss of every group under each of its choices, nats; and whether each was measured exactly."""
    runs = sum(map(len, choices))
    parameters = sum(parameter.numel() for parameter in evaluator.model.decoder.parameters())
    if 2.0 * runs * parameters * evaluator.tokens > EXACT_OPERATIONS:
        return _reckoned(evaluator, groups, choices, progress), False
    progress.start("measuring sensitivity", runs, "choices")
    losses = []
    for group, options in zip(groups, choices, strict=True):
        losses.append([_exact(evaluator, group, scheme) for scheme, _ in options])
        progress.advance(len(options))
    progress.finish()
    return losses, True


def _exact(evaluator: Evaluator, group: Group, scheme: Scheme) -> float:
    return evaluator.divergence(dict.fromkeys(group.paths, scheme))


def _reckoned(
    evaluator: Evaluator, groups: Sequence[Group], choices: Sequence[Choices], progress: Progress
) -> list[list[float]]:
    measured = _measured(groups)
    progress.start("measuring sensitivity", len(groups) + len(measured), "groups")
    noises = []
    for group, options in zip(groups, choices, strict=True):
        noises.append([evaluator.noise(group, scheme) for scheme, _ in options])
        progress.advance(1)
    factors: dict[str, list[tuple[int, float]]] = {}
    for i in measured:
        group, noise = groups[i], noises[i][0]
        factor = _exact(evaluator, group, choices[i][0][0]) / noise if noise else 0.0
        factors.setdefault(group.kind, []).append((group.layer or 0, factor))
        progress.advance(1)
    progress.finish()
    found = []
    for group, own in zip(groups, noises, strict=True):
        layers, values = zip(*factors[group.kind], strict=True)
        factor = float(np.interp(group.layer or 0, layers, values))
        found.append([factor * noise for noise in own])
    return found


def _measured(groups: Sequence[Group]) -> list[int]:
    """Which groups' factors are measured: of every kind those of a few layers, first and last among them, in order."""
    found = []
    for kind in dict.fromkeys(group.kind for group in groups):
        own = [i for i, group in enumerate(groups) if group.kind == kind]
        places = np.unique(np.linspace(0, len(own) - 1, _LAYERS).round().astype(int))
        found += [own[place] for place in places]
    return found
