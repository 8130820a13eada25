"""What an interrupted run needs to go on: weights, optimizer moments and counters, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class State:
    """Where training stands: steps, stage and the step it was entered at, samples, seconds, share of exact lines."""

    step: int = 0
    stage: int = 0
    entered: int = 0
    samples: int = 0
    seconds: float = 0.0
    exact: float = 0.0


def _named(model: nn.Module, heads: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in (("model.", model), ("heads.", heads)):
        for name, parameter in module.named_parameters():
            yield prefix + name, parameter


def save(folder: Path, model: nn.Module, heads: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Writes state.safetensors and state.json; the old file stays until the new one is whole."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(model, heads):
        tensors[name] = parameter.detach()
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{key}.{name}": moments[key] for key in MOMENTS if key in moments}
    temporary = folder / "state.tmp"
    save_file(tensors, temporary)
    temporary.replace(folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")


def restore(folder: Path, model: nn.Module, heads: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Reads what `save` wrote; a new state where there is nothing."""
    file = folder / "state.safetensors"
    if not file.is_file():
        return State()
    tensors, state = load_file(file), State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    for name, parameter in _named(model, heads):
        parameter.data.copy_(tensors[name])
        if f"exp_avg.{name}" in tensors:
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device, copy=True) for key in MOMENTS}
            step = torch.tensor(float(state.step), device=parameter.device)
            optimizer.state[parameter] = {"step": step, **moments}
    return state
