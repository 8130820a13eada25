"""SIGINT and SIGTERM as exceptions, so that unfinished output is removed on the way out of whatever was being done."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from exaone_export.failures import INTERRUPTED, TERMINATED, Terminated

PATIENCE = 2.0  # seconds after a signal in which further ones do nothing
EXIT_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
_AGAIN = 0.02  # seconds


class Signals:
    """What arrived, and what is done about it.

    Further signals right after the first are impatience: what runs then is clean-up.

    Attributes:
        arrived: signals in order. Libraries may turn our exceptions into their own, so this is what tells.
    """

    def __init__(self) -> None:
        self.arrived: list[signal.Signals] = []
        self._ignored_until = 0.0
        self._unraisable = sys.unraisablehook

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt or `Terminated`."""
        self.arrived.append(signal.Signals(number))
        if time.monotonic() > self._ignored_until:
            self._ignored_until = time.monotonic() + PATIENCE
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def on_lost(self, lost: Any) -> None:
        """Sends the signal once more if its exception came up where Python can raise none, as in a destructor."""
        if not isinstance(lost.exc_value, KeyboardInterrupt | Terminated):
            self._unraisable(lost)
            return
        # While a chat reads a line, the exception is of Python's own handler, and nothing has arrived here.
        number = signal.SIGINT if isinstance(lost.exc_value, KeyboardInterrupt) else signal.SIGTERM
        again = threading.Timer(_AGAIN, self._send_again, [number])
        again.daemon = True
        again.start()

    def _send_again(self, number: signal.Signals) -> None:
        self._ignored_until = 0.0
        os.kill(os.getpid(), number)


@contextmanager
def raised(*, ends_process: bool) -> Iterator[Signals]:
    """Signals raise exceptions during the block.

    Args:
        ends_process: whether nothing comes after the block; then further signals are ignored once one has arrived.
    """
    signals = Signals()
    hook, sys.unraisablehook = sys.unraisablehook, signals.on_lost
    previous = {}
    try:
        # A caller may want SIGINT ignored (nohup, a shell's background job), which stays so.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            previous[signal.SIGINT] = signal.signal(signal.SIGINT, signals.on_signal)
        if signal.getsignal(signal.SIGTERM) is not None:
            previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, signals.on_signal)
    except ValueError:  # not in the main thread: the caller handles signals
        pass
    try:
        yield signals
    finally:
        sys.unraisablehook = hook
        if not (signals.arrived and ends_process):
            for number, handler in previous.items():
                signal.signal(number, handler)


def leave(code: int) -> NoReturn:
    """Ends the process here: taking libraries and graphs to pieces in memory would take seconds, and serve nobody."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def ignore() -> None:
    """From here on, signals do nothing: what is left to do takes no time."""
    try:
        for number in EXIT_CODES:
            signal.signal(number, signal.SIG_IGN)
    except ValueError:
        pass
