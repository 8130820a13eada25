"""Where a checkpoint comes from: a local folder, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from exporter.hub import HubModel, needed_shards
from exporter.lock import output_lock, short_name
from exporter.low_disk import ShardSupply
from exporter.origin import Feed
from exporter.placeholders import make_placeholders
from exporter.target import explain, make_parents
from model.errors import LockedError, UsageError
from model.progress import NullProgress, Progress

WHAT = "cannot get checkpoint"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LABEL = ".source-"
_DIGEST = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class OpenedSource:
    """A checkpoint that can be exported.

    Attributes:
        folder: with its files, or their placeholders.
        id, revision: of the hub; None for a plain folder.
        feed: gives the weights of the placeholders; None where all files are in the folder.
    """

    folder: Path
    id: str | None = None
    revision: str | None = None
    feed: Feed | None = None


def is_hub_id(source: str) -> bool:
    """Whether a source is the id of a model on the hub: ``owner/name``, and no such file or folder is here."""
    return _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


@contextmanager
def open_source(
    source: str,
    out: Path,
    *,
    revision: str | None = None,
    low_disk: bool = False,
    keep: bool = False,
    progress: Progress | None = None,
) -> Iterator[OpenedSource]:
    """Opens a checkpoint for an export to `out`; of a hub model the weights come while they are read.

    Args:
        source: path of a folder, or ``owner/name`` of a hub model.
        out: the bundle to make; what has to be on the disk meanwhile is beside it, and is removed at the end.
        revision: branch, tag or commit of a hub model.
        low_disk: keep the shards that are fetched only as long as they are needed, and not in the hub's cache.
        keep: leave what was fetched if the block fails.
        progress: told how far it is.

    Raises:
        UsageError: neither a folder nor a hub model, or not open to this user; `low_disk` for a folder.
        EnvironmentFault: huggingface_hub is missing, or the hub cannot be reached.
        CheckpointError: a file is damaged.
        ResourceError: there is not enough room for the shards.
        LockedError: another process exports it to `out`.
    """
    folder = _local_folder(source, revision)
    if folder is not None:
        if low_disk:
            raise UsageError(WHAT, "--low-disk", "the source is a local folder, whose files are not ours to remove")
        yield OpenedSource(folder, *describe_source(folder))
        return
    model = HubModel.find(source, revision)
    if model.files is None:
        yield OpenedSource(model.snapshot, model.id, model.commit)
        return
    progress = progress or NullProgress()
    with _working_folder(out, f"{model.id}@{model.commit}", keep=keep) as working:
        names = make_placeholders(model, working / "checkpoint", progress)
        own = working / "shards" if low_disk else None
        supply = ShardSupply(model, working / "checkpoint", names, own, progress)
        try:
            supply.check_space()
            feed = Feed(supply.hashes, supply.release, supply.gate, supply.plan, supply.room(out))
            yield OpenedSource(working / "checkpoint", model.id, model.commit, feed)
        finally:
            supply.close()


def resolve_source(source: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The folder of a whole checkpoint; fetches a hub model into the hub's own cache as far as it is not there yet.

    Args:
        source: path of a folder, or ``owner/name`` of a hub model.
        revision: branch, tag or commit of a hub model.
        progress: told how far it is.

    Raises:
        UsageError, EnvironmentFault, CheckpointError, ResourceError: as `open_source`.
    """
    folder = _local_folder(source, revision)
    if folder is not None:
        return folder
    model = HubModel.find(source, revision)
    if model.files is None:
        return model.snapshot
    progress = progress or NullProgress()
    _fetch(model, [name for name in model.files if not name.endswith(".safetensors")], progress)
    _fetch(model, needed_shards(model.snapshot, model.files), progress)
    return model.snapshot


def describe_source(folder: Path) -> tuple[str | None, str | None]:
    """Id and revision of the hub for a folder of its cache; None and None for any other."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/"), folder.name
    return None, None


def _local_folder(source: str, revision: str | None) -> Path | None:
    """The folder that a source names; None for a hub id."""
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(WHAT, "--revision", "the source is a local folder, which has no revisions", "Leave it out")
        return folder
    if folder.exists():
        raise UsageError(WHAT, source, "it is a file", "Name the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(source):
        raise UsageError(WHAT, source, "no such folder", "Check the path, or give a hub id like owner/name")
    return None


def _fetch(model: HubModel, names: list[str], progress: Progress) -> None:
    sizes = {name: file.size for name, file in (model.files or {}).items()}
    progress.start("downloading", sum(sizes[name] for name in names if model.cached(name) is None), "bytes")
    for name in names:
        model.fetch(name, progress.advance)
    progress.finish()


@contextmanager
def _working_folder(out: Path, content: str, *, keep: bool) -> Iterator[Path]:
    """A folder beside `out` that only this process uses; one that a killed process left for the same content is reused.

    Its `shards` are kept from that process, each a whole one. It is removed at the end, unless `keep` and it failed.
    """
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    stem = f".{short_name(out.name, 64)}{_LABEL}"
    working = out.with_name(f"{stem}{digest}")
    failed, made = True, []
    try:
        with ExitStack() as stack:
            try:
                made = make_parents(out)
                stack.enter_context(_lock(out, out.with_name(stem)))
                for entry in out.parent.iterdir():
                    if entry.name.startswith(stem) and _DIGEST.fullmatch(entry.name[len(stem) :]) and entry.is_dir():
                        _tidy(entry, keep_shards=entry == working)
                (working / "shards").mkdir(parents=True, exist_ok=True)
            except OSError as reason:
                raise explain(reason, out) from reason
            try:
                yield working
                failed = False
            finally:
                if not (keep and failed):
                    shutil.rmtree(working, ignore_errors=True)
    finally:
        for parent in made:
            with suppress(OSError):  # it holds the bundle now
                parent.rmdir()


@contextmanager
def _lock(out: Path, name: Path) -> Iterator[None]:
    try:
        with output_lock(name):
            yield
    except LockedError as reason:
        raise LockedError(reason.what, out.name[:80], reason.why, reason.remedy) from None


def _tidy(working: Path, *, keep_shards: bool) -> None:
    """Empties a folder that a killed process left, but for whole shards."""
    for entry in working.iterdir():
        if entry.name == "shards" and keep_shards:
            shutil.rmtree(entry / ".cache", ignore_errors=True)  # huggingface_hub's notes, and beginnings of shards
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()
    if not keep_shards:
        working.rmdir()
