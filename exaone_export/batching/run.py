"""A file of requests answered: what is left of it goes through a scheduler, and every answer to the disk at once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from exaone_export import failures
from exaone_export.batching.journal import Journal, journal_path
from exaone_export.batching.lines import Survey, ask_of, id_of, lines, merged, parse, survey
from exaone_export.batching.report import BatchReport, answered_line, count, failed_line
from exporter.lock import output_lock
from model.bundle import MANIFEST
from model.errors import BundleError, EnvironmentFault, ExaoneError, LockedError, UsageError
from model.progress import NullProgress, Progress
from runtime.engine import Engine
from runtime.execution import Execution
from runtime.many import rows_that_fit
from runtime.media import Medium
from runtime.request import Request
from runtime.scheduler import ROWS, Scheduler
from runtime.ticket import Ticket
from runtime.video import Clip

# Requests prepared at a time, for each row, and what their images may take: short prompts are taken first of those.
_AHEAD: Final = 8
_IMAGES_AHEAD: Final = 256 << 20
# Tokens of a row that there must be room for where the number of rows is not given.
_USUAL_ROW: Final = 4096
# What ends the whole run: it is about the bundle or the machine, not about a request.
_FATAL: Final = (BundleError, EnvironmentFault, LockedError)


@dataclass(frozen=True)
class Settings:
    """What a command says of all requests.

    Attributes:
        options: by name, for lines that do not say otherwise.
        preset, system, tools: the same, of these.
        rows: requests side by side; None takes 8, or as many as there is memory for.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    system: str | None = None
    tools: list[Any] | None = None
    rows: int | None = None

    def words(self) -> dict[str, str]:
        """What an answer depends on, by name."""
        own = {"options": self.options, "preset": self.preset, "system text": self.system, "tools": self.tools}
        return {name: json.dumps(value, sort_keys=True, default=list) for name, value in own.items()}


@dataclass(frozen=True)
class Place:
    """Where the graphs run, as `Engine.load` takes it."""

    ep: str = "auto"
    threads: int | None = None
    execution: Execution | None = None


