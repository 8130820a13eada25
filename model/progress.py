"""How a room tells the outside how far a long step has come.

A room never prints. It accepts a `Progress` and calls it; the command line passes one that draws a bar, everybody
else passes nothing and gets `NullProgress`.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the advance of one step at a time."""

    def start(self, label: str, total: float, unit: str) -> None:
        """Begin a step; a step still open ends here.

        Args:
            label: what is being done, in a few words ("writing decoder").
            total: the size of the step in `unit`; 0 where it is not known.
            unit: "bytes", or a plural noun ("layers", "tensors", "tokens").
        """

    def advance(self, amount: float) -> None:
        """Add `amount` (in the unit of the open step) to what is done."""

    def finish(self) -> None:
        """End the open step; without one, do nothing."""


class NullProgress:
    """A `Progress` that shows nothing."""

    def start(self, label: str, total: float, unit: str) -> None:
        """Ignore the step."""

    def advance(self, amount: float) -> None:
        """Ignore the amount."""

    def finish(self) -> None:
        """Do nothing."""


def beside(progress: Progress) -> Progress:
    """A progress for what goes on at the same time as the steps of `progress`; silence if that shows one thing only."""
    second = getattr(progress, "beside", None)
    found: Progress = second() if callable(second) else NullProgress()
    return found
