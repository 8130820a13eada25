"""The other end of `exaone_export.benchmark.worker`: starts the process, asks it, and ends it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from model import errors
from model.errors import EnvironmentFault, ExaoneError, ResourceError
from runtime.template_child import encode_frame, read_frame, write_frame

# The same folders for imports as here, wherever this process has them from.
_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from exaone_export.benchmark.worker import main; main()"
)
_WHAT: Final = "measurement failed"
_PATIENCE_S: Final = 5.0


class Worker:
    """One process that runs one bundle; a context manager that ends it."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _START, json.dumps(sys.path)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as reason:
            why = reason.strerror or "it cannot be run"
            raise EnvironmentFault(_WHAT, sys.executable, why, "Check the Python installation") from reason

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(_PATIENCE_S if error is None else 0.0)

    def call(self, name: str, **arguments: Any) -> Any:
        """Calls a method of `exaone_export.benchmark.worker.Subject` in the process.

        Raises:
            ExaoneError: what the method raised.
            ResourceError: the process was killed, as happens when memory runs out.
        """
        try:
            write_frame(_pipe(self._process.stdin), encode_frame({"call": name, "arguments": arguments}))
            reply = read_frame(_pipe(self._process.stdout))
        except (OSError, EOFError):
            raise self._ended() from None
        if "error" in reply:
            kind, *parts = reply["error"]
            raise getattr(errors, kind, ExaoneError)(*parts)
        return reply["answer"]

    def _end(self, patience: float) -> None:
        """A process that is asked nothing further leaves by itself; after so many seconds it is killed."""
        with contextlib.suppress(OSError):
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _pipe(self._process.stdout).close()

    def _ended(self) -> ExaoneError:
        code = self._process.wait()
        if code < 0:
            why = f"the process that runs it was ended by signal {-code}"
            return ResourceError(_WHAT, "bundle", why, "Free memory, or measure a smaller prompt, image or batch")
        return EnvironmentFault(_WHAT, "bundle", f"the process that runs it ended with code {code}")


def _pipe(stream: Any) -> BinaryIO:
    found: BinaryIO = stream
    return found
