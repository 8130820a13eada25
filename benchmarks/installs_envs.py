"""The environments that `benchmarks.installs` makes: which, and how."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HIGH, LOW = ROOT / "constraints.txt", ROOT / "constraints-low.txt"
SMALL = "chat,constrained,plot,video"
LOWEST_PYTHON = (3, 11)
# What pip is told not to take from the one who calls it.
_PIP = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


class Wrong(Exception):
    """An environment is not as promised; the text says how."""


@dataclass(frozen=True)
class Environment:
    """One clean environment.

    Attributes:
        name: of its folder and row.
        python: the interpreter.
        extras: of our package, as in its brackets.
        constraints: versions of the others.
        sdist: whether it gets the sdist, which pip then builds, instead of the wheel.
    """

    name: str
    python: str
    extras: str = ""
    constraints: Path = HIGH
    sdist: bool = False

    @property
    def exports(self) -> bool:
        """Whether it can make bundles."""
        return "export" in self.extras


def planned(given: Sequence[str]) -> list[Environment]:
    """Every environment, the small ones first.

    Args:
        given: interpreters; none takes those on PATH.
    """
    found = {version_of(python): python for python in reversed(given or pythons())}
    found = {version: python for version, python in sorted(found.items()) if version and version >= LOWEST_PYTHON}
    plan = [Environment(f"base-{_told(version)}", python) for version, python in found.items()]
    plan += [Environment(f"small-{_told(version)}", python, SMALL) for version, python in found.items()]
    lowest = found.get(LOWEST_PYTHON)
    if lowest:  # whose wheels the oldest versions have
        plan += [
            Environment("base-low", lowest, constraints=LOW),
            Environment("small-low", lowest, SMALL, LOW),
            Environment("sdist", lowest, sdist=True),
            Environment("export", lowest, "export"),
            Environment("export-low", lowest, "export", LOW),
        ]
    return plan


def pythons() -> list[str]:
    """Interpreters on PATH, newest names last."""
    names = ["python3", *(f"python3.{minor}" for minor in range(11, 20))]
    return [path for name in names if (path := shutil.which(name))]


def version_of(python: str) -> tuple[int, int] | None:
    """Its version; None if it does not start, as a stand-in for one that is not installed."""
    program = "import sys, venv; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    if done.returncode:
        return None
    major, minor = map(int, done.stdout.split())
    return major, minor


def _told(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def install(folder: Path, environment: Environment, package: Path) -> dict[str, Any]:
    """Makes the environment; returns how long it took, its size and how many distributions it holds.

    Raises:
        Wrong: pip fails.
    """
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    _called([environment.python, "-m", "venv", str(folder)])
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--constraint", str(environment.constraints)]
    if environment.exports:  # torch alone first, as scripts/setup does: the index's own build
        _called(
            [*pip, next(line for line in environment.constraints.read_text().split() if line.startswith("torch=="))]
        )
    extras = f"[{environment.extras}]" if environment.extras else ""
    _called([*pip, f"exaone-export{extras} @ {package.as_uri()}"])
    seconds = time.perf_counter() - start
    size = sum(path.lstat().st_size for path in folder.rglob("*"))
    held = len(list(folder.glob("lib/python*/site-packages/*.dist-info")))
    return {"install_s": round(seconds, 1), "MB": round(size / 1e6), "distributions": held}


def _called(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_PIP})
    if done.returncode:
        raise Wrong(f"{' '.join(command[1:5])} …: {done.stderr[-1200:]}")
