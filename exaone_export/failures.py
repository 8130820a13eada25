"""What a failure looks like to somebody at a terminal: one `error:` line and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import re
import traceback
from typing import Any

from model.errors import DISK_FULL, EnvironmentFault, ExaoneError, ResourceError, UsageError, printable

DEBUG_VARIABLE = "EXAONE_EXPORT_DEBUG"
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143
_LONGEST_LINE = 2000

_EXPORT_LIBRARIES = {
    "huggingface_hub", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "optimum", "safetensors", "torch", "transformers",
}  # fmt: skip
# How torch, ONNX Runtime, Python's threads and the loader of libraries say that there was not enough memory.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|bad allocation|bad_alloc|Failed to allocate memory|out of memory|can't start new thread"
    r"|failed to map segment|[Cc]annot allocate memory"
)


class Terminated(BaseException):
    """SIGTERM arrived; travels like KeyboardInterrupt, so that unfinished output is removed on the way out."""


def explain(failure: Exception) -> ExaoneError:
    """The error of ours that says what `failure` means to the user.

    An `ExaoneError` is returned as it is. Exhausted memory and disks become `ResourceError`, a file that cannot be
    used `UsageError` or `ResourceError`, a missing library `EnvironmentFault`; anything else is a fault of ours and
    becomes a plain `ExaoneError` with exit code 1.
    """
    if isinstance(failure, ExaoneError):
        return failure
    if isinstance(failure, MemoryError) or (
        isinstance(failure, RuntimeError | ImportError) and _OUT_OF_MEMORY.search(str(failure))
    ):
        return ResourceError("out of memory", "this process", "the system gave no more", "Free some memory")
    if isinstance(failure, ModuleNotFoundError) and failure.name:
        return _missing_library(failure.name)
    if isinstance(failure, OSError) and failure.errno is not None:
        return _file_failure(failure)
    why = _first_line(f"{type(failure).__name__}: {failure}")
    return ExaoneError("internal error", "exaone-export", why, f"Set {DEBUG_VARIABLE}=1 to see where, and report it")


def message_lines(error: ExaoneError, *, limit: int = 3) -> str:
    """The text for the terminal: `error: ` and at most `limit` lines, control characters as escapes."""
    lines = [line for line in f"error: {error}".splitlines() if line.strip()]
    return "\n".join(printable(line, _LONGEST_LINE) for line in lines[:limit])


def parts(error: ExaoneError) -> dict[str, Any]:
    """The error for programs: the parts of its message, and its class as `kind`."""
    found = {name: getattr(error, name) for name in ("what", "where", "why", "remedy")}
    return {**found, "kind": type(error).__name__}


def debug_trace(failure: BaseException) -> str:
    """The traceback where the user asked for it by EXAONE_EXPORT_DEBUG=1, else an empty string."""
    if os.environ.get(DEBUG_VARIABLE, "0") in ("", "0"):
        return ""
    return "".join(traceback.format_exception(failure))


def _missing_library(module: str) -> ExaoneError:
    library = module.partition(".")[0]
    remedy = "Install exaone-export again"
    if library in _EXPORT_LIBRARIES:
        remedy = 'Install what exporting needs: pip install "exaone-export[export]"'
    return EnvironmentFault("cannot load a library", library, "it is not installed", remedy)


def _file_failure(failure: OSError) -> ExaoneError:
    where = os.fsdecode(failure.filename) if isinstance(failure.filename, str | bytes) else "the file system"
    why = failure.strerror or type(failure).__name__
    if failure.errno in DISK_FULL:
        return ResourceError("cannot write", where, why, "Free some space or choose another folder")
    if failure.errno == errno.ENOMEM:
        return ResourceError("out of memory", where, why, "Free some memory")
    if isinstance(failure, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError):
        return UsageError("cannot use the path", where, why, "Check its name")
    return ResourceError("cannot use the path", where, why, "Check its permissions and the file system")


def _first_line(text: str) -> str:
    line = next(iter(text.strip().splitlines()), "unknown")
    return re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", line)[:300]
