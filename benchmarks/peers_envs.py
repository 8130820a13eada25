"""The environments of the other engines: one each, so that none has to agree with another's versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ONNXRUNTIME_GENAI = ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "numpy==2.4.6")
OPENVINO = ("openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", "numpy==2.4.6")
# No usage reports, and nothing is fetched: all models are local.
QUIET = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
_VERSIONS = (
    "import json; from importlib.metadata import distributions; "
    "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in distributions()}))"
)


@dataclass(frozen=True)
class Environment:
    """What pip installs, with which variables and options, and what is removed afterwards."""

    requirements: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


ENVIRONMENTS = {
    # Compiled here, for this very CPU.
    "llama": Environment(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"),
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF"},
        ("--no-binary", "llama-cpp-python"),
    ),
    "genai": Environment(ONNXRUNTIME_GENAI),
    "genai-build": Environment(
        (*ONNXRUNTIME_GENAI, "torch==2.13.0", "transformers==5.23.0", "onnx==1.23.2", "onnx-ir==1.1.0")
    ),
    "ov": Environment((*OPENVINO, "openvino-genai==2026.4.1.0")),
    # Its torchvision is for another build of torch; transformers then fails to import, without it it does not.
    "ov-build": Environment(
        (*OPENVINO, "torch==2.13.0", "optimum-intel==2.2.0", "nncf==3.4.0", "transformers==4.57.6"),
        removed=("torchvision",),
    ),
}


class Environments:
    """Makes environments in a folder when they are asked for, and uses what is there if its versions are right."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self._folder = folder
        self._logs = logs

    def python(self, name: str) -> Path:
        """The Python of an environment. Ends with a message if it cannot be made."""
        wanted = ENVIRONMENTS[name]
        python = self._folder / name / "bin" / "python"
        if not _complete(python, wanted):
            print(f"making the environment {name}", file=sys.stderr, flush=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            steps = [[sys.executable, "-m", "venv", str(self._folder / name)]]
            steps.append([str(python), "-m", "pip", "install", *wanted.options, *wanted.requirements])
            if wanted.removed:
                steps.append([str(python), "-m", "pip", "uninstall", "--yes", *wanted.removed])
            for step in steps:
                logged(step, self._logs / f"environment-{name}.log", wanted.variables)
        return python


def _complete(python: Path, wanted: Environment) -> bool:
    if not python.exists():
        return False
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", _VERSIONS], stdout=-1, check=True).stdout)
    pins = (requirement.split("==") for requirement in wanted.requirements)
    # A local part ("+cpu") says how it was built.
    right = all(found.get(package, "").partition("+")[0] == version for package, version in pins)
    return right and not any(package in found for package in wanted.removed)


def logged(command: list[str], log: Path, variables: Mapping[str, str] | None = None) -> None:
    """Runs a command with its output appended to a file; SystemExit with the last line of it if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        print("$", *command, file=stream, flush=True)
        environment = os.environ | QUIET | dict(variables or {})
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        raise SystemExit(f"{Path(command[0]).name} ends with {done.returncode}: {last[:200]} (see {log})")
