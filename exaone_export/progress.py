"""Progress bars on the terminal: what is done, how fast, and how long it will still take."""

from __future__ import annotations

import sys
import threading
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

    def __init__(self, stream: TextIO, display: _Display | None = None) -> None:
        self._display = _Display(stream) if display is None else display
        self._task: TaskID | None = None

    def start(self, label: str, total: float, unit: str) -> None:
        """Open a bar for the step `label` of size `total` (0: unknown) in `unit`."""
        self.finish()
        self._task = self._display.open(label, total, unit)

    def advance(self, amount: float) -> None:
        """Move the open bar on by `amount`."""
        if self._task is not None:
            self._display.advance(self._task, amount)

    def finish(self) -> None:
        """Close the open bar, if there is one."""
        if self._task is not None:
            self._display.close()
        self._task = None

    def beside(self) -> BarProgress:
        """A second row of steps, for what goes on at the same time in another thread."""
        return BarProgress(self._display.stream, self._display)


class _Display:
    """The block of bars on the terminal: it grows while any step is open, and stands still afterwards."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._bars: RichBar | None = None
        self._open = 0
        self._lock = threading.Lock()

    def open(self, label: str, total: float, unit: str) -> TaskID:
        with self._lock:
            if self._bars is None:
                self._bars = _new_bars(self.stream)
                self._bars.start()
            self._open += 1
            return self._bars.add_task(label, total=total or None, unit=unit)

    def advance(self, task: TaskID, amount: float) -> None:
        bars = self._bars
        if bars is not None:
            bars.advance(task, amount)

    def close(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None


def _new_bars(stream: TextIO) -> RichBar:
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

    class Amount(ProgressColumn):
        """What is done of how much: "1.2/3.4 GB", "3/4"."""

        sizes, counts = DownloadColumn(), MofNCompleteColumn()

        def render(self, task: Task) -> Text:
            return (self.sizes if task.fields["unit"] == "bytes" else self.counts).render(task)

    class Rate(ProgressColumn):
        """Sizes or counts per second: "12.3 MB/s", "12.3 layers/s"."""

        sizes = TransferSpeedColumn()

        def render(self, task: Task) -> Text:
            if task.fields["unit"] == "bytes":
                return self.sizes.render(task)
            speed = f"{task.speed:.1f} {task.fields['unit']}/s" if task.speed else ""
            return Text(speed, style="progress.data.speed")

    return RichBar(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        Amount(),
        Rate(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )
