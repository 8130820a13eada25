"""For all tests: what a command sets in this process is set back, an interrupt means what it says, and what the user's
environment says about terminals, our own switches and the hub does not count.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator

import pytest

_WISHES = ("COLUMNS", "LINES", "FORCE_COLOR", "CLICOLOR_FORCE", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
_PREFIXES = ("EXAONE_EXPORT_", "HF_", "HUGGING", "ORT_", "MALLOC_")
_KEPT = ("HF_HUB_OFFLINE",)
for _name in [name for name in os.environ if name in _WISHES or name.startswith(_PREFIXES)]:
    if _name not in _KEPT:
        del os.environ[_name]
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # of tests that import onnxruntime themselves

with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # The same examples everywhere, however slow the machine is, and nothing is written into the checkout.
    _slow = [HealthCheck.too_slow]
    settings.register_profile("same", derandomize=True, deadline=None, database=None, suppress_health_check=_slow)
    settings.load_profile("same")

# Whoever starts the tests in the background may have them ignore SIGINT, and every command started here would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command line sets level and handler of our logger, and warnings of later tests would not be seen."""
    logger = logging.getLogger("exaone_export")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
