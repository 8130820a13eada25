"""Puts the examination together: who is asked what, and in which process."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from exaone_export import __version__
from exaone_export.doctor.advise import advise, usable
from exaone_export.doctor.elf import needed_libraries
from exaone_export.doctor.machine import read_memory, read_processor
from exaone_export.doctor.packages import cuda_wheels, export_libraries, numbers, our_version, satisfies
from exaone_export.doctor.probe import Ask, Reply, ask_child, cause_in
from exaone_export.doctor.report import Diagnosis, Gpu, Graphics, Library, Provider, Runtime
from model.errors import UsageError
from runtime.installed import Installed, installed_runtimes

# What runs some bundles; a test holds it to `runtime.providers`. The package's metadata asks for what runs all.
WANTED: Final = ">=1.24,<2"
_PROVIDER_FILE: Final = "libonnxruntime_providers_cuda.so"
_NVIDIA: Final = ("libcu", "libnv")
# What the provider loads by name when it needs it, by the first part of CUDA's version.
_LATER: Final = {"12": ("libcudnn.so.9", "libnvrtc.so.12"), "13": ("libcudnn.so.9", "libnvrtc.so.13")}
_NEWEST: Final = "13"


def examine(ep: str | None = None, ask: Ask = ask_child) -> Diagnosis:
    """Looks at this machine.

    Args:
        ep: short name of the provider that bundles shall run on; None takes any.
        ask: calls a function of `exaone_export.doctor.child`.

    Raises:
        UsageError: no onnxruntime has a provider of that name.
    """
    installed = installed_runtimes()
    described = ask("describe")
    about: dict[str, Any] = described.answer or {}
    _check_name(ep, about.get("known", ()))
    libraries = _libraries(about, ask)
    runtime = _runtime(installed, about, described.why, libraries)
    names: Sequence[str] = about.get("providers", ()) if runtime.fits else ()
    providers = tuple(_provider(name, ask("load", name)) for name in names)
    found = Diagnosis(
        version=our_version(__version__),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        processor=read_processor(),
        memory=read_memory(),
        runtime=runtime,
        providers=providers,
        graphics=_graphics(ask("graphics")),
        libraries=libraries,
        wheels=cuda_wheels(),
        export=export_libraries(),
        ok=usable(providers, ep),
    )
    return advise(found, installed, ep)


def _check_name(ep: str | None, known: Sequence[str]) -> None:
    if ep is not None and known and ep not in known:
        there = ", ".join(name for name in known if not name.startswith("azure"))
        raise UsageError("unknown execution provider", "--ep", f"{ep[:40]!r}", f"Use one of: {there}")


def _runtime(installed: Sequence[Installed], about: dict[str, Any], why: str, libraries: Sequence[Library]) -> Runtime:
    version = str(about.get("version", ""))
    cuda = str(about.get("cuda", ""))
    return Runtime(
        distributions={item.name: item.version for item in installed},
        version=version,
        wanted=WANTED,
        fits=bool(version) and satisfies(version, WANTED),
        build=str(about.get("build", "")).removeprefix("ORT Build Info: "),
        cuda=cuda,
        cudnn=str(about.get("cudnn", "")) or _major_of("libcudnn", libraries),
        telemetry="off" if os.environ.get("ORT_DISABLE_TELEMETRY", "1") not in ("", "0") else "on",
        why=why,
    )


def _libraries(about: dict[str, Any], ask: Ask) -> tuple[Library, ...]:
    """What the CUDA provider's file needs of NVIDIA's libraries, and which of that loads."""
    file = Path(str(about.get("folder", ""))) / "capi" / _PROVIDER_FILE
    required = [name for name in needed_libraries(file) if name.startswith(_NVIDIA)]
    if not required:
        return ()
    major = str(about.get("cuda", "")).partition(".")[0] or _NEWEST
    later = [name for name in _LATER.get(major, _LATER[_NEWEST]) if name not in required]
    reply = ask("libraries", [*required, *later])
    if reply.answer is None:
        return tuple(Library(name, False, why=reply.why, required=name in required) for name in [*required, *later])
    return tuple(
        Library(
            item["name"], item["found"], item.get("version", ""), cause_in(item.get("why", "")),
            item["name"] in required,
        )
        for item in reply.answer
    )  # fmt: skip


def _major_of(stem: str, libraries: Sequence[Library]) -> str:
    name = next((item.name for item in libraries if item.name.startswith(f"{stem}.so.")), "")
    found = numbers(name.removeprefix(f"{stem}.so."))
    return str(found[0]) if found else ""


def _provider(name: str, reply: Reply) -> Provider:
    answer: dict[str, Any] = reply.answer or {}
    if answer.get("loads"):
        return Provider(name, True, float(answer["seconds"]))
    # onnxruntime logs why a library does not load, and says elsewhere only that it took another provider.
    logged = cause_in(reply.log) if "with error:" in reply.log else ""
    why = reply.why or logged or cause_in(str(answer.get("why", ""))) or cause_in(reply.log)
    return Provider(name, False, why=why)


def _graphics(reply: Reply) -> Graphics:
    if reply.answer is None:
        return Graphics()
    return Graphics(**{**reply.answer, "gpus": tuple(Gpu(**gpu) for gpu in reply.answer["gpus"])})
