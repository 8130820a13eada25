"""From graphs with lazy weights to a bundle in its place: what exporting and rewriting have in common."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter import parts
from exporter.journal import Header
from exporter.origin import Feed, SourceFiles
from exporter.package import Origin, Transform, transform_graphs, versions, write_bundle
from exporter.report import ExportReport
from exporter.staging import Place, reclaimable_bytes
from exporter.target import check_space
from exporter.write import Guard, predicted_bytes
from model.progress import Progress
from model.source import WeightSource

WORK = "work"  # folder beside the growing bundle, for what a transform keeps until it is complete


class Job:
    """One bundle to be made.

    Args:
        place: where.
        choices: options that its bytes depend on, as in the journal's header.
        transform: of its graphs.
        progress: is told how far it has come.
        feed: of files that are fetched when they are needed.
    """

    def __init__(
        self,
        place: Place,
        choices: Mapping[str, str],
        transform: Transform | None,
        progress: Progress,
        feed: Feed | None = None,
    ) -> None:
        self._place, self._choices, self._transform = place, choices, transform
        self._progress, self._feed = progress, feed or Feed()

    def begin(self, files: Mapping[str, Path]) -> SourceFiles:
        """The source's files, ready to be hashed; what an interrupted export knows of them is not asked again.

        Raises:
            UsageError: an interrupted export is asked for, and there is none, or it has other options.
            CheckpointError: a file cannot be read.
        """
        self._place.check_begun(self._choices, versions())
        return SourceFiles(files, self._feed.hashes, self._place.remembered())

    def check_source(self, files: SourceFiles) -> None:
        """Refuses another source than that of the interrupted export that is asked for; files as before cost nothing.

        Raises:
            UsageError: a file has other content.
            CheckpointError: a file cannot be read.
        """
        if self._place.policy.resume:
            self._place.check_begun(self._choices, versions(), files.digests(self._progress))

    def run(
        self,
        models: dict[str, ir.Model],
        origin: Origin,
        files: SourceFiles,
        refs: Mapping[str, WeightSource] | None = None,
    ) -> ExportReport:
        """Writes the bundle, or the rest of it; the report names no folder that lasts, and no time.

        Args:
            models: the graphs, with lazy weights.
            origin: what they are made from.
            files: of the source.
            refs: canonical name → weight of a checkpoint, for a transform that looks at it as a whole.

        Raises:
            UsageError: as `begin`; the output folder appeared meanwhile.
            CheckpointError: the source changed.
            ResourceError: the disk has not enough room, or it is not what it was.
            NumericalError: from reading a weight.
        """
        stored = transform_graphs(models, self._transform)
        plan = [part for name, model in models.items() for part in parts.split(name, model)]
        digests = files.digests(self._progress)
        files.confirm()
        header = Header(self._choices, versions(), digests, parts.digest(plan), files.stamps)
        place = self._place
        place.needed = predicted_bytes(models) + sum(path.stat().st_size for path in origin.assets.values())
        room = self._feed.room + self._working_bytes(origin)
        check_space(place.out, place.needed + room, present=reclaimable_bytes(place.out))
        if self._feed.plan is not None:
            self._feed.plan(models)
        with place.staging(header) as staging:
            self._prepare(staging.folder.with_name(WORK), origin, refs or {})
            guard = Guard(staging.journal, files.confirm, self._feed.release)
            report = write_bundle(staging.folder, models, origin, stored, guard, self._progress)
            files.confirm()
        return report

    def _working_bytes(self, origin: Origin) -> int:
        wanted: Any = getattr(self._transform, "working_bytes", None)
        return 0 if wanted is None else int(wanted(origin.config))

    def _prepare(self, folder: Path, origin: Origin, refs: Mapping[str, WeightSource]) -> None:
        """Lets a transform work before the first weight is written; the folder is that of an interrupted export too."""
        prepare: Any = getattr(self._transform, "prepare", None)
        if prepare is not None:
            prepare(folder, origin.config, refs, self._progress)


def fingerprint(transform: Transform | None) -> str:
    """What a transform does, as a text; one that does not say what it does is like no other."""
    if transform is None:
        return "none"
    own = getattr(transform, "fingerprint", None)
    return own if isinstance(own, str) else f"unknown {uuid.uuid4().hex}"
