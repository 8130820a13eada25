"""The other end of `exaone_export.doctor.child`: starts it, waits no longer than it should, and says how it ended."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

# The same folders for imports as here, wherever this process has them from.
_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from exaone_export.doctor.child import main; main()"
)
# A cold disk reads a provider's 300 MB in seconds; a driver that does not answer never does.
TIMEOUT_S: Final = 90.0
_LONGEST: Final = 400


@dataclass(frozen=True)
class Reply:
    """How a call ended: its answer, or why there is none.

    Attributes:
        answer: what the function returned; None if it did not.
        why: the reason then.
        log: what the process wrote besides.
    """

    answer: Any
    why: str = ""
    log: str = ""


Ask = Callable[..., Reply]


def ask_child(name: str, *arguments: Any, timeout: float = TIMEOUT_S, start: str = _START) -> Reply:
    """Calls a function of `exaone_export.doctor.child` in a process of its own.

    Args:
        name: of the function.
        arguments: for it, as JSON can hold them.
        timeout: seconds after which the process is ended.
        start: what the process runs.
    """
    command = [sys.executable, "-c", start, json.dumps(sys.path), json.dumps([name, arguments])]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Reply(None, f"it did not answer within {timeout:.0f} seconds")
    except OSError as reason:
        return Reply(None, f"{sys.executable} cannot be run ({reason.strerror})")
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode < 0:
        return Reply(None, f"its process crashed ({_signal(-done.returncode)})", log)
    try:
        reply = json.loads(done.stdout)
        return Reply(reply.get("answer"), str(reply.get("error", "")), log)
    except (ValueError, AttributeError):
        return Reply(None, f"its process ended with code {done.returncode}: {cause_in(log) or 'it said nothing'}", log)


def cause_in(log: str) -> str:
    """The cause in what a loader logged: what follows "with error:", else the last line."""
    found = re.findall(r"with error: ([^\n]+)", log)
    lines = found or [line for line in log.splitlines() if line.strip()]
    text = re.sub(r"\x1b\[[0-9;]*m", "", lines[-1]) if lines else ""
    # Times, thread ids and source lines of onnxruntime's log, and folders.
    text = re.sub(r"^.*?\[[EWFV]:onnxruntime:[^\]]*\]\s*", "", text)
    return re.sub(r"(?:/[\w.+-]+)+/", "", text).strip()[:_LONGEST]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
