"""The processor and the memory, as far as they decide how fast a bundle runs."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Final

from exaone_export.doctor.report import Memory, Processor
from model.memory import available_bytes
from runtime.providers import choose_threads

_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# What the kernel calls a feature → what people do; the kernels of ONNX Runtime choose by these.
_FEATURES: Final = {
    "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx512f": "avx512", "avx512_vnni": "vnni", "avx_vnni": "vnni",
    "avx512_bf16": "bf16", "amx_tile": "amx", "amx_int8": "amx-int8", "amx_bf16": "amx-bf16",
    "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "asimdhp": "fp16", "bf16": "bf16", "sve": "sve",
}  # fmt: skip


def read_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """The processor this process runs on; without `cpuinfo` its features are unknown."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    features = tuple(dict.fromkeys(short for name, short in _FEATURES.items() if name in flags))
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return Processor(
        name=name[1].strip() if name else platform.processor() or "unknown",
        architecture=platform.machine(),
        features=features,
        cores=choose_threads(None),
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def read_memory(meminfo: Path = Path("/proc/meminfo"), huge_pages: Path = _HUGE_PAGES) -> Memory:
    """The machine's memory."""
    total = None
    try:
        found = re.search(r"^MemTotal:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        total = int(found[1]) * 1024 if found else None
    except OSError:
        pass
    try:
        chosen = re.search(r"\[(\w+)\]", huge_pages.read_text())
    except OSError:
        chosen = None
    return Memory(total, available_bytes(), chosen[1] if chosen else "")
