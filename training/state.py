"""What an interrupted run needs to go on: weights, their average, optimizer moments and counters, in one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class State:
    """Where training stands.

    Attributes:
        step: updates so far.
        samples: of each task.
        seconds: of processor time.
        levels: of difficulty, by task.
        entered: samples of the task when its level was entered.
        exact: moving share of samples answered exactly, by task, at its level.
    """

    step: int = 0
    seconds: float = 0.0
    samples: dict[str, int] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)
    entered: dict[str, int] = field(default_factory=dict)
    exact: dict[str, float] = field(default_factory=dict)


def named(model: nn.Module, heads: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters under the names of the file."""
    for prefix, module in (("model.", model), ("heads.", heads)):
        for name, parameter in module.named_parameters():
            yield prefix + name, parameter


class Average:
    """A moving average of a model's weights, which stands in for a falling rate at any moment."""

    def __init__(self, model: nn.Module) -> None:
        self.live = [parameter.data for parameter in model.parameters()]
        self.mean = [tensor.clone() for tensor in self.live]

    def update(self, share: float) -> None:
        """Moves by `share` of the way to the present weights."""
        torch._foreach_lerp_(self.mean, self.live, share)

    def swap(self) -> None:
        """Exchanges the model's weights with the average; the second time they are back."""
        for live, mean in zip(self.live, self.mean, strict=True):
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)


def save(folder: Path, model: nn.Module, heads: nn.Module, rest: tuple[Average, torch.optim.Optimizer, State]) -> None:
    """Writes state.safetensors and state.json; the old file stays until the new one is whole."""
    average, optimizer, state = rest
    tensors: dict[str, Tensor] = {}
    for name, parameter in named(model, heads):
        tensors[name] = parameter.detach()
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{key}.{name}": moments[key] for key in MOMENTS if key in moments}
    names = [name for name, _ in model.named_parameters()]
    tensors |= {f"average.{name}": mean for name, mean in zip(names, average.mean, strict=True)}
    temporary = folder / "state.tmp"
    save_file(tensors, temporary)
    temporary.replace(folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")


def restore(
    folder: Path, model: nn.Module, heads: nn.Module, rest: tuple[Average, torch.optim.Optimizer]
) -> State | None:
    """Reads what `save` wrote; None where there is nothing."""
    file = folder / "state.safetensors"
    if not file.is_file():
        return None
    average, optimizer = rest
    tensors, state = load_file(file), State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    for name, parameter in named(model, heads):
        parameter.data.copy_(tensors[name])
        if f"exp_avg.{name}" in tensors:
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device, copy=True) for key in MOMENTS}
            step = torch.tensor(float(state.step), device=parameter.device)
            optimizer.state[parameter] = {"step": step, **moments}
    for (name, _), mean in zip(model.named_parameters(), average.mean, strict=True):
        mean.copy_(tensors[f"average.{name}"])
    return state
