"""For all tests: what a command sets in this process is set back."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command line sets level and handler of our logger, and warnings of later tests would not be seen."""
    logger = logging.getLogger("exaone_export")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
