"""What follows from an examination: everything that is wrong, each with the line that mends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from exaone_export.doctor.packages import numbers, satisfies
from exaone_export.doctor.report import LEVELS, Diagnosis, Finding, Library, Provider
from runtime.installed import GPU, GPU_REQUIREMENT, PACKAGE, Installed, mixed_install

_EXPORT_LINE: Final = 'pip install "exaone-export[export]"'
_DRIVER: Final = "libcuda.so.1"
# The first driver of a CUDA: NVIDIA's table of minor version compatibility.
_LEAST_DRIVER: Final = {"12": "525", "13": "580"}
# The last onnxruntime-gpu on the package index that was built for CUDA 12.
_CUDA_12: Final = f"{GPU_REQUIREMENT}<1.27"
_JETSON: Final = "See docs/jetson.md"
# GroupQueryAttention keeps a cache of the window alone since then.
ALL_BUNDLES: Final = ">=1.29"


def usable(providers: Sequence[Provider], ep: str | None) -> bool:
    """Whether bundles run: on the provider asked for, or on any."""
    return any(provider.loads for provider in providers if ep is None or provider.name == ep)


def advise(found: Diagnosis, installed: Sequence[Installed], ep: str | None = None) -> Diagnosis:
    """`found` with its findings, the gravest first.

    Args:
        found: what was examined.
        installed: the distributions that own onnxruntime's folder.
        ep: short name of the provider asked for.
    """
    findings = [*_about_runtime(found, installed, ep), *_about_providers(found, installed, ep), *_about_speed(found)]
    findings += _about_exporting(found)
    return replace(found, findings=tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))))


def _about_runtime(found: Diagnosis, installed: Sequence[Installed], ep: str | None) -> Iterator[Finding]:
    mixed = mixed_install(installed)
    runtime = found.runtime
    if mixed is not None:
        yield Finding("warning" if mixed.with_gpu else "error", mixed.what, mixed.remedy)
    else:
        for item in installed:
            lost = [*item.missing, *item.replaced]
            if lost:
                what = f"{item.name} {item.version} has lost {len(lost)} of its files ({lost[0]})"
                remedy = f"pip install --force-reinstall --no-deps {item.name}=={item.version}"
                yield Finding("error", what, remedy)
    shadowed = [item for item in installed[1:] if mixed is None and item.folder != installed[0].folder]
    for item in shadowed:
        what = f"{item.name} {item.version} lies behind {installed[0].name} {installed[0].version} on the path"
        yield Finding("note", what)
    if not runtime.version:
        why = f"onnxruntime cannot be imported: {runtime.why}" if installed else "onnxruntime is not installed"
        if mixed is None and all(item.whole for item in installed):
            wanted = GPU_REQUIREMENT if ep == "cuda" else PACKAGE
            yield Finding("error", why, f"pip install --force-reinstall '{wanted}{runtime.wanted}'")
    elif not runtime.fits:
        what = f"onnxruntime {runtime.version} is not {runtime.wanted}"
        name = installed[0].name if installed else PACKAGE
        yield Finding("error", what, f"pip install --upgrade '{name}{runtime.wanted}'")
    elif not satisfies(runtime.version, ALL_BUNDLES):
        what = f"onnxruntime {runtime.version} runs only bundles made with --kv-cache full"
        name = installed[0].name if installed else PACKAGE
        yield Finding("warning", what, f"pip install --upgrade '{name}{ALL_BUNDLES}'")
    if runtime.telemetry == "on":
        yield Finding("note", "onnxruntime reports usage, as this environment asks", "export ORT_DISABLE_TELEMETRY=1")


def _about_providers(found: Diagnosis, installed: Sequence[Installed], ep: str | None) -> Iterator[Finding]:
    for provider in found.providers:
        if provider.loads:
            continue
        if provider.name == "cuda":
            yield from _about_cuda(found, provider)
        else:
            asked = provider.name in (ep, "cpu")
            what = f"{provider.name} is built in and does not load: {provider.why}"
            yield Finding("error" if asked else "note", what, _for_other(provider))
    cuda = found.provider("cuda")
    if cuda is None and (found.graphics.gpus or ep == "cuda"):
        yield from _without_cuda(found, installed, "error" if ep == "cuda" else "warning")
    elif ep is not None and ep != "cuda" and found.provider(ep) is None and found.runtime.fits:
        there = ", ".join(provider.name for provider in found.providers)
        yield Finding("error", f"this onnxruntime has no {ep}, only {there}", "Install the build of it that has")


def _without_cuda(found: Diagnosis, installed: Sequence[Installed], level: str) -> Iterator[Finding]:
    """A CUDA that is wanted, or could be used, and an onnxruntime without."""
    if mixed_install(installed) is not None or not found.runtime.version:
        return  # said already
    names = " ".join(item.name for item in installed) or PACKAGE
    what = f"this onnxruntime ({names}) was built without CUDA"
    if found.graphics.gpus:
        what = f"{found.graphics.gpus[0].name} is not used: {what}"
    remedy = f"pip uninstall -y {names} && pip install '{GPU_REQUIREMENT}'"
    yield Finding("error" if level == "error" else "warning", what, _JETSON if found.graphics.board else remedy)
    if not found.graphics.gpus and level == "error":
        yield Finding("error", "no NVIDIA GPU was found here", _driver_line(found))


def _about_cuda(found: Diagnosis, provider: Provider) -> Iterator[Finding]:
    """Why CUDA does not load, the deepest cause first: each needs what stands before it."""
    graphics, wanted = found.graphics, found.runtime.cuda
    start = "cuda is built in and does not load: "
    if graphics.board:
        yield Finding("error", f"{start}{provider.why}", _JETSON)
        return
    missing = [library for library in found.libraries if not library.found]
    if not graphics.driver and any(library.name == _DRIVER for library in missing):
        level = "error" if _has_gpu_distribution(found) else "note"
        yield Finding("error" if level == "error" else "note", f"{start}there is no NVIDIA driver", _driver_line(found))
    elif graphics.driver and not graphics.gpus and graphics.source != "proc":
        yield Finding("error", f"{start}the driver {graphics.driver} sees no GPU", "nvidia-smi")
    elif _too_old(graphics.cuda, wanted):
        what = f"{start}the driver {graphics.driver} runs CUDA up to {graphics.cuda}, this onnxruntime needs {wanted}"
        remedy = f"{_driver_line(found)}, or pip install '{_CUDA_12}'" if wanted.startswith("13") else ""
        yield Finding("error", what, remedy or _driver_line(found))
    absent = [library for library in missing if library.required and library.name != _DRIVER]
    if absent:
        yield Finding("error", f"{start}{_named(absent)} not found", f"pip install '{_requirement(found)}'")
    elif not missing or all(not library.required for library in missing):
        yield Finding("error", f"{start}{provider.why}", f"pip install --force-reinstall '{_requirement(found)}'")
    for wheel in found.wheels:
        if wheel.version and not wheel.fits:
            what = f"{wheel.name} {wheel.version} is installed, {GPU} wants {wheel.wanted}"
            yield Finding("warning", what, f"pip install '{wheel.name}{wheel.wanted}'")


def _for_other(provider: Provider) -> str:
    if provider.name == "tensorrt":
        return "Install TensorRT of the version it names, or leave it: bundles run without"
    return "Install that provider's libraries, or use another --ep"


def _requirement(found: Diagnosis) -> str:
    """onnxruntime-gpu with CUDA's wheels, in the version that is there."""
    version = found.runtime.distributions.get(GPU, found.runtime.version)
    return f"{GPU_REQUIREMENT}=={version}" if version else GPU_REQUIREMENT


