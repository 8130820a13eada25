"""The parts of `doctor` that read the machine: its files, its metadata, the driver's library."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from exaone_export.doctor import child, gpus, packages
from exaone_export.doctor.elf import needed_libraries
from exaone_export.doctor.machine import read_memory, read_processor
from exaone_export.doctor.probe import cause_in
from exaone_export.doctor.report import Gpu, Graphics, Wheel

NEEDED = ("libcublas.so.13", "libcudart.so.13", "libcuda.so.1")
H200: dict[str, Any] = {
    "name": "NVIDIA H200", "total": 150_000_000_000, "free": 149_000_000_000, "capability": "9.0",
}  # fmt: skip


class FakeNvml:
    """The functions of NVIDIA's library, which write through pointers."""

    def __init__(self, broken: bool = False) -> None:
        self.nvmlInit_v2 = lambda: 9 if broken else 0
        self.nvmlShutdown = lambda: 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:  # noqa: N802
        text.value = b"580.159.03"
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, number: Any) -> int:  # noqa: N802
        number._obj.value = 13000
        return 0

    def nvmlDeviceGetCount_v2(self, number: Any) -> int:  # noqa: N802
        number._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        return 0 if index.value == 0 else 6

    def nvmlDeviceGetName(self, handle: Any, text: Any, size: int) -> int:  # noqa: N802
        text.value = b"NVIDIA H200"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, info: Any) -> int:  # noqa: N802
        info._obj.total, info._obj.free = H200["total"], H200["free"]
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:  # noqa: N802
        major._obj.value, minor._obj.value = 9, 0
        return 0


def test_nvml() -> None:
    assert gpus.read_nvml(FakeNvml()) == Graphics("580.159.03", "13.0", (Gpu(**H200),), "nvml")
    assert gpus.read_nvml(FakeNvml(broken=True)) is None
    assert gpus.read_nvml(object()) is None


def test_nvidia_smi_the_kernel_and_the_board(tmp_path: Path) -> None:
    tool = tmp_path / "smi"
    tool.write_text(
        "#!/bin/sh\necho 'Orin (nvgpu), [N/A], [N/A], 8.7, 540.4.0'\necho 'NVIDIA T4, 100, 50, 7.5, 540.4.0'\n"
    )
    tool.chmod(0o755)
    found = gpus.read_smi(str(tool))
    assert found is not None
    assert found.gpus == (Gpu("Orin (nvgpu)", 0, 0, "8.7"), Gpu("NVIDIA T4", 100 << 20, 50 << 20, "7.5"))
    assert gpus.read_smi(str(tmp_path / "none")) is None
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31 09:35:42 UTC 2024\n")
    assert gpus.read_proc(file) == Graphics("550.90.07", source="proc")
    assert gpus.read_proc(tmp_path / "none") == Graphics()
    (tmp_path / "model").write_text("NVIDIA Jetson Orin Nano Developer Kit\0")
    assert gpus.with_board(Graphics(), tmp_path / "model").board == "NVIDIA Jetson Orin Nano Developer Kit"
    (tmp_path / "model").write_text("Raspberry Pi 5\0")
    assert gpus.with_board(Graphics(), tmp_path / "model").board == ""


