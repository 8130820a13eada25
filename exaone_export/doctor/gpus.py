"""NVIDIA's driver and GPUs: by its management library, else by nvidia-smi, else what the kernel's files say."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any, Final

from exaone_export.doctor.report import Gpu, Graphics

LIBRARY: Final = "libnvidia-ml.so.1"
_DRIVER_FILE: Final = Path("/proc/driver/nvidia/version")
_BOARD_FILE: Final = Path("/proc/device-tree/model")
_QUERY: Final = ("name", "memory.total", "memory.free", "compute_cap", "driver_version")
_TEXT: Final = 96
_TIMEOUT_S: Final = 15
_MIB: Final = 1 << 20


class _MemoryInfo(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def read_graphics() -> Graphics:
    """What there is; loads the driver's library into this process, so call it in a child."""
    try:
        library: Any = ctypes.CDLL(LIBRARY)
    except OSError:
        library = None
    found = read_nvml(library) if library is not None else None
    return with_board(found or read_smi() or read_proc())


def read_nvml(library: Any) -> Graphics | None:
    """What NVIDIA's management library says; None where it does not work.

    Args:
        library: the loaded library, or what has its functions.
    """
    try:
        if library.nvmlInit_v2() != 0:
            return None
        driver, version, count = ctypes.create_string_buffer(_TEXT), ctypes.c_int(), ctypes.c_uint()
        library.nvmlSystemGetDriverVersion(driver, _TEXT)
        library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version))
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        gpus = tuple(filter(None, (_nvml_gpu(library, index) for index in range(count.value))))
        library.nvmlShutdown()
    except (AttributeError, OSError):  # an older library lacks some
        return None
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else ""
    return Graphics(driver.value.decode("ascii", "replace"), cuda, gpus, "nvml")


def _nvml_gpu(library: Any, index: int) -> Gpu | None:
    handle, memory = ctypes.c_void_p(), _MemoryInfo()
    if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return None
    name, major, minor = ctypes.create_string_buffer(_TEXT), ctypes.c_int(), ctypes.c_int()
    library.nvmlDeviceGetName(handle, name, _TEXT)
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    known = library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
    capability = f"{major.value}.{minor.value}" if known else ""
    return Gpu(name.value.decode("utf-8", "replace"), memory.total, memory.free, capability)


def read_smi(command: str = "nvidia-smi") -> Graphics | None:
    """What `nvidia-smi` says; None where it is missing or fails."""
    ask = [command, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    gpus, driver = [], ""
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(_QUERY):
            continue
        name, total, free, capability, driver = cells
        # On a Jetson sizes are "[N/A]": its memory is the machine's.
        room, left = (int(size) * _MIB if size.isdecimal() else 0 for size in (total, free))
        gpus.append(Gpu(name, room, left, capability if re.fullmatch(r"\d+\.\d+", capability) else ""))
    return Graphics(driver, "", tuple(gpus), "nvidia-smi") if gpus else None


def read_proc(driver_file: Path = _DRIVER_FILE) -> Graphics:
    """What the kernel's module says of its version."""
    try:
        text = driver_file.read_text(errors="replace")
    except OSError:
        return Graphics()
    found = re.search(r"Kernel Module[^\n]*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return Graphics(driver=found[1], source="proc") if found else Graphics()


def with_board(found: Graphics, file: Path = _BOARD_FILE) -> Graphics:
    """`found`, and whether the machine is a Jetson."""
    try:
        model = file.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return found
    board = model if re.search(r"jetson|orin|tegra", model, re.IGNORECASE) else ""
    return Graphics(found.driver, found.cuda, found.gpus, found.source, board)
