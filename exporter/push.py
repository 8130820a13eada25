"""A bundle on the Hugging Face hub: checked, uploaded in one commit, nothing but its own files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from exporter.hub_errors import library, network_failures, quiet, status_of
from exporter.licence import is_licence
from exporter.transfer import TIMEOUT, make_api, patiently
from model.bundle import MANIFEST, VERIFY, Manifest, bundle_path, check_sizes, file_sha256, read_manifest
from model.errors import BundleError, EnvironmentFault, UsageError
from model.progress import NullProgress, Progress

WHAT = "cannot push"
PREFIX = "EXAONE"
# The hub's own rules; in what it takes for a name there is no "--" and no "..", and no ".git" at the end.
_NAME = re.compile(r"(?:[A-Za-z0-9](?:[\w.-]*\w)?/)?[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
_LONGEST_NAME = 96
_MAKER = "LGAI-EXAONE/"
_LOGIN = "Log in with a token that may write: hf auth login"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class PushReport:
    """What was pushed.

    Attributes:
        repository: ``owner/name``.
        url: of the commit.
        commit: its hash.
        files, bytes: number and size of the bundle's files.
    """

    repository: str
    url: str
    commit: str
    files: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self)


def check_form(repository: str) -> None:
    """Refuses what can be no repository's name; asks nobody and reads nothing.

    Args:
        repository: ``owner/name``, or the name alone.

    Raises:
        UsageError: it is none by the hub's rules.
    """
    longest = max(map(len, repository.split("/")))
    barred = next((part for part in ("--", "..") if part in repository), ".git" * repository.endswith(".git"))
    if longest > _LONGEST_NAME:
        why = f"it has {longest} characters, and names on the hub have {_LONGEST_NAME} at most"
    elif barred:
        why = f"the hub allows no {barred!r} there"
    elif not _NAME.fullmatch(repository):
        why = "not a repository of the hub"
    else:
        return
    raise UsageError(WHAT, repr(repository[:80]), why, "Name it like owner/EXAONE-...")


def check_name(repository: str, folder: Path, source_id: str | None) -> None:
    """Refuses a name that EXAONE's licence does not allow a derivative.

    The licence wants "EXAONE" at the beginning of a derivative's name. That holds for everything made from LG AI
    Research's weights; only a folder that comes with another licence is free in its name.

    Args:
        repository: ``owner/name``, or the name alone.
        folder: the checkpoint, or the bundle.
        source_id: where it comes from, if that is known.

    Raises:
        UsageError: with a name that is allowed.
    """
    check_form(repository)
    owner, slash, name = repository.rpartition("/")
    if name.startswith(PREFIX):
        return
    texts = [path.read_bytes()[:_BLOCK] for path in sorted(folder.iterdir()) if is_licence(path.name)]
    bound = (source_id or "").startswith(_MAKER) or any(PREFIX.encode() in text.upper() for text in texts)
    if bound or not texts:
        rest = name[len(PREFIX) :] if name.upper().startswith(PREFIX) else f"-{name}"
        why = f"EXAONE's licence wants the name of what is made from it to begin with {PREFIX!r}"
        raise UsageError(WHAT, repository, why, f"Call it {owner}{slash}{PREFIX}{rest}")


def check_access(repository: str, *, private: bool) -> str:
    """Asks the hub whether the user may write a repository, before hours are spent on what goes there.

    Args:
        repository: ``owner/name``, or the name alone for one of the user's own.
        private: whether it must not be public.

    Returns:
        ``owner/name``.

    Raises:
        UsageError: not logged in, or not allowed; the repository is public, and was to be private.
        EnvironmentFault: the hub cannot be reached.
    """
    with _explained(repository):
        api = make_api()
        user = patiently(api.whoami, "the user", at_first=True)
        token = (user.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise UsageError(WHAT, repository, "the token may read only", _LOGIN)
        full = repository if "/" in repository else f"{user['name']}/{repository}"
        owners = {user["name"], *(team["name"] for team in user.get("orgs") or ())}
        if full.partition("/")[0] not in owners:
            why = f"{user['name']} is not a member of {full.partition('/')[0]}"
            raise UsageError(WHAT, full, why, f"Push to {user['name']}/{full.rpartition('/')[2]}")
        try:
            info = api.model_info(full, timeout=TIMEOUT)
        except library().errors.RepositoryNotFoundError:
            return full  # it will be made
        if private and not info.private:
            why = "it exists and is public, not private"
            raise UsageError(WHAT, full, why, "Choose another name, or make it private on its page")
        api.auth_check(full, write=True)
    return full


def push_bundle(
    bundle: Path, repository: str, *, private: bool = False, progress: Progress | None = None
) -> PushReport:
    """Uploads a bundle's files in one commit; makes the repository if there is none. The bundle stays as it is.

    Args:
        bundle: its folder.
        repository: ``owner/name``, or the name alone for one of the user's own.
        private: make the repository private.
        progress: told how far it is.

    Raises:
        BundleError: a file is not what the manifest says.
        UsageError: the name is not allowed, or the user may not write there.
        EnvironmentFault: the hub cannot be reached, or somebody else pushed at the same time.
    """
    progress = progress or NullProgress()
    manifest = read_manifest(bundle)
    check_name(repository, bundle, str(manifest.source.get("id")))
    repository = check_access(repository, private=private)
    check_sizes(bundle, manifest)
    _check_hashes(bundle, manifest, progress)
    names = [*manifest.files, MANIFEST, *([VERIFY] if (bundle / VERIFY).is_file() else [])]
    commit = _upload(bundle, names, manifest, repository, private=private, progress=progress)
    size = sum(bundle_path(bundle, name).stat().st_size for name in names)
    return PushReport(repository, str(commit.commit_url), str(commit.oid), len(names), size)


def _upload(
    bundle: Path, names: list[str], manifest: Manifest, repository: str, *, private: bool, progress: Progress
) -> Any:
    with _explained(repository):
        api, hub = make_api(), library()
        additions = [hub.CommitOperationAdd(name, bundle_path(bundle, name)) for name in names]
        patiently(lambda: api.create_repo(repository, private=private or None, exist_ok=True), "the repository")
        progress.start("uploading", sum(addition.upload_info.size for addition in additions), "bytes")
        upload = partial(api.preupload_lfs_files, repository, free_memory=False)
        for addition in additions:
            # File by file, so that the progress moves, and so that one that changed meanwhile is noticed in time.
            patiently(partial(upload, additions=[addition]), addition.path_in_repo)
            stated = manifest.files.get(addition.path_in_repo)
            if stated is not None and addition.upload_info.sha256.hex() != stated.sha256:
                raise BundleError(WHAT, addition.path_in_repo, "the file changed while it was uploaded", "Push again")
            progress.advance(addition.upload_info.size)
        source = f"{manifest.source.get('id')}, {manifest.recipe if manifest.recipe != 'none' else manifest.dtype}"
        commit = api.create_commit(repository, additions, commit_message=f"ONNX export of {source}"[:200])
        progress.finish()
    return commit


def _check_hashes(bundle: Path, manifest: Manifest, progress: Progress) -> None:
    progress.start("hashing", sum(info.size for info in manifest.files.values()), "bytes")
    for name, info in manifest.files.items():
        if not bundle_path(bundle, name).is_file():  # the card, whose size nothing that loads a bundle looks at
            raise BundleError("damaged bundle", name, "the file is missing", "Export or copy the bundle again")
        if file_sha256(bundle_path(bundle, name), progress.advance) != info.sha256:
            raise BundleError("damaged bundle", name, "its sha256 differs", "Export or copy the bundle again")
    progress.finish()


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Lets the hub's failures come out in our words, and keeps its own off the terminal."""
    failures: tuple[type[Exception], ...] = (*network_failures(), ValueError, KeyError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with quiet(), library().utils.disable_progress_bars():
                yield
    except failures as reason:
        _refuse(repository, reason)


def _refuse(repository: str, reason: Exception) -> NoReturn:
    errors = library().errors
    if isinstance(reason, RuntimeError) and isinstance(reason.__cause__, Exception):
        reason = reason.__cause__  # the library wraps what goes wrong with one file
    status = status_of(reason)
    if isinstance(reason, errors.LocalTokenNotFoundError):
        raise UsageError(WHAT, repository, "nobody is logged in", _LOGIN) from reason
    if status == 401:
        raise UsageError(WHAT, repository, "the hub does not accept the token", _LOGIN) from reason
    if status in (402, 403):
        raise UsageError(WHAT, repository, "the token may not write there", _LOGIN) from reason
    if status == 404 or isinstance(reason, errors.HFValidationError):
        raise UsageError(WHAT, repository, "the hub has no such place", "Check the name") from reason
    if status in (409, 412):
        raise EnvironmentFault(WHAT, repository, "somebody else pushed at the same time", "Push again") from reason
    if isinstance(reason, errors.OfflineModeIsEnabled):
        raise EnvironmentFault(WHAT, repository, "HF_HUB_OFFLINE is set", "Unset it") from reason
    said = f"the hub answered {status}" if isinstance(reason, errors.HfHubHTTPError) else type(reason).__name__
    remedy = f"Try again later: exaone-export push BUNDLE {repository}"
    raise EnvironmentFault(WHAT, repository, f"the upload failed ({said})", remedy) from reason