def shared_library(names: tuple[str, ...]) -> bytes:
    """A file with nothing but a header, two segments, a dynamic section and its strings."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    at, entries = 1, []
    for name in names:
        entries.append((1, at))
        at += len(name) + 1
    base, place = 0x10000, 64 + 2 * 56
    dynamic = [*entries, (5, base + place), (10, len(strings)), (0, 0)]
    table = b"".join(struct.pack("<QQ", *entry) for entry in dynamic)
    size = place + len(strings) + len(table)
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, base, base, size, size, 4096)
    where = place + len(strings)
    section = struct.pack("<IIQQQQQQ", 2, 4, where, base + where, base + where, len(table), len(table), 8)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    return header + load + section + strings + table


def test_needed_libraries(tmp_path: Path) -> None:
    path = tmp_path / "libx.so"
    whole = shared_library(NEEDED)
    path.write_bytes(whole)
    assert needed_libraries(path) == NEEDED
    for damaged in (b"", whole[:40], whole[:150], b"\x7fELF\x01\x01" + whole[6:], whole[:-40], b"text" * 50):
        path.write_bytes(damaged)
        assert needed_libraries(path) in ((), NEEDED)
    assert needed_libraries(tmp_path / "none") == ()


def test_wheels_that_the_installed_package_names(tmp_path: Path) -> None:
    for name, version, lines in (
        ("onnxruntime-gpu", "1.31.1", 'Requires-Dist: numpy\nRequires-Dist: nvidia-curand~=10.0; extra == "cuda"\n'
         'Requires-Dist: nvidia-cudnn-cu13~=9.0; extra == "cudnn"\nRequires-Dist: sympy; extra == "symbolic"\n'),
        ("nvidia_curand", "10.4.5.25", ""),
    ):  # fmt: skip
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}")
    path = [str(tmp_path)]
    assert packages.cuda_wheels(path) == (
        Wheel("nvidia-curand", "~=10.0", "10.4.5.25", True),
        Wheel("nvidia-cudnn-cu13", "~=9.0"),
    )
    assert packages.nvidia_versions(path) == {"nvidia-curand": "10.4.5.25"}
    assert set(packages.export_libraries(path).values()) == {None}
    assert packages.cuda_wheels([]) == ()


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("13.5.37", "~=13.0", True), ("12.9", "~=13.0", False), ("14.0", "~=13.0", False), ("1.5", "!=1.5", False),
        ("1.31.1", ">=1.23,<2", True), ("1.22.9", ">=1.23,<2", False), ("2.0", ">=1.23,<2", False),
        ("1.4.5", "==1.4.*", True),
        ("1.5", "<=1.4", False), ("1.5", ">1.5", False), ("1.24.0rc1", ">=1.23", True), ("1", "surprise", True),
    ],
)  # fmt: skip
def test_ranges(version: str, wanted: str, fits: bool) -> None:
    assert packages.satisfies(version, wanted) is fits


def test_processors_and_memory(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_tile\n")
    found = read_processor(file)
    assert (found.name, found.features) == ("Some CPU", ("avx2", "avx512", "vnni", "amx"))
    assert 1 <= found.cores <= found.threads
    file.write_text("Features\t: fp asimd asimddp i8mm\n")
    assert read_processor(file).features == ("neon", "dotprod", "i8mm")
    assert read_processor(tmp_path / "none").features == ()
    (tmp_path / "meminfo").write_text("MemTotal:       16000 kB\n")
    (tmp_path / "huge").write_text("always madvise [never]\n")
    memory = read_memory(tmp_path / "meminfo", tmp_path / "huge")
    assert (memory.total, memory.huge_pages) == (16000 * 1024, "never")
    assert read_memory(tmp_path / "none", tmp_path / "none").total is None


def test_causes_are_short_and_without_folders() -> None:
    log = (
        "\x1b[1;31m2026 [E:onnxruntime:Default, a.cc:9 Get] /x/y/a.cc: Failed with error: /p/q/libz.so: no file\x1b[m\n"
    )
    assert cause_in(log + "[W:onnxruntime:, b.cc:1 f] another\n") == "libz.so: no file"
    assert cause_in("[W:onnxruntime:, b.cc:1 f] another\n") == "another"
    assert cause_in("") == ""


def test_versions_that_libraries_tell() -> None:
    class Cudnn:
        class cudnnGetVersion:  # noqa: N801
            restype: Any = None

            def __new__(cls) -> Any:
                return 91002

    assert child._version_of("libcudnn.so.9", Cudnn()) == "9.10.2"
    assert child._version_of("libcublasLt.so.13", object()) == ""
    assert child._version_of("libcublas.so.13", object()) == ""
