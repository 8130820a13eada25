"""Say what this machine can run, which execution providers really load, and what to install if not.

Every provider is loaded by a process of its own, which computes a sum with it: a library that crashes or hangs is
reported, and does no harm. The exit code is 0 if bundles run here on some provider, or on the one named, and 5 if not.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from exaone_export.output import human_bytes, print_json
from model.errors import EnvironmentFault, printable

if TYPE_CHECKING:
    from exaone_export.doctor.report import Diagnosis


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--ep", metavar="NAME", help="the execution provider that must load (default: any)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(arguments: Namespace) -> int:
    """Examine, and print.

    Raises:
        EnvironmentFault: nothing runs here, or not on the provider asked for; after the report was printed.
    """
    from exaone_export.doctor.examine import examine

    ep = None if arguments.ep is None else arguments.ep.lower().removesuffix("executionprovider")
    report = examine(None if ep == "auto" else ep)
    if arguments.json:
        print_json(report, arguments.stdout)
    else:
        print("\n".join(printable(line, 1000) for line in _lines(report)), file=arguments.stdout)
    if not report.ok:
        raise _fault(report, ep)
    return 0


def _fault(report: Diagnosis, ep: str | None) -> EnvironmentFault:
    first = next((finding for finding in report.findings if finding.level == "error"), None)
    why = first.what if first else "no execution provider loads"
    return EnvironmentFault("cannot run bundles here", ep or "onnxruntime", why, first.remedy if first else "")


def _lines(report: Diagnosis) -> Iterator[str]:
    runtime, processor, memory = report.runtime, report.processor, report.memory
    yield f"exaone-export {report.version}, Python {report.python}, {report.platform}"
    features = ", ".join(processor.features) or "features unknown"
    yield f"processor  {processor.name}; {processor.cores} cores, {processor.threads} threads; {features}"
    free, total = (human_bytes(size) if size is not None else "unknown" for size in (memory.available, memory.total))
    yield f"memory     {free} free of {total}; huge pages: {memory.huge_pages or 'unknown'}"
    names = " and ".join(f"{name} {version}" for name, version in runtime.distributions.items()) or "none"
    said = runtime.version or "cannot be imported"
    yield f"runtime    onnxruntime {said} (wants {runtime.wanted}), from {names}; telemetry {runtime.telemetry}"
    for provider in report.providers:
        state = f"loads, {provider.seconds:.1f} s" if provider.loads else f"does not load: {provider.why}"
        yield f"provider   {provider.name} {state}"
    yield from _nvidia_lines(report)
    there = [f"{name} {version}" for name, version in report.export.items() if version]
    yield f"exporting  {', '.join(there) or 'not installed'}"
    for finding in report.findings:
        yield f"{finding.level}: {finding.what}."
        if finding.remedy:
            yield f"    {finding.remedy}"


def _nvidia_lines(report: Diagnosis) -> Iterator[str]:
    graphics, runtime = report.graphics, report.runtime
    if graphics.board:
        yield f"board      {graphics.board}"
    if graphics.driver:
        yield f"driver     {graphics.driver}{f', CUDA up to {graphics.cuda}' if graphics.cuda else ''}"
    elif runtime.cuda:
        yield "driver     none"
    for number, gpu in enumerate(graphics.gpus):
        sizes = f"{human_bytes(gpu.free)} free of {human_bytes(gpu.total)}" if gpu.total else "memory shared"
        yield f"gpu {number}      {gpu.name}; {sizes}; compute capability {gpu.capability or 'unknown'}"
    if runtime.cuda:
        cudnn = f", cuDNN {runtime.cudnn}" if runtime.cudnn else ""
        yield f"cuda       built for CUDA {runtime.cuda}{cudnn}"
    for library in report.libraries:
        state = library.version or "found" if library.found else "not found"
        yield f"library    {library.name} {state}{'' if library.required else ' (optional)'}"
    for wheel in report.wheels:
        state = wheel.version or "not installed"
        yield f"wheel      {wheel.name} {state} (wants {wheel.wanted})"
