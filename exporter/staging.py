"""A bundle appears whole or not at all: it is made in a folder beside its place and renamed at the end.

<out>.partial-<uuid>/           the staging folder
    owner-<uuid>                which process works in it
    journal.jsonl               what it is made from, and which parts are finished
    work/                       what a transform keeps until then, such as weights that were calibrated
    bundle/                     what becomes <out>, in one step
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from exporter import disk, journal, partials
from exporter.interrupt import surely, uninterrupted
from exporter.journal import Entry, Header, Journal
from exporter.lock import WHAT, lock_path, output_lock, refuse_if_locked
from exporter.origin import SourceChanged, Stamp
from exporter.partials import Partial
from exporter.target import check_output, explain, make_parents
from model.bundle import MANIFEST, file_sha256
from model.errors import ExaoneError, UsageError

log = logging.getLogger("exaone_export.exporter")


@dataclass(frozen=True)
class Policy:
    """What to do with what is there.

    Attributes:
        force: replace an existing bundle.
        resume: only go on with an interrupted export.
        keep_partial: leave the staging folder when this one fails.
    """

    force: bool = False
    resume: bool = False
    keep_partial: bool = False


@dataclass(frozen=True)
class Staging:
    """A staging folder in use.

    Attributes:
        folder: where the bundle grows.
        journal: of its parts.
    """

    folder: Path
    journal: Journal


class Place:
    """The place of an output folder, locked for this process.

    Args:
        out: the folder to make.
        policy: what to do with what is there.
        locks_hold: whether the file system honours locks.

    Attributes:
        needed: bytes that the whole bundle will take, as far as known; for messages.
    """

    def __init__(self, out: Path, policy: Policy, *, locks_hold: bool) -> None:
        self.out, self.policy = out, policy
        self.needed = 0
        self._locks_hold = locks_hold

    def abandoned(self) -> list[Partial]:
        """What dead processes left beside the output folder."""
        return partials.abandoned(self.out, locks_hold=self._locks_hold)

    def remembered(self) -> dict[str, tuple[Stamp, str]]:
        """Source file → its stamp and sha256, as the interrupted exports saw it."""
        headers = [partial.header for partial in self.abandoned() if partial.header is not None]
        return {name: (h.stamps[name], h.source[name]) for h in headers for name in h.stamps if name in h.source}

    def check_begun(
        self, options: Mapping[str, str], versions: Mapping[str, str], source: Mapping[str, str] | None = None
    ) -> None:
        """With --resume, refuses what cannot be resumed as far as that is known before any graph is made.

        Args:
            options, versions, source: as in a journal's header; the source is None until its files are hashed.

        Raises:
            UsageError: there is no interrupted export, or it has other options or another source.
        """
        if self.policy.resume:
            headers = [partial.header for partial in self.abandoned()]
            reasons = [h.difference_in_options(options, versions) if h is not None else "" for h in headers]
            if source is not None:
                reasons = [
                    why or (h.difference_in_source(source) if h is not None else "")
                    for why, h in zip(reasons, headers, strict=True)
                ]
            if all(reasons):
                raise self._not_resumable(reasons)

    @contextmanager
    def staging(self, header: Header) -> Iterator[Staging]:
        """Gives a staging folder that becomes the output folder when the block ends well, and goes when it does not.

        It is that of an interrupted export with an equal header, if there is one. Others of dead processes are removed.

        Raises:
            UsageError: as `check_begun`; the output folder appeared meanwhile.
            ResourceError: the disk is full or a limit is reached.
        """
        folder = self._resume(header) or partials.create(self.out)
        records: Journal | None = None
        try:
            records = Journal.reopen(folder / journal.FILE) or Journal.create(folder / journal.FILE, header)
            staging = Staging(folder / partials.BUNDLE, records)
            disk.sync_folder(folder)
            disk.sync_folder(folder.parent)
            yield staging
            with uninterrupted():
                self._commit(staging, folder)
        except BaseException as failure:
            keep = self.policy.keep_partial and not isinstance(failure, SourceChanged)
            surely(lambda: self._leave(folder, records, keep=keep))
            raise

    def _resume(self, header: Header) -> Path | None:
        """Takes over the staging folder that this export can go on with, and removes the others."""
        left = self.abandoned()
        reasons = [partial.header.difference(header) if partial.header else "" for partial in left]
        fits = [partial for partial, why in zip(left, reasons, strict=True) if partial.header and not why]
        if self.policy.resume and not fits:
            raise self._not_resumable(reasons)
        mine = partials.claim(max(fits, key=lambda partial: partials.size(partial.folder)), self.out) if fits else None
        for partial, why in zip(left, reasons, strict=True):
            if partial.folder.exists():
                if why:
                    log.warning("an interrupted export to %s is removed: %s", self.out.name, why)
                partials.remove(partial.folder)
        return mine

    def _commit(self, staging: Staging, folder: Path) -> None:
        """Puts the finished bundle in its place."""
        disk.sync_folder(staging.folder)
        staging.journal.append(Entry(_commit_mark(staging.folder)))
        staging.journal.close()
        if not self.out.exists() and not self.out.is_symlink():
            disk.rename(staging.folder, self.out)
        elif not self.policy.force or self.out.is_symlink() or not self.out.is_dir():
            why = "it appeared while this export ran"
            raise UsageError(WHAT, self.out.name[:80], why, "Choose another folder")
        elif not disk.exchange(staging.folder, self.out):
            old = folder / partials.OLD
            disk.rename(self.out, old)
            try:
                disk.rename(staging.folder, self.out)
            except BaseException:
                disk.rename(old, self.out)
                raise
        disk.sync_folder(self.out.parent)
        with suppress(OSError):  # the bundle is complete; what is left over is removed by the next export
            partials.remove(folder)

    def _leave(self, folder: Path, records: Journal | None, *, keep: bool) -> None:
        if records is not None:
            records.close()
        with suppress(OSError):
            if not keep:
                partials.remove(folder)
            elif folder.exists():
                partials.disown(folder)
                log.warning("what is done is kept in %s; the same command goes on from there", folder.name)

    def _not_resumable(self, reasons: list[str]) -> UsageError:
        why = next((reason for reason in reasons if reason), "there is no interrupted export of it")
        return UsageError("cannot resume", self.out.name[:80], why, "Leave --resume out to begin anew")


@contextmanager
def reserve(out: Path, source: Path, policy: Policy) -> Iterator[Place]:
    """Locks the place of an output folder; folders made above it go again if the block fails.

    Raises:
        UsageError: as `check_output`; the folder above cannot be written.
        LockedError: another process exports to it.
        ResourceError: the disk is full or a limit is reached.
    """
    check_place(out, source, force=policy.force)
    made: list[Path] = []
    place: Place | None = None
    try:
        made += make_parents(out)
        with output_lock(out) as locks_hold:
            place = Place(out, policy, locks_hold=locks_hold)
            _repair(place)
            check_output(out, source, force=policy.force)
            yield place
    except BaseException as failure:
        surely(lambda: _remove_empty(made))
        if isinstance(failure, OSError):
            raise explain(failure, out, place.needed if place is not None else 0) from failure
        raise


def reclaimable_bytes(out: Path) -> int:
    """Bytes of what interrupted exports left beside `out`: they are used or removed before new ones are written."""
    return sum(partials.size(folder) for folder in partials.staging_folders(out))


def check_place(out: Path, source: Path, *, force: bool) -> None:
    """What can be said of an output folder at once.

    Raises:
        UsageError: as `check_output`.
        LockedError: another process exports to it.
    """
    try:
        check_output(out, source, force=force)
    except UsageError:
        # Maybe of an export that was killed after its last step, the renaming.
        if out.name and (partials.staging_folders(out) or lock_path(out).exists()):
            with suppress(ExaoneError, OSError), output_lock(out) as locks_hold:
                _repair(Place(out, Policy(), locks_hold=locks_hold))
        raise
    refuse_if_locked(out)


def _repair(place: Place) -> None:
    """Ends what was killed around its last step: a swap in two steps is undone, a finished export cleaned up after."""
    left = place.abandoned()
    for partial in left:
        if (partial.folder / partials.OLD).is_dir() and not os.path.lexists(place.out):
            disk.rename(partial.folder / partials.OLD, place.out)
    mark = _commit_mark(place.out) if (place.out / MANIFEST).is_file() else ""
    for partial in left:
        if partial.header is None or (mark and journal.read_last(partial.folder / journal.FILE) == mark):
            partials.remove(partial.folder)


def _commit_mark(bundle: Path) -> str:
    return f"commit {file_sha256(bundle / MANIFEST)}"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
