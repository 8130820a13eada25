"""Every error the toolkit raises on purpose.

    ExaoneError
    ├── UsageError          2   wrong arguments, unusable input (prompt, image, recipe)
    ├── CheckpointError     3   the source checkpoint is damaged or not what it says
    ├── BundleError         4   an exported bundle is damaged or hostile
    ├── EnvironmentFault    5   an execution provider, library or version is missing
    ├── ResourceError       6   disk, memory or a limit is exhausted
    ├── NumericalError      7   NaN or Inf, or a verification that failed
    └── LockedError         8   another process works on the same folder

The number is the exit code of the command line. A message has four parts, and reads
``<what>: <file or tensor>: <why>. <what to do>``.
"""

from __future__ import annotations

import errno

# What the system says where a file cannot grow.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST_WHERE = 400


def printable(text: str, limit: int = 120) -> str:
    """Text from a file as it may stand in a message: at most `limit` characters, control characters as escapes."""
    shown = text if len(text) <= limit else f"{text[:limit]}…"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


class ExaoneError(Exception):
    """Root of the tree; carries the parts of its message.

    Args:
        what: what could not be done, in a few words ("cannot read checkpoint").
        where: the file, tensor or option it is about.
        why: the reason, with the numbers that matter.
        remedy: what the user can do, as a sentence without its full stop; may be empty.
    """

    exit_code = 1

    def __init__(self, what: str, where: str, why: str, remedy: str = "") -> None:
        self.what = what
        self.where = printable(where, _LONGEST_WHERE) or "''"
        self.why = why.rstrip(".")
        self.remedy = remedy.rstrip(".")
        super().__init__(str(self))

    def __str__(self) -> str:
        message = f"{self.what}: {self.where}: {self.why}."
        return f"{message} {self.remedy}." if self.remedy else message

    def __reduce__(self) -> tuple[type[ExaoneError], tuple[str, str, str, str]]:
        # Exception's own pickling would pass the joined message as `what`.
        return type(self), (self.what, self.where, self.why, self.remedy)


class UsageError(ExaoneError):
    """Wrong arguments or unusable input."""

    exit_code = 2


class CheckpointError(ExaoneError):
    """The source checkpoint is damaged, incomplete or inconsistent."""

    exit_code = 3


class BundleError(ExaoneError):
    """An exported bundle is damaged or hostile."""

    exit_code = 4


class EnvironmentFault(ExaoneError):
    """An execution provider, a library or a version is missing."""

    exit_code = 5


class ResourceError(ExaoneError):
    """Disk, memory or a limit is exhausted."""

    exit_code = 6


class NumericalError(ExaoneError):
    """NaN or Inf appeared, or a verification failed."""

    exit_code = 7


class LockedError(ExaoneError):
    """Another process is working on the same folder."""

    exit_code = 8
