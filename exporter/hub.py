"""A model on the Hugging Face hub: which files its commit has, and their bytes, checked against the hub's own hashes.

Everything goes through huggingface_hub, so that its cache, token, endpoint, offline switch and transfer protocols hold.
What it says of a failure is never shown: its messages carry addresses that may hold signatures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from exporter.hub_errors import Stopped, library, network_failures, quiet, refuse
from exporter.licence import is_licence
from exporter.transfer import TIMEOUT, Advance, make_api, make_bar, patiently
from model.errors import CheckpointError, EnvironmentFault
from model.jsonfile import read_json_object
from model.shards import INDEX, SINGLE

WHAT = "cannot get checkpoint"
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")  # and licences
_BLOCK = 1 << 20

log = logging.getLogger("exaone_export.exporter")


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says of a file. `sha256` is empty for those that it keeps in git, which have `git_id` only."""

    name: str
    size: int
    sha256: str
    git_id: str


@dataclass(frozen=True)
class HubModel:
    """One commit of a model.

    Attributes:
        id: ``owner/name``.
        commit: its full hash.
        snapshot: the commit's folder in the hub's cache; holds config.json at least.
        files: the commit's files that an export may need; None if the hub did not tell, but `snapshot` is complete.
        others: names of its other files; no more is known of them.
        stopped: makes every transfer end soon, with `Stopped`.
    """

    id: str
    commit: str
    snapshot: Path
    files: Mapping[str, RemoteFile] | None
    others: tuple[str, ...] = ()
    stopped: threading.Event = field(default_factory=threading.Event, compare=False)

    @classmethod
    @quiet()
    def find(cls, model_id: str, revision: str | None = None) -> HubModel:
        """Asks the hub for a model's commit and files; what the cache has is enough where the hub cannot be reached.

        Args:
            model_id: ``owner/name``.
            revision: branch, tag or commit; None is the main branch.

        Raises:
            UsageError: there is no such model or revision, or it is not open to this user.
            EnvironmentFault: huggingface_hub is missing, or the hub cannot be reached and the cache is not enough.
            CheckpointError: it has no config.json.
        """
        hub, api = library(), make_api()

        def ask(commit: str | None) -> Any:
            try:
                return api.model_info(model_id, revision=commit, files_metadata=True, timeout=TIMEOUT)
            except (json.JSONDecodeError, KeyError, TypeError) as reason:
                remedy = "Check HF_ENDPOINT and the proxy"
                raise EnvironmentFault(WHAT, model_id, "the answer is not one of a hub", remedy) from reason

        def config(**where: bool) -> Path:
            # Through the branch's name, so that the cache learns which commit it stands for.
            return Path(api.hf_hub_download(model_id, "config.json", revision=revision, tqdm_class=make_bar(), **where))

        try:
            info = patiently(lambda: ask(revision), "the list of files", at_first=True)
            folder = patiently(config, "config.json").parent
            if folder.name != info.sha:  # somebody pushed in between
                info = patiently(lambda: ask(folder.name), "the list of files")
        except hub.errors.RemoteEntryNotFoundError as reason:
            raise CheckpointError(WHAT, model_id, "it has no config.json", "Name a model") from reason
        except network_failures() as reason:
            folder = _cached_copy(model_id, reason, config, revision)
            return cls(model_id, folder.name, folder, None)
        files = {file.name: file for file in map(_described, info.siblings or ())}
        needed = {name: file for name, file in files.items() if _is_needed(name)}
        return cls(model_id, folder.name, folder, needed, tuple(set(files) - set(needed)))

    @quiet()
    def fetch(self, name: str, advance: Advance | None = None, folder: Path | None = None) -> Path:
        """A file's path, once it is here and is what the hub says; a copy in the cache is used where there is one.

        Args:
            name: one of `files`.
            advance: is told the bytes that arrived.
            folder: where to put it instead of the cache.

        Raises:
            CheckpointError: it was cut short or is damaged; then it is removed, unless it was in the cache before.
            EnvironmentFault: the hub cannot be reached any more.
            ResourceError: the disk is full.
            Stopped: `stopped` was set.
        """
        assert self.files is not None
        file = self.files[name]
        before = self.cached(name)
        # A file of another commit the library puts into this one's folder by itself, if it is to be there.
        if before is not None and (folder is not None or before.parent == self.snapshot):
            self._check(before, file)
            return before
        if folder is not None and (folder / name).is_file():  # left by a run that was killed
            try:
                self._check(folder / name, file)
                return folder / name
            except CheckpointError:
                (folder / name).unlink()
        path = self._download(name, advance, folder)
        try:
            self._check(path, file)
        except CheckpointError:
            if before is None:
                _remove(path)
            raise
        return path

    def cached(self, name: str) -> Path | None:
        """Where the hub's cache has a file of this commit, if it has it, maybe as one of another commit."""
        places = [self.snapshot / name]
        if self.files is not None and name in self.files:
            places.append(self.snapshot.parent.parent / "blobs" / (self.files[name].sha256 or self.files[name].git_id))
        return next((path for path in places if path.is_file()), None)

    @quiet()
    def start_of(self, name: str, count: int) -> bytes:
        """The first `count` bytes of a file, fewer where it is shorter. Raises as `fetch`."""
        path = self.cached(name)
        if path is not None:
            with path.open("rb") as stream:
                return stream.read(count)
        hub, api = library(), make_api()
        address = hub.hf_hub_url(self.id, name, revision=self.commit, endpoint=api.endpoint)
        headers = hub.utils.build_hf_headers(headers={"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"})

        def read() -> bytes:
            content = b""
            with hub.get_session().stream("GET", address, headers=headers, timeout=TIMEOUT) as response:
                hub.hf_raise_for_status(response)
                for block in response.iter_bytes(1 << 16):
                    content += block
                    if len(content) >= count:  # a server that ignores Range would send everything
                        break
            return content[:count]

        try:
            return patiently(read, name, self.stopped)
        except network_failures() as reason:
            refuse(self.id, self.commit, reason)

    def _download(self, name: str, advance: Advance | None, folder: Path | None) -> Path:
        where = {} if folder is None else {"local_dir": folder}

        def download() -> Path:
            bar = make_bar(advance, self.stopped)
            return Path(make_api().hf_hub_download(self.id, name, revision=self.commit, tqdm_class=bar, **where))

        try:
            return patiently(download, name, self.stopped)
        except network_failures() as reason:
            if "Consistency check failed" in str(reason):
                raise CheckpointError(WHAT, name, "the download was cut short", "Export again") from reason
            refuse(self.id, self.commit, reason)

    def _check(self, path: Path, file: RemoteFile) -> None:
        """Compares a file with what the hub says of it."""
        size = path.stat().st_size
        if size != file.size:
            raise CheckpointError(WHAT, file.name, f"{size} bytes, the hub says {file.size}", _AGAIN)
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size)
        with path.open("rb", buffering=0) as stream:
            block = memoryview(bytearray(_BLOCK))
            while count := stream.readinto(block):
                digest.update(block[:count])
                if self.stopped.is_set():
                    raise Stopped
        if digest.hexdigest() != (file.sha256 or file.git_id):
            kind = "sha256" if file.sha256 else "git hash"
            raise CheckpointError(WHAT, file.name, f"its {kind} is not the one that the hub states", _AGAIN)


