"""Something done again and again while something else goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def meanwhile(action: Callable[[], None], interval_s: float) -> Iterator[None]:
    """Calls `action` in a thread of its own every `interval_s` seconds, until the block ends."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval_s):
            action()

    watcher = threading.Thread(target=watch, name=f"{__name__} {getattr(action, '__name__', '')}", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
