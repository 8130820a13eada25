"""What `doctor` finds, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Level = Literal["error", "warning", "note"]
LEVELS: Final[tuple[Level, ...]] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        level: "error" where something that was installed or asked for does not work, "warning" where things work but
            slowly or only in part, "note" for the rest.
        what: in one sentence without its full stop.
        remedy: the command or step that changes it; empty where there is none.
    """

    level: Level
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Provider:
    """One execution provider of the installed onnxruntime.

    Attributes:
        name: its short name.
        loads: whether a session got it and computed a sum with it.
        seconds: that took, importing onnxruntime included.
        why: the reason where it does not.
    """

    name: str
    loads: bool
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Library:
    """A shared library that the CUDA provider takes.

    Attributes:
        name: as the loader is asked for it.
        found: whether it loads.
        version: where it says, else empty.
        why: the loader's words where it does not load.
        required: the provider does not load without it.
    """

    name: str
    found: bool
    version: str = ""
    why: str = ""
    required: bool = True


@dataclass(frozen=True)
class Wheel:
    """A distribution that the installed onnxruntime-gpu names in its extras.

    Attributes:
        name: of the distribution.
        wanted: versions that fit.
        version: of the installed one, empty if there is none.
        fits: whether that is one of them.
    """

    name: str
    wanted: str
    version: str = ""
    fits: bool = False


@dataclass(frozen=True)
class Runtime:
    """The installed onnxruntime.

    Attributes:
        distributions: name → version of all that claim its folder.
        version: what the imported module says; empty if it cannot be imported.
        wanted: the range this package needs.
        fits: whether the version lies in it.
        build: onnxruntime's own note on how it was built.
        cuda, cudnn: versions it was built for; empty for builds without CUDA.
        telemetry: "off", or "on" where the user's environment says so.
        why: the reason if it cannot be imported.
    """

    distributions: Mapping[str, str]
    version: str
    wanted: str
    fits: bool
    build: str = ""
    cuda: str = ""
    cudnn: str = ""
    telemetry: str = "off"
    why: str = ""


@dataclass(frozen=True)
class Gpu:
    """One GPU; sizes in bytes.

    Attributes:
        name: its maker's.
        total, free: of its memory.
        capability: compute capability, "9.0" for example; empty where the system does not say.
    """

    name: str
    total: int
    free: int
    capability: str = ""


@dataclass(frozen=True)
class Graphics:
    """NVIDIA's part of the machine.

    Attributes:
        driver: version of the driver; empty if there is none.
        cuda: the newest CUDA that driver runs; empty where it does not say.
        gpus: what it sees.
        source: who said so: "nvml", "nvidia-smi", "proc", or "".
        board: the name of a Jetson, else empty.
    """

    driver: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    source: str = ""
    board: str = ""


@dataclass(frozen=True)
class Processor:
    """The processor.

    Attributes:
        name: its maker's.
        architecture: "x86_64", "aarch64", ...
        features: of those that decide speed, the ones it has.
        cores, threads: physical cores and hardware threads that this process may use.
    """

    name: str
    architecture: str
    features: tuple[str, ...]
    cores: int
    threads: int


@dataclass(frozen=True)
class Memory:
    """Memory, in bytes; None where the system does not say.

    Attributes:
        total, available: of the machine, and what this process may still take.
        huge_pages: the kernel's setting for transparent huge pages ("always", "madvise", "never"), or "".
    """

    total: int | None
    available: int | None
    huge_pages: str


@dataclass(frozen=True)
class Diagnosis:
    """All that `doctor` found; `ok` says whether bundles run here on what was asked for."""

    version: str
    python: str
    platform: str
    processor: Processor
    memory: Memory
    runtime: Runtime
    providers: tuple[Provider, ...]
    graphics: Graphics
    libraries: tuple[Library, ...] = ()
    wheels: tuple[Wheel, ...] = ()
    export: Mapping[str, str | None] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    ok: bool = False

    def provider(self, name: str) -> Provider | None:
        """The provider of that short name, if this onnxruntime has it."""
        return next((provider for provider in self.providers if provider.name == name), None)
