"""Signals that have to wait: what must be done wholly or not at all is not interrupted half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ATTEMPTS = 100


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back during the block; the first that came takes effect behind it.

    Python runs handlers in the main thread, so elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    previous = {}
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) is not None:  # None: its handler is not Python's, and could not be put back
                previous[number] = signal.signal(number, hold)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def surely(action: Callable[[], None]) -> None:
    """Runs an action that may be repeated to its end, whatever signals arrive, then lets the last take effect."""
    interruption: BaseException | None = None
    done = False
    for _ in range(_ATTEMPTS):
        try:
            with uninterrupted():
                action()
                done = True
        except Exception:
            raise
        except BaseException as reason:  # noqa: BLE001 - what the handlers raise, before or behind the block
            interruption = reason
        if done:
            break
    if interruption is not None:
        raise interruption
