"""Exports that are stopped: in a forked child, at the n-th change of the disk, by a signal or a failing system call.

A child inherits what this process has imported, so that a kill and the export that follows cost some tens of
milliseconds. Its tracing is replaced by `tests.declared`; everything behind it is real.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter import disk, package, write
from exporter import export as export_room
from exporter.export import ExportOptions, Policy, export_checkpoint, rewrite_bundle
from model.bundle import file_sha256
from model.errors import ExaoneError
from model.shards import TensorRef
from quantize.apply import Quantizer
from quantize.recipe import Recipe, Rule
from quantize.scheme import Scheme
from tests import tiny
from tests.declared import declare_readers

LONGEST = 60  # seconds for one child
# The one without anything but ASCII, in which some Pythons do not start from a folder whose name has more.
PLAIN_LOCALE = "C" if f"{sys.prefix}{__file__}".isascii() else "C.UTF-8"
# Asymmetric and in small blocks, so that each weight is three tensors, some of them small enough for the .onnx file.
RECIPE = Recipe(
    "crash",
    (Rule("*.lm_head", Scheme(8, 32)), Rule("*.mlp.*", Scheme(4, 16, symmetric=False)), Rule("*", Scheme(4, 32))),
)
Fault = Callable[[int, str, Path], None]
trace: Callable[..., dict[str, ir.Model]] = (
    declare_readers  # what stands for tracing; benchmarks put graphs here that were really traced
)


@dataclass
class Seen:
    """What a child did, as far as it came to tell.

    Attributes:
        made: parts whose tensors were asked for.
        read: parts, each with the name of a tensor of the checkpoint that was read for it.
        operations: changes of the disk, in order.
        outcome: "done", an error's text, or "" if it was killed.
        code: exit code of its error; 0 for none.
        resumed: parts that an earlier export had written.
    """

    made: list[str] = field(default_factory=list)
    read: list[tuple[str, str]] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    outcome: str = ""
    code: int = 0
    resumed: int = 0


def small_checkpoint(folder: Path, kind: str = "hybrid", **changes: Any) -> Path:
    """A checkpoint of as few weights as an architecture can have."""
    layers: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "vocab_size": 512}
    if kind == "dense":
        layers |= {"layer_types": ["full_attention"]}
    vision = {"depth": 1, "fullatt_block_indexes": [0]} if kind == "vlm" else {}
    return tiny.make_checkpoint(folder, kind, **(layers | changes), vision=vision)


def export(source: Path, out: Path, **options: Any) -> Callable[[], Any]:
    """An export with quantization, to be run by `child`."""
    return lambda: export_checkpoint(source, out, ExportOptions(**options), Quantizer(RECIPE))


def rewrite(bundle: Path, out: Path, **policy: Any) -> Callable[[], Any]:
    """A quantization of a float bundle."""
    return lambda: rewrite_bundle(bundle, out, Quantizer(RECIPE), Policy(**policy))


def child(action: Callable[[], Any], notes: Path, fault: Fault | None = None) -> tuple[int, Seen]:
    """Runs an export in a child; returns the status that `os.waitpid` gives, and what it did.

    Args:
        action: from `export` or `rewrite`.
        notes: a file for the child's account.
        fault: called before each change of the disk with its number (from 1), kind and path.
    """
    notes.unlink(missing_ok=True)
    package.versions()  # remembered from here on: finding them out takes longer than a small export
    pid = os.fork()
    if pid == 0:
        os._exit(_run(action, notes, fault))
    status = os.waitpid(pid, 0)[1]
    seen = Seen(**json.loads(notes.read_text())) if notes.exists() else Seen()
    seen.read = [(part, tensor) for part, tensor in seen.read]
    return status, seen


def kill_at(number: int) -> Fault:
    """Ends the process without a chance to do anything."""

    def fault(count: int, operation: str, path: Path) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def fail_at(number: int, code: int) -> Fault:
    """Lets the system refuse a change, and all later ones that need room."""

    def fault(count: int, operation: str, path: Path) -> None:
        if count >= number and operation in ("write", "sync", "make folder", "open"):
            raise OSError(code, os.strerror(code), str(path))

    return fault


def tear(number: int) -> Callable[[], None]:
    """Makes the number-th writing end half-way, by a kill; to be called in the child."""
    whole, count = disk.write_at, 0

    def write_at(handle: int, data: memoryview, offset: int, path: Path) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.pwrite(handle, data[: data.nbytes // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        whole(handle, data, offset, path)

    def install() -> None:
        disk.write_at = write_at

    return install


def tree(folder: Path) -> dict[str, str]:
    """Relative path → sha256 of every file below a folder."""
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def beside(out: Path) -> list[str]:
    """What an export left beside its output folder."""
    names = os.listdir(out.parent) if out.parent.exists() else []
    return sorted(name for name in names if name.startswith((f"{out.name}.", f".{out.name}.")))


def _run(action: Callable[[], Any], notes: Path, fault: Fault | None) -> int:
    signal.alarm(LONGEST)
    seen = Seen()
    _watch(seen, fault)
    try:
        report = action()
        seen.outcome, seen.resumed = "done", getattr(report, "resumed_parts", 0)
    except ExaoneError as failure:
        seen.outcome, seen.code = str(failure), failure.exit_code
    except BaseException:  # noqa: BLE001 - whatever it was is told
        seen.outcome, seen.code = traceback.format_exc(), 1
    notes.write_text(json.dumps(vars(seen)))
    return seen.code


def _watch(seen: Seen, fault: Fault | None) -> None:
    """Replaces, in this process only, what is slow by what is not, and lets the rest tell what it does.

    Syncing is slow, and only a power cut loses what the kernel has: that is tried in test_f_disk.py.
    """
    make, read = write._Writer._make, TensorRef._bytes

    def about_to(operation: str, path: Path) -> None:
        seen.operations.append(operation)
        if fault is not None:
            fault(len(seen.operations), operation, path)

    def counted_make(self: Any, graph: str, part: Any, data: Any) -> Any:
        seen.made.append(part.name)
        return make(self, graph, part, data)

    def counted_read(self: TensorRef, start: int, count: int) -> NDArray[np.uint8]:
        seen.read.append((seen.made[-1] if seen.made else "", self.name))
        return read(self, start, count)

    replaced: Mapping[Any, tuple[str, Any]] = {
        os: ("fsync", lambda handle: None), export_room: ("_trace", trace),
        disk: ("about_to", about_to), write._Writer: ("_make", counted_make), TensorRef: ("_bytes", counted_read),
    }  # fmt: skip
    for owner, (name, function) in replaced.items():
        setattr(owner, name, function)
