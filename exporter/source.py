"""Where a checkpoint comes from: a local folder, or the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from exporter.staging import DISK_FULL
from model.errors import EnvironmentFault, ResourceError, UsageError

WHAT = "cannot get checkpoint"
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "LICENSE*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OFFLINE = "Connect to the network once, or give a local folder"


def resolve_source(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint; downloads a hub model into the hub's own cache if it is not there yet.

    Args:
        source: path of a folder, or ``owner/name`` of a hub model.
        revision: branch, tag or commit of a hub model.

    Raises:
        UsageError: neither a folder nor a hub model, or not open to this user.
        EnvironmentFault: huggingface_hub is missing, or the hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(WHAT, "--revision", "the source is a local folder, which has no revisions", "Leave it out")
        return folder
    if folder.exists():
        raise UsageError(WHAT, source, "it is a file", "Name the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(source):
        raise UsageError(WHAT, source, "no such folder", "Check the path, or give a hub id like owner/name")
    return _download(source, revision)


def describe_source(folder: Path) -> tuple[str, str | None]:
    """Id and revision to record: those of the hub for a folder of its cache, else the folder's name."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/"), folder.name
    return folder.name, None


def _download(source: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        remedy = 'Install it: pip install "exaone-export[export]", or give a local folder'
        raise EnvironmentFault(WHAT, source, "the library huggingface_hub is not installed", remedy) from None
    from huggingface_hub import errors

    # The bases of HfHubHTTPError are what the HTTP library underneath, whichever it is, raises without a network.
    failures = (errors.HFValidationError, errors.LocalEntryNotFoundError, OSError, *errors.HfHubHTTPError.__bases__)
    try:
        folder = snapshot_download(source, revision=revision, allow_patterns=list(PATTERNS), ignore_patterns=["*/*"])
    except failures as reason:
        _refuse(source, revision, reason)
    return Path(folder)


def _refuse(source: str, revision: str | None, reason: Exception) -> NoReturn:
    from huggingface_hub import errors

    # The more specific classes first: a gated repository is also one that is not found.
    if isinstance(reason, errors.GatedRepoError):
        remedy = "Accept its licence on its page, then log in with: hf auth login"
        raise UsageError(WHAT, source, "the model is gated", remedy) from reason
    if isinstance(reason, errors.RepositoryNotFoundError | errors.HFValidationError):
        remedy = "Check the spelling; a private model needs: hf auth login"
        raise UsageError(WHAT, source, "neither a local folder nor a model on the hub", remedy) from reason
    if isinstance(reason, errors.RevisionNotFoundError):
        raise UsageError(WHAT, source, f"it has no revision {revision!r}", "Check --revision") from reason
    if isinstance(reason, errors.OfflineModeIsEnabled):
        raise EnvironmentFault(WHAT, source, "not in the cache, and HF_HUB_OFFLINE is set", "Unset it") from reason
    if isinstance(reason, errors.LocalEntryNotFoundError):
        raise EnvironmentFault(WHAT, source, "not in the cache, and the hub cannot be reached", _OFFLINE) from reason
    if isinstance(reason, errors.HfHubHTTPError):
        status = getattr(reason.response, "status_code", "an error")
        raise EnvironmentFault(WHAT, source, f"the hub answered {status}", "Try again later") from reason
    if isinstance(reason, OSError) and reason.errno in DISK_FULL:
        raise ResourceError(
            WHAT, source, "the disk is full", "Free some space, or set HF_HOME to another disk"
        ) from reason
    raise EnvironmentFault(WHAT, source, f"the hub cannot be reached ({type(reason).__name__})", _OFFLINE) from reason
