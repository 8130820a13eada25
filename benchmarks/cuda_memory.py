"""The device's memory, watched from outside the process that uses it."""

from __future__ import annotations

import ctypes
import threading
import time
from types import TracebackType
from typing import Any, Self

from exaone_export.doctor.gpus import LIBRARY, read_nvml

_INTERVAL_S = 0.01


class DeviceMemory:
    """Bytes in use of the first GPU beyond what was in use at first, by anybody; a context manager.

    On the CPU it knows nothing, and `peak` is None.
    """

    def __init__(self, device: str) -> None:
        self._library: Any = ctypes.CDLL(LIBRARY) if device == "cuda" else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = self._most = self._used()

    def __enter__(self) -> Self:
        if self._library is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._library is not None:
            self._thread.join()

    @property
    def peak(self) -> int | None:
        """The most that was in use beyond the start."""
        return None if self._library is None else self._most - self._before

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._most = max(self._most, self._used())
            time.sleep(_INTERVAL_S)

    def _used(self) -> int:
        if self._library is None:
            return 0
        found = read_nvml(self._library)
        return found.gpus[0].total - found.gpus[0].free if found and found.gpus else 0