_AGAIN = "Remove it from the hub's cache if it is there (hf cache), and export again"


def needed_shards(folder: Path, present: Mapping[str, object]) -> list[str]:
    """The weight files that a checkpoint consists of, as far as they are `present`.

    Args:
        folder: has the index, if there is one.
        present: names of the files that exist, here or on the hub.
    """
    if SINGLE in present:
        return [SINGLE]
    if not (folder / INDEX).is_file():
        return []
    shards = read_json_object(folder / INDEX, CheckpointError, WHAT).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    return sorted(name for name in names if isinstance(name, str) and name in present)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a configuration and all weight files that its index names."""
    present = {entry.name: entry for entry in folder.iterdir() if entry.is_file()}
    if "config.json" not in present or not {SINGLE, INDEX} & set(present):
        return False
    if SINGLE in present:
        return True
    shards = read_json_object(folder / INDEX, CheckpointError, WHAT).get("weight_map")
    return isinstance(shards, dict) and set(map(str, shards.values())) <= set(present)


def _described(entry: Any) -> RemoteFile:
    size, sha256 = (entry.size, "") if entry.lfs is None else (entry.lfs.size, str(entry.lfs.sha256))
    return RemoteFile(str(entry.rfilename), int(size or 0), sha256, str(entry.blob_id or ""))


def _is_needed(name: str) -> bool:
    return "/" not in name and (is_licence(name) or any(fnmatchcase(name, pattern) for pattern in PATTERNS))


def _cached_copy(model_id: str, reason: Exception, config: Callable[..., Path], revision: str | None) -> Path:
    """The cache's folder of a model, if it is complete; else says why the hub did not answer."""
    try:
        folder = config(local_files_only=True).parent
    except network_failures():
        refuse(model_id, revision, reason)
    if isinstance(reason, library().errors.RevisionNotFoundError) or not is_complete(folder):
        refuse(model_id, revision, reason)
    if not isinstance(reason, library().errors.OfflineModeIsEnabled):
        log.warning("%s: taken from the cache, since the hub did not give it", model_id)
    return folder


def _remove(path: Path) -> None:
    """Removes a file and, where the cache has links to it, what they lead to."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)