def _driver_line(found: Diagnosis) -> str:
    least = _LEAST_DRIVER.get(found.runtime.cuda.partition(".")[0], _LEAST_DRIVER["13"])
    return f"Install NVIDIA's driver {least} or newer, or use --ep cpu"


def _has_gpu_distribution(found: Diagnosis) -> bool:
    return GPU in found.runtime.distributions


def _too_old(has: str, wanted: str) -> bool:
    """Whether a driver's CUDA is of an earlier major version; within one, newer toolkits run on older drivers."""
    return bool(has and wanted) and numbers(has)[:1] < numbers(wanted)[:1]


def _named(libraries: Sequence[Library]) -> str:
    names = ", ".join(library.name for library in libraries)
    return f"{names} {'was' if len(libraries) == 1 else 'were'}"


def _about_speed(found: Diagnosis) -> Iterator[Finding]:
    processor, memory = found.processor, found.memory
    features = processor.features
    if features and processor.architecture in ("x86_64", "AMD64"):
        if "avx2" not in features:
            yield Finding("warning", "the processor has no AVX2: quantized bundles run many times slower")
        elif "vnni" not in features and "amx-int8" not in features:
            what = "the processor has no VNNI: products of 8-bit integers take a slower, exact path"
            yield Finding("note", what, "Prefer int4 to int8-dynamic here, and measure both with bench")
    if features and processor.architecture == "aarch64" and "dotprod" not in features:
        yield Finding("note", "the processor has no products of 8-bit integers (dotprod): int4 and int8 run slower")
    if memory.huge_pages == "never":
        what = "transparent huge pages are off, which costs up to a tenth of decoding"
        yield Finding("note", what, "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled")


def _about_exporting(found: Diagnosis) -> Iterator[Finding]:
    missing = [name for name, version in found.export.items() if version is None]
    if missing:
        what = f"exporting needs {', '.join(missing)}; running bundles does not"
        yield Finding("note", what, _EXPORT_LINE)
