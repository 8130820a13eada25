"""For all tests: what a command sets in this process is set back, and an interrupt means what it says."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest

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
