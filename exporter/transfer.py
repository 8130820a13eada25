"""How a transfer with the hub goes on: again where it broke, told to a progress, and stopped from outside."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from exporter.hub_errors import BROKEN, RETRIED, Stopped, library, network_failures, retry_after, status_of

WAITS = (1.0, 2.0, 4.0)  # seconds before another attempt; the last failure counts
TIMEOUT = 30.0  # seconds without a byte
Advance = Callable[[float], object]
_T = TypeVar("_T")

log = logging.getLogger("exaone_export.exporter")


# hf_xet's own choice is a sixteenth of the memory and more, up to gigabytes; it would not let an export be small.
_XET_MEMORY = {
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "192mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_PERFILE_SIZE": "64mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "256mb",
    "HF_XET_RECONSTRUCTION_MIN_PREFETCH_BUFFER": "64mb",
    "HF_XET_RECONSTRUCTION_MIN_RECONSTRUCTION_FETCH_SIZE": "64mb",
    "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0",  # on the disk, for what is fetched once
}


def make_api() -> Any:
    """huggingface_hub's client; HF_ENDPOINT is read now, not when the library was imported.

    The native library that it transfers with is held to 256 MB of buffers, unless the environment says otherwise.
    """
    for name, value in _XET_MEMORY.items():
        os.environ.setdefault(name, value)
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return library().HfApi(endpoint=endpoint or None, library_name="exaone-export")


def patiently(
    call: Callable[[], _T], what: str, stopped: threading.Event | None = None, *, at_first: bool = False
) -> _T:
    """Calls again, a few times, where the hub is busy or a connection broke; `at_first` there may be no network."""
    for wait in WAITS:
        try:
            return call()
        except network_failures() as reason:
            status = status_of(reason)
            if status not in RETRIED or (at_first and status == BROKEN):
                raise
            pause = max(wait, retry_after(reason))
        said = "the connection broke" if status == BROKEN else f"the hub answered {status}"
        log.warning("%s for %s: trying again in %.0f s", said, what, pause)
        if (stopped or threading.Event()).wait(pause):
            raise Stopped
    return call()


def make_bar(advance: Advance | None = None, stopped: threading.Event | None = None) -> type:
    """What huggingface_hub takes for a progress bar (tqdm's interface), and what ends a transfer from inside."""

    class Bar:
        def __init__(self, *_: object, total: float | None = None, initial: float = 0, **__: object) -> None:
            self.total, self.n = total, initial

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: float | None = 1) -> None:
            if stopped is not None and stopped.is_set():
                raise Stopped
            self.n += count or 0
            if advance is not None:
                advance(count or 0)

        def update_transfer(self, count: float | None = 1) -> None:
            """Bytes on the wire; those on the disk are what is counted."""

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_, **__: None  # descriptions, rates, refreshing

    return Bar
