"""What `doctor` does in processes of their own: load onnxruntime, a provider, libraries, the driver's library.

Each can crash or hang as a whole, and none of it may be written where the answer goes: the answer is one JSON object
on what was the standard output, everything else goes to the standard error stream.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

# y = x + x, float32 [2], opset 13: unlike a copy it needs a kernel that fits the device.
_SUM: Final = bytes.fromhex(
    "080812003a350a0e0a01780a017812017922034164641201705a0f0a0178120a0a08080112040a020802"
    "620f0a0179120a0a08080112040a02080242040a00100d"
)
_ERRORS: Final = 3  # severity


def describe() -> dict[str, Any]:
    """What the imported onnxruntime says of itself."""
    import onnxruntime as ort  # whatever its version: the parent says whether that will do

    from runtime.providers import short_name

    try:
        from onnxruntime.capi import build_and_package_info as info
    except ImportError:
        info = None
    return {
        "version": str(ort.__version__),
        "build": str(ort.get_build_info()) if hasattr(ort, "get_build_info") else "",
        "folder": str(Path(ort.__file__).parent),
        "cuda": str(getattr(info, "cuda_version", "") or ""),
        "cudnn": str(getattr(info, "cudnn_version", "") or ""),
        "providers": [short_name(name) for name in ort.get_available_providers() if not name.startswith("Azure")],
        "known": [short_name(name) for name in ort.get_all_providers()],
    }


def load(provider: str) -> dict[str, Any]:
    """Creates a session with one provider and computes with it; `provider` is its short name."""
    import numpy as np

    from runtime.providers import CUDA, faults, onnxruntime, preload, short_name

    start = time.perf_counter()
    ort = onnxruntime()
    name = next(full for full in ort.get_available_providers() if short_name(full) == provider)
    if name == CUDA:
        preload()
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS  # why a library does not load is told by the log alone
    ort.set_default_logger_severity(_ERRORS)
    try:
        session = ort.InferenceSession(_SUM, options, providers=[name], enable_fallback=0)
        got = session.get_providers()[0]
        if got != name:
            return {"loads": False, "why": f"onnxruntime took {short_name(got)} instead"}
        result = session.run(None, {"x": np.array([1, 2], np.float32)})[0]
    except faults() as reason:
        return {"loads": False, "why": f"{type(reason).__name__}: {reason}"}
    right = result.tolist() == [2, 4]
    why = "" if right else "it computes 1 + 1 wrongly"
    return {"loads": right, "why": why, "seconds": time.perf_counter() - start}


def libraries(names: Sequence[str]) -> list[dict[str, Any]]:
    """Loads libraries as the provider would find them, after onnxruntime's own search in NVIDIA's wheels."""
    from runtime.providers import preload

    preload()
    found = []
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError as reason:
            found.append({"name": name, "found": False, "why": str(reason)})
            continue
        found.append({"name": name, "found": True, "version": _version_of(name, library)})
    return found


def graphics() -> dict[str, Any]:
    """The driver and the GPUs."""
    from exaone_export.doctor.gpus import read_graphics

    return dataclasses.asdict(read_graphics())


def _version_of(name: str, library: Any) -> str:
    """What a library of CUDA says its version is; the answers are of the forms 13000, 91002 and 130101."""
    for stem, ask in _ASK.items():
        if name.startswith(stem):
            try:
                return ask(library)
            except (AttributeError, OSError, ValueError):
                break
    return ""


def _cudart(library: Any) -> str:
    number = ctypes.c_int()
    if library.cudaRuntimeGetVersion(ctypes.byref(number)) != 0:
        return ""
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _cudnn(library: Any) -> str:
    library.cudnnGetVersion.restype = ctypes.c_size_t
    number = int(library.cudnnGetVersion())
    major, rest = divmod(number, 10000) if number >= 90000 else divmod(number, 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _cublas(library: Any) -> str:
    parts = []
    for index in range(3):  # cublasGetProperty of MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL
        number = ctypes.c_int()
        if library.cublasGetProperty(index, ctypes.byref(number)) != 0:
            return ""
        parts.append(str(number.value))
    return ".".join(parts)


_ASK: Final[dict[str, Callable[[Any], str]]] = {
    "libcudart.": _cudart,
    "libcudnn.": _cudnn,
    "libcublas.": _cublas,
}
_CALLS: Final[dict[str, Callable[..., Any]]] = {
    "describe": describe,
    "load": load,
    "libraries": libraries,
    "graphics": graphics,
}


def main() -> None:
    """Answers one call: name and arguments are the process's last argument, as JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    name, arguments = json.loads(sys.argv[-1])
    from model.errors import ExaoneError

    try:
        answer: dict[str, Any] = {"answer": _CALLS[name](*arguments)}
    except ExaoneError as reason:
        answer = {"error": reason.why}
    except Exception as reason:  # noqa: BLE001 - whatever it is, the parent tells the user
        answer = {"error": f"{type(reason).__name__}: {reason}"}
    answers.write(json.dumps(answer))
    answers.flush()
    # Libraries that are half loaded may crash as they are unloaded, when all has been said.
    os._exit(0)
