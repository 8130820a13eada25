"""A process that answers each line of JSON on its standard input by one on its standard output."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers_envs import QUIET

ROOT = Path(__file__).resolve().parent.parent


class Process:
    """One of them; a context manager.

    Args:
        command: that starts it, in the repository.
        log: file for what it prints on its standard error; what is there stays.

    Attributes:
        loaded: its first answer, which it gives when it is ready.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command, stdin=-1, stdout=-1, stderr=errors, text=True, cwd=ROOT, env=os.environ | QUIET
            )
        self.loaded = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:  # closes its pipes
            self._process.kill()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """What it answers; raises SystemExit if it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process ended with {self._process.wait()}: see {self._log}")
        found: dict[str, Any] = json.loads(line)
        return found
