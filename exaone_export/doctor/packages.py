"""What is installed, told from the distributions' metadata: no library is imported for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, version
from typing import Final

from exaone_export.doctor.report import Wheel
from runtime.installed import GPU

OURS: Final = "exaone-export"
# Extras of onnxruntime-gpu with CUDA's libraries.
_EXTRAS: Final = ("cuda", "cudnn")
_REQUIREMENT: Final = re.compile(r"""^([A-Za-z0-9._-]+)\s*\(?([^;)]*)\)?\s*;.*extra\s*==\s*["'](\w+)["']""")
# What the extra `export` names, for where this package's own metadata is not there (a checkout on the path).
_EXPORTING: Final = (
    "huggingface_hub", "ml_dtypes", "onnx", "onnx-ir", "onnxscript", "optimum", "safetensors", "torch", "transformers",
)  # fmt: skip


def export_libraries(path: Sequence[str] | None = None) -> dict[str, str | None]:
    """Library that exporting needs → its installed version, or None."""
    found = _versions(path)
    try:
        requirements = distribution(OURS).requires or []
    except PackageNotFoundError:
        requirements = []
    named = [name for name, _, extra in _optional(requirements) if extra == "export"]
    return {name: found.get(_plain(name)) for name in named or _EXPORTING}


def cuda_wheels(path: Sequence[str] | None = None) -> tuple[Wheel, ...]:
    """What the installed onnxruntime-gpu wants of NVIDIA's wheels, and what there is; empty without it."""
    found = _versions(path)
    items = distributions() if path is None else distributions(path=list(path))
    gpu = next((item for item in items if _name(item) == GPU), None)
    wheels = []
    for name, wanted, extra in _optional((gpu.requires or []) if gpu else []):
        if extra in _EXTRAS:
            there = found.get(_plain(name), "") or ""
            wheels.append(Wheel(name, wanted, there, bool(there) and satisfies(there, wanted)))
    return tuple(wheels)


def nvidia_versions(path: Sequence[str] | None = None) -> dict[str, str]:
    """NVIDIA's wheels → their versions."""
    return {name: there for name, there in sorted(_versions(path).items()) if name.startswith("nvidia-")}


def our_version(fallback: str) -> str:
    """Of this package as installed."""
    try:
        return version(OURS)
    except PackageNotFoundError:
        return fallback


def satisfies(found: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ``~=13.0`` or ``>=1.23,<2``; what is not understood is no reason."""
    mine = numbers(found)
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        match = re.fullmatch(r"(~=|>=|<=|==|!=|<|>)\s*([0-9][0-9.]*)(\.\*)?", part)
        if match is None:
            continue
        operator, bound = match[1], numbers(match[2])
        if operator == "~=" and not (mine >= bound and mine[: len(bound) - 1] == bound[:-1]):
            return False
        if operator == "==" and mine[: len(bound)] != bound:
            return False
        if operator == "!=" and mine[: len(bound)] == bound:
            return False
        if (operator == ">=" and mine < bound) or (operator == "<" and mine >= bound):
            return False
        if (operator == "<=" and mine > bound) or (operator == ">" and mine <= bound):
            return False
    return True


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (1, 31, 1) for "1.31.1rc2"."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _optional(requirements: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name, range and extra of the requirements that belong to an extra."""
    for line in requirements:
        found = _REQUIREMENT.match(line)
        if found:
            yield found[1], found[2].strip(), found[3]


def _versions(path: Sequence[str] | None) -> dict[str, str]:
    items = distributions() if path is None else distributions(path=list(path))
    found: dict[str, str] = {}
    for item in items:
        found.setdefault(_name(item), item.version)  # the first on the path is what is imported
    return found


def _name(item: Distribution) -> str:
    return _plain(str(item.metadata["Name"] or ""))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
