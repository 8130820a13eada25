"""What the hub's failures mean, in our words; never with the library's, whose messages hold addresses."""

from __future__ import annotations

import logging
import threading
from contextlib import ContextDecorator
from types import ModuleType
from typing import ClassVar, NoReturn

from model.errors import DISK_FULL, EnvironmentFault, ExaoneError, ResourceError, UsageError

WHAT = "cannot get checkpoint"
BROKEN = 599  # no answer at all: a connection that broke or was not made
RETRIED = (408, 425, 429, 500, 502, 503, 504, BROKEN)
_LONGEST_WAIT = 60.0
_OFFLINE = "Connect to the network once, or give a local folder"


class Stopped(Exception):
    """A transfer ended because it is not wanted any more."""


def library() -> ModuleType:
    """The module huggingface_hub. Raises EnvironmentFault if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ModuleNotFoundError:
        remedy = 'Install it: pip install "exaone-export[export]", or give a local folder'
        raise EnvironmentFault(WHAT, "the hub", "the library huggingface_hub is not installed", remedy) from None
    module: ModuleType = huggingface_hub
    return module


def network_failures() -> tuple[type[Exception], ...]:
    """What a transfer raises: refusals, broken connections, a full disk."""
    errors = library().errors
    # The bases of HfHubHTTPError are what the HTTP library underneath, whichever it is, raises without a network.
    return (errors.HFValidationError, OSError, RuntimeError, errors.XetDownloadError, *errors.HfHubHTTPError.__bases__)


class quiet(ContextDecorator):  # noqa: N801 - used like a function
    """Keeps what the libraries log off the terminal, in all threads: addresses are in it, and we say it ourselves."""

    _lock = threading.Lock()
    _depth = 0
    _levels: ClassVar[dict[str, int]] = {}

    def __enter__(self) -> None:
        transport = library().errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0]
        with quiet._lock:
            quiet._depth += 1
            if quiet._depth == 1:
                for name in ("huggingface_hub", transport):
                    quiet._levels[name] = logging.getLogger(name).level
                    logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        with quiet._lock:
            quiet._depth -= 1
            if quiet._depth == 0:
                for name, level in quiet._levels.items():
                    logging.getLogger(name).setLevel(level)


def status_of(reason: Exception) -> int:
    """The HTTP status of a failure; BROKEN for a connection that broke; 0 for anything else."""
    errors = library().errors
    if isinstance(reason, errors.HfHubHTTPError):
        return int(getattr(reason.response, "status_code", 0))
    if isinstance(reason, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | errors.FileMetadataError):
        return 0
    return BROKEN if isinstance(reason, (ConnectionError, TimeoutError, *errors.HfHubHTTPError.__bases__[:1])) else 0


def retry_after(reason: Exception) -> float:
    """Seconds that the hub asks to wait, at most a minute."""
    headers = getattr(getattr(reason, "response", None), "headers", None) or {}
    try:
        return min(float(headers.get("Retry-After", 0)), _LONGEST_WAIT)
    except ValueError:
        return 0.0


def refuse(model_id: str, revision: str | None, reason: Exception) -> NoReturn:
    """Raises what a failure to read from the hub means.

    Raises:
        UsageError: no such model or revision, or not open to this user.
        ResourceError: the disk is full.
        EnvironmentFault: anything else: no network, a busy hub, offline mode.
    """
    raise _explain(model_id, revision, reason) from reason


def _explain(model_id: str, revision: str | None, reason: Exception) -> ExaoneError:
    errors = library().errors
    # The more specific classes first: a gated repository is also one that is not found.
    if isinstance(reason, errors.GatedRepoError):
        return UsageError(WHAT, model_id, "the model is gated", "Accept its licence on its page, then: hf auth login")
    if isinstance(reason, errors.RepositoryNotFoundError | errors.HFValidationError):
        remedy = "Check the spelling; a private model needs: hf auth login"
        return UsageError(WHAT, model_id, "neither a local folder nor a model on the hub", remedy)
    if isinstance(reason, errors.RevisionNotFoundError):
        return UsageError(WHAT, model_id, f"it has no revision {str(revision)[:80]!r}", "Check --revision")
    if status_of(reason) == 401:
        return UsageError(WHAT, model_id, "the hub does not accept the token", "Log in again: hf auth login --force")
    if status_of(reason) == 403:
        return UsageError(WHAT, model_id, "the token may not read it", "Use a token with read access to this model")
    if isinstance(reason, OSError) and reason.errno in DISK_FULL:
        return ResourceError(WHAT, model_id, "the disk is full", "Free some space, or set HF_HOME to another disk")
    return EnvironmentFault(WHAT, model_id, *_unreachable(reason))


def _unreachable(reason: Exception) -> tuple[str, str]:
    errors = library().errors
    if isinstance(reason, errors.OfflineModeIsEnabled) or library().constants.is_offline_mode():
        return "not in the cache, and HF_HUB_OFFLINE is set", "Unset it"
    if isinstance(reason, errors.LocalEntryNotFoundError):
        return "not in the cache, and the hub cannot be reached", _OFFLINE
    if isinstance(reason, errors.HfHubHTTPError):
        return f"the hub answered {status_of(reason) or 'an error'}", "Try again later"
    return f"the hub cannot be reached ({type(reason).__name__})", _OFFLINE
