"""Interrupts that come up where Python can raise nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHILD = """
import signal, sys, time
from exaone_export import signals
from exaone_export.failures import Terminated

class Lost:
    def __del__(self):
        if sys.argv[1] == "python":
            raise KeyboardInterrupt
        signal.raise_signal(getattr(signal, sys.argv[1]))

with signals.raised(ends_process=True):
    if sys.argv[1] == "python":  # as while a line is read
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        Lost()
        time.sleep(60)
    except (KeyboardInterrupt, Terminated) as failure:
        print(type(failure).__name__)
"""


@pytest.mark.parametrize(
    ("raised", "name"), [("python", "KeyboardInterrupt"), ("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "Terminated")]
)
def test_what_is_lost_in_a_destructor_comes_again(raised: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, raised], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == (f"{name}\n", "")
