"""Environments of other runtimes, where they are: `scripts/runtimes` makes them. No test installs anything.

They lie in `.runtimes` of the checkout or, if it is set, in the folder that EXAONE_RUNTIMES names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
_HOW = "scripts/runtimes makes it"


def folder() -> Path:
    return Path(os.environ.get("EXAONE_RUNTIMES") or ROOT / ".runtimes")


def python_with(name: str, module: str) -> Path:
    """The Python of an environment, or ours if it has the module; skips the test where there is neither."""
    python = folder() / name / "bin" / "python"
    if python.exists():
        return python
    if find_spec(module) is None:
        pytest.skip(f"needs an environment with {module}: {_HOW}")
    return Path(sys.executable)


def node_folder() -> Path:
    """The folder whose node_modules hold transformers.js; skips the test where there is none, or no Node."""
    found = folder() / "node"
    if shutil.which("node") is None:
        pytest.skip("needs Node")
    if not (found / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip(f"needs a folder with transformers.js: {_HOW}")
    return found


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """What a command prints, with one thread and no network of its own; its errors where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"} | variables
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