def run_batch(
    bundle: Path,
    source: Path,
    out: Path,
    settings: Settings,
    place: Place,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> BatchReport:
    """Answers every line of `source`; `out` has a line for each, in order. An interrupted run is gone on with.

    Args:
        bundle: folder of a bundle.
        source: JSON lines, see `exaone_export.batching.lines`.
        out: the file to make.
        settings: of all requests.
        place: where the graphs run.
        force: replace a file that is there, and begin anew what was begun otherwise.
        progress: told how far it is.

    Raises:
        UsageError: a path or an option cannot be used, or an interrupted run was begun with something else.
        BundleError, EnvironmentFault: the bundle cannot be run.
        ResourceError: disk or memory is exhausted.
        LockedError: another process writes to `out`.
    """
    _check_place(source, out)
    seen = survey(source)
    header = {"input": seen.sha256, "bundle": _manifest_hash(bundle), **settings.words()}
    with output_lock(out), ExitStack() as stack:
        begun = journal_path(out).exists()
        if out.exists() and not (force or begun):
            raise UsageError("cannot write output", out.name, "it exists", "Give another name, or --force")
        journal = Journal(out, header, force=force)
        stack.callback(journal.close)
        if out.exists() and not force and len(journal.done) < seen.requests:
            raise UsageError("cannot write output", out.name, "it exists", "Give another name, or --force")
        report = BatchReport(seen.requests, resumed=len(journal.done))
        if report.resumed < seen.requests:
            run = _Run(source, journal, settings, progress or NullProgress())
            run.answer(bundle, place, seen, report)
        count(journal, report)
        journal.finish()
    return report


class _Run:
    """The requests that are left, on their way."""

    def __init__(self, source: Path, journal: Journal, settings: Settings, progress: Progress) -> None:
        self._source, self._journal, self._settings, self._progress = source, journal, settings, progress
        self._ended: SimpleQueue[Ticket] = SimpleQueue()
        self._open: dict[int, tuple[int, str | int, int]] = {}  # ticket → line, id, bytes of images
        self._new_tokens = 0

    def answer(self, bundle: Path, place: Place, seen: Survey, report: BatchReport) -> None:
        """Answers them; the figures of this run go into `report`."""
        with Engine.load(bundle, place.ep, place.threads, self._progress, place.execution) as engine:
            engine.choose_options("", **self._settings.options, preset=self._settings.preset)
            engine.graphs.open(images=False)
            rows = min(choose_rows(engine, self._settings.rows), max(1, seen.requests - report.resumed))
            began = time.perf_counter()
            self._progress.start("answering", seen.requests, "requests")
            self._progress.advance(report.resumed)
            with Scheduler(engine, rows, pieces=None, shortest_first=True) as scheduler:
                report.batch_size, report.ep = scheduler.rows, engine.ep
                for number, identity, prepared in self._prepared(scheduler):
                    if isinstance(prepared, ExaoneError):
                        self._keep([failed_line(number, identity, prepared)])
                        continue
                    request, options = prepared
                    size = sum(map(_bytes, request.images))
                    ticket = scheduler.submit_request(request, options)
                    self._open[ticket.number] = number, identity, size
                    ticket.when_done(self._ended.put)
                    while len(self._open) >= _AHEAD * rows or self._images() > _IMAGES_AHEAD:
                        self._collect()
                while self._open:
                    self._collect()
            self._progress.finish()
            report.seconds = time.perf_counter() - began
            report.new_tokens_per_s = self._new_tokens / report.seconds

    def _images(self) -> int:
        return sum(size for *_, size in self._open.values()) if len(self._open) > 1 else 0

    def _prepared(self, scheduler: Scheduler) -> Iterator[tuple[int, str | int, Any]]:
        """Number, id, and prepared request or error of each line that is not answered yet."""
        ids: dict[str | int, int] = {}
        for number, line in lines(self._source):
            identity: str | int = number
            prepared: Any = None
            try:
                raw = parse(line, number)
                identity = id_of(raw, number)
                named = raw.get("id") is not None or raw.get("custom_id") is not None
                first = ids.setdefault(identity, number) if named else number
                if number in self._journal.done:
                    continue
                if first != number:
                    raise UsageError("cannot use line", f"line {number}", f"its id is that of line {first}")
                prepared = self._prepare(scheduler, raw, number)
            except Exception as reason:  # whatever a line holds, the others are answered
                if isinstance(reason, _FATAL):
                    raise
                prepared = failures.explain(reason)
            if number not in self._journal.done:
                yield number, identity, prepared

    def _prepare(self, scheduler: Scheduler, raw: Mapping[str, Any], number: int) -> tuple[Request, Any]:
        settings = self._settings
        ask = ask_of(raw, number, self._source.parent, settings.system)
        return scheduler.prepare(
            ask.messages,
            ask.images,
            videos=ask.videos,
            tools=ask.tools or settings.tools,
            preset=ask.preset or settings.preset,
            **merged(settings.options, ask.options),
        )

    def _collect(self) -> None:
        """Waits for answers, and makes all that are there durable together."""
        tickets = [self._ended.get()]
        while not self._ended.empty():
            tickets.append(self._ended.get())
        records = []
        for ticket in tickets:
            number, identity, _ = self._open.pop(ticket.number)
            try:
                result = ticket.result()
                self._new_tokens += len(result.token_ids)
                records.append(answered_line(number, identity, result))
            except Exception as reason:
                if isinstance(reason, _FATAL):
                    raise
                records.append(failed_line(number, identity, failures.explain(reason)))
        self._keep(records)

    def _keep(self, records: list[dict[str, Any]]) -> None:
        self._journal.add(records)
        self._progress.advance(len(records))


def choose_rows(engine: Engine, asked: int | None) -> int:
    """Requests side by side: as asked, or as many as half the free memory holds, 8 at most."""
    return rows_that_fit(engine.graphs, _USUAL_ROW, ROWS) if asked is None else asked


def _bytes(medium: Medium) -> int:
    return medium.frames.nbytes if isinstance(medium, Clip) else 3 * medium.width * medium.height


def _check_place(source: Path, out: Path) -> None:
    if out.is_dir() or not out.parent.is_dir():
        why = "it is a folder" if out.is_dir() else "its folder does not exist"
        raise UsageError("cannot write output", str(out), why, "Name a file to make")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise UsageError("cannot write output", str(out), "it is not an ordinary file", "Name a file to make")
    if os.path.lexists(journal_path(out)) and (journal_path(out).is_symlink() or not journal_path(out).is_file()):
        raise UsageError("cannot write output", journal_path(out).name, "it is not an ordinary file", "Remove it")
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError("cannot write output", str(out), "it is the input", "Name another file")


def _manifest_hash(bundle: Path) -> str:
    try:
        return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""  # loading says what is wrong
