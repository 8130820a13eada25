"""One export, killed here and there and given again, against the same export left alone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter import journal
from tests.faults import crash
from tests.faults.crash import Seen, beside, child, tree

KILLED = signal.SIGKILL


class Trial:
    """Kills and repeats an export.

    Args:
        folder: to work in.
        make: gives the export to an output folder, as `crash.export` does.

    Attributes:
        calm: what the export did when it was left alone.
        wanted: its bundle's files.
    """

    def __init__(self, folder: Path, make: Callable[[Path], Callable[[], Any]]) -> None:
        self.folder, self.make, self.notes = folder, make, folder / "notes.json"
        status, self.calm = child(make(folder / "calm"), self.notes)
        assert (status, self.calm.outcome) == (0, "done")
        self.wanted = tree(folder / "calm")
        self.tensors: dict[str, set[str]] = {}
        for part, tensor in self.calm.read:
            self.tensors.setdefault(part, set()).add(tensor)

    def kill(self, name: str, fault: crash.Fault | None = None, before: Callable[[], None] | None = None) -> set[str]:
        """Exports to folder `name` until the fault; returns the parts that its journal has."""
        out = self.folder / name

        def action() -> Any:
            if before is not None:
                before()
            return self.make(out)()

        status, _ = child(action, self.notes, fault)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == KILLED
        return finished_parts(out)

    def end(self, name: str, done: set[str]) -> Seen:
        """Gives the same command again; everything must be as if nothing had happened, and no part made twice."""
        out = self.folder / name
        if out.exists():  # it was killed behind its last step
            assert tree(out) == self.wanted
        status, seen = child(self.make(out), self.notes)
        assert "Traceback" not in seen.outcome, seen.outcome
        if "it exists already" not in seen.outcome:
            assert (status, seen.outcome) == (0, "done")
            assert seen.resumed == len(done)
        assert not done & set(seen.made), "a finished part was made again"
        needed = {tensor for part in self.calm.made if part not in done for tensor in self.tensors.get(part, ())}
        assert {tensor for _, tensor in seen.read} <= needed, "a finished part's weights were read again"
        assert tree(out) == self.wanted
        assert beside(out) == []
        return seen

    def strike(self, name: str, seconds: float) -> set[str]:
        """Exports to folder `name` and kills it after a time, whether it is done or not; returns as `kill`."""
        out = self.folder / name

        def strike() -> None:
            time.sleep(seconds)
            os.kill(os.getpid(), KILLED)

        def action() -> Any:
            threading.Thread(target=strike, daemon=True).start()
            self.make(out)()
            time.sleep(crash.LONGEST)

        child(action, self.notes)
        return finished_parts(out)


def finished_parts(out: Path) -> set[str]:
    """What the journals beside an output folder say is done."""
    parts: set[str] = set()
    for folder in out.parent.glob(f"{out.name}.partial-*"):
        found = journal._read(folder / journal.FILE)
        parts |= {entry.part for _, entry in found[1] if not entry.part.startswith("commit ")} if found else set()
    return parts
