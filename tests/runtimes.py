"""Environments of other runtimes, where they are: `scripts/runtimes` makes them. No test installs anything.

They lie in `.runtimes` of the checkout or, if it is set, in the folder that EXAONE_RUNTIMES names. One that was only
half made, or whose Python or Node is no more or too old, counts as none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
_HOW = "scripts/runtimes makes it"


def folder() -> Path:
    return Path(os.environ.get("EXAONE_RUNTIMES") or ROOT / ".runtimes").absolute()


def python_with(name: str, module: str) -> Path:
    """The Python of an environment, or ours if it has the module; skips the test where there is neither."""
    for python in (folder() / name / "bin" / "python", Path(sys.executable)):
        if _works(folder(), str(python), "-P", "-c", f"import {module}"):
            return python
    pytest.skip(f"needs an environment with {module}: {_HOW}")


def node_folder() -> Path:
    """The folder whose node_modules hold transformers.js; skips the test where there is none, or no Node."""
    found = folder() / "node"
    if shutil.which("node") is None:
        pytest.skip("needs Node")
    if not _works(found, "node", "--input-type=module", "-e", "await import('@huggingface/transformers')"):
        pytest.skip(f"needs a folder with transformers.js, and a Node that it runs on: {_HOW}")
    return found


@cache
def _works(place: Path, *command: str) -> bool:
    if not place.is_dir():
        place = ROOT
    try:
        return subprocess.run(command, cwd=place, capture_output=True, timeout=120, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """What a command prints, with one thread and no network of its own; its errors where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"} | variables
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
