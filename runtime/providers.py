"""Which execution provider to run on, and with how many threads; nothing is ever replaced silently.

onnxruntime is imported on first use, with its telemetry off unless the user has switched it on.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Final

from model.errors import EnvironmentFault, UsageError
from runtime.installed import mixed_install

MAX_THREADS: Final = 1024
CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
_SUFFIX: Final = "ExecutionProvider"
# 1.23.0 answers otherwise, without a word. Bundles with caches of the window alone need 1.29, and say so.
_OLDEST: Final = (1, 24)
_SILENT: Final = 4
# The smallest model there is (y = x): loading it shows whether a provider's libraries and driver are really there.
_PROBE: Final = bytes.fromhex(
    "080812003a370a100a017812017922084964656e746974791201705a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100d"
)
_log = logging.getLogger("exaone_export.runtime")
_NEW_ENOUGH: set[str] = set()  # versions that were looked at; this is asked for every tensor


def onnxruntime() -> ModuleType:
    """The onnxruntime module.

    Raises:
        EnvironmentFault: it is not installed, does not load, or is too old.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort

        if ort.__version__ in _NEW_ENOUGH:
            fit: ModuleType = ort
            return fit
        version = tuple(int(part) for part in ort.__version__.split(".")[:2] if part.isdigit())
    except (ImportError, AttributeError) as reason:  # without its files, what is left of it is an empty package
        why = f"it cannot be imported ({str(reason)[:120]})"
        raise EnvironmentFault("cannot run models", "onnxruntime", why, "Install onnxruntime") from None
    if version < _OLDEST:
        why = f"version {ort.__version__} is older than {'.'.join(map(str, _OLDEST))}"
        raise EnvironmentFault("cannot run models", "onnxruntime", why, "Upgrade onnxruntime")
    _NEW_ENOUGH.add(ort.__version__)
    ort.set_default_logger_severity(_SILENT)  # what goes wrong is told in our errors, once
    module: ModuleType = ort
    return module


@cache
def preload() -> None:
    """Loads CUDA's and cuDNN's libraries out of NVIDIA's wheels, where the system's loader does not look.

    What is not there is found out when a session is made, so what onnxruntime prints about it is left out.
    """
    load = getattr(onnxruntime(), "preload_dlls", None)
    if load is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            load()


def faults() -> tuple[type[BaseException], ...]:
    """All that onnxruntime raises; its own exceptions have no base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (getattr(state, name) for name in dir(state))
    own = tuple(item for item in found if isinstance(item, type) and issubclass(item, Exception))
    return (*own, ValueError, RuntimeError, OSError, MemoryError)


def short_name(provider: str) -> str:
    """A provider without its suffix: "cuda" for CUDAExecutionProvider."""
    return provider.removesuffix(_SUFFIX).lower()


def available_providers() -> tuple[str, ...]:
    """Short names of the execution providers that this onnxruntime was built with, as far as this package uses them."""
    return tuple(short_name(name) for name in onnxruntime().get_available_providers() if not name.startswith("Azure"))


def choose_provider(ep: str) -> str:
    """ONNX Runtime's name of the execution provider to run on; it has been seen to load.

    Args:
        ep: "auto" (CUDA where it works, else the CPU), or a provider's short or full name, in any case.

    Raises:
        UsageError: there is no provider of that name.
        EnvironmentFault: it is not in this onnxruntime, or its libraries or driver are missing. Never falls back.
    """
    ort = onnxruntime()
    built = ort.get_available_providers()
    if ep.lower() == "auto":
        chosen = CUDA if CUDA in built and provider_loads(CUDA) else CPU
        _log.info("execution provider: %s", short_name(chosen))
        return chosen
    there = ", ".join(available_providers())
    wanted = ep.lower().removesuffix(_SUFFIX.lower())
    name = next((name for name in ort.get_all_providers() if short_name(name) == wanted), None)
    if name is None:
        raise UsageError("unknown execution provider", "ep", f"{ep[:40]!r}", f"Use auto or one of: {there}")
    if name not in built:
        why = f"this onnxruntime has only: {there}"
        raise EnvironmentFault("execution provider missing", wanted, why, advice(name))
    if not provider_loads(name):
        why = f"its libraries or driver do not load; available: {_working(built)}"
        raise EnvironmentFault("execution provider missing", wanted, why, advice(name))
    return str(name)


def advice(provider: str) -> str:
    """What to do about a provider that is not there."""
    if provider == CUDA:
        mixed = mixed_install()
        if mixed is not None and not mixed.with_gpu:
            return f"In fact {mixed.what}; repair it: {mixed.remedy}"
        return "Install onnxruntime-gpu and a driver that fit each other (see exaone-export doctor), or use --ep cpu"
    return "Install the onnxruntime build that has it, or use --ep cpu"


def _working(built: Sequence[str]) -> str:
    names = [name for name in built if not name.startswith("Azure") and provider_loads(name)]
    return ", ".join(map(short_name, names)) or "none"


def provider_loads(provider: str) -> bool:
    """Whether a session really gets this provider, seen by loading a model of one node."""
    if provider == CPU:
        return True
    ort = onnxruntime()
    if provider not in ort.get_available_providers():
        return False
    if provider == CUDA:
        preload()
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    try:
        session = ort.InferenceSession(_PROBE, options, providers=[provider], enable_fallback=0)
    except faults():
        return False
    return bool(session.get_providers()[0] == provider)


def choose_threads(threads: int | None) -> int:
    """How many threads to compute with; None = one for each physical core that this process may use.

    Raises:
        UsageError: not between 1 and `MAX_THREADS`.
    """
    if threads is None:
        return _usable_cores()
    if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise UsageError("bad option", "threads", f"{str(threads)[:40]} is not between 1 and {MAX_THREADS}")
    return threads


def _usable_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return min(os.cpu_count() or 1, MAX_THREADS)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, min(len(cores), MAX_THREADS))
