"""How a bundle runs on an execution provider: what a user may say beside its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from model.errors import UsageError
from model.sizes import parse_size

_WHAT: Final = "bad option"
CUDA_GRAPH: Final = ("auto", "on", "off")


@dataclass(frozen=True)
class Execution:
    """Choices for a provider that is not the CPU's; the defaults suit a model that fits the device.

    Attributes:
        ep_options: options of the provider, name → value, passed on as they are.
        gpu_layers: decoder layers on the device, the last ones of the model; None is all of them, or what
            `gpu_memory` has room for.
        gpu_memory: bytes of the device that may be used, or text such as "20GB"; None is what is free.
        cuda_graph: whether decoding records its launches once and replays them: "on", "off", or "auto", which is on
            where ONNX Runtime can record the graph.
        fixed_buffers: whether a step of one token reads and writes at addresses that stay, as it always does on a GPU;
            on the CPU it gains nothing and is for tests.

    Raises:
        UsageError: a value makes no sense, or two exclude each other.
    """

    ep_options: Mapping[str, str] = field(default_factory=dict)
    gpu_layers: int | None = None
    gpu_memory: int | str | None = None
    cuda_graph: str = "auto"
    fixed_buffers: bool = False

    def __post_init__(self) -> None:
        options = {_name(name): _value(name, value) for name, value in dict(self.ep_options).items()}
        object.__setattr__(self, "ep_options", options)
        layers = self.gpu_layers
        if layers is not None and (type(layers) is not int or layers < 0):
            raise UsageError(_WHAT, "gpu_layers", f"{str(layers)[:40]!r} is no number of layers")
        if self.gpu_memory is not None:
            object.__setattr__(self, "gpu_memory", parse_size(self.gpu_memory, _WHAT, "gpu_memory"))
        if self.cuda_graph not in CUDA_GRAPH:
            why = f"{str(self.cuda_graph)[:40]!r} is none of {', '.join(CUDA_GRAPH)}"
            raise UsageError(_WHAT, "cuda_graph", why)
        if self.cuda_graph == "on" and layers is not None:
            why = "a graph is recorded only where all of it runs on the device"
            raise UsageError(_WHAT, "cuda_graph", why, "Leave out either cuda_graph or gpu_layers")

    @property
    def memory(self) -> int | None:
        """`gpu_memory` in bytes."""
        return None if self.gpu_memory is None else int(self.gpu_memory)

    @property
    def is_default(self) -> bool:
        """Whether nothing was asked for."""
        return self == Execution()


def read_ep_options(pairs: Sequence[str]) -> dict[str, str]:
    """Options of a provider from the form ``name=value``.

    Raises:
        UsageError: one has another form, or comes twice.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise UsageError(_WHAT, "--ep-option", f"{pair[:60]!r} is not NAME=VALUE", "Write device_id=0, for example")
        if name in options:
            raise UsageError(_WHAT, "--ep-option", f"{name[:60]!r} comes twice", "Give it once")
        options[name] = value
    return options


def _name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise UsageError(_WHAT, "ep_options", f"{str(name)[:40]!r} is no name of an option")
    return name


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):  # the providers' own spelling
        return "1" if value else "0"
    if not isinstance(value, str | int | float):
        raise UsageError(_WHAT, "ep_options", f"{name[:40]} is neither text nor a number")
    return str(value)
