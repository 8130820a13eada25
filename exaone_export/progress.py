"""Progress bars on the terminal: what is done, how fast, and how long it will still take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from model.progress import NullProgress, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID


def choose_progress(*, wanted: bool, stream: TextIO | None = None) -> Progress:
    """A bar on `stream` (stderr unless given) if it is wanted and the stream is a terminal, else silence."""
    stream = sys.stderr if stream is None else stream
    return BarProgress(stream) if wanted and stream.isatty() else NullProgress()


class BarProgress:
    """Draws one bar per step on `stream` with rich; a finished step leaves its line behind.

    Sizes in bytes are shown in decimal units with the rate per second, everything else as counts.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: RichBar | None = None
        self._task: TaskID | None = None

    def start(self, label: str, total: float, unit: str) -> None:
        """Open a bar for the step `label` of size `total` (0: unknown) in `unit`."""
        self.finish()
        self._bar = _new_bar(self._stream, unit)
        self._bar.start()
        self._task = self._bar.add_task(label, total=total or None)

    def advance(self, amount: float) -> None:
        """Move the open bar on by `amount`."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)

    def finish(self) -> None:
        """Close the open bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


def _new_bar(stream: TextIO, unit: str) -> RichBar:
    # rich takes a tenth of a second to import: only where a bar is drawn.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichBar
    from rich.text import Text

    class CountRate(ProgressColumn):
        """Counts per second, "12.3 layers/s"."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {unit}/s" if task.speed else "", style="progress.data.speed")

    sizes = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn(), CountRate()]
    return RichBar(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        *sizes,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )
