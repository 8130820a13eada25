"""Watches the workers: which mutant runs, since when, and what becomes of the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.fuzz.status import Field, Status
from tests.fuzz.target import Outcome, random_of
from tests.fuzz.targets import target_of
from tests.fuzz.worker import Job, keep

ROOT = Path(__file__).parents[2]
PRINTED = "printed"  # file with what workers, or libraries in them, have written to a terminal: it should not be there
_LOOK_S = 0.05
_START_LIMIT_S = 120.0


@dataclass(frozen=True)
class Settings:
    """How to fuzz.

    Attributes:
        seed: of all mutants.
        plan: target and number of mutants.
        corpus, found: folders.
        workers: processes.
        limit_s: wall-clock seconds for one mutant; a worker is killed then.
        address_space: bytes, see `Job`.
        minutes: to go on for at most; 0 for no limit.
    """

    seed: int
    plan: Sequence[tuple[str, int]]
    corpus: Path
    found: Path
    workers: int = 2
    limit_s: float = 10.0
    address_space: int = 1 << 30
    minutes: float = 0.0


class _Worker:
    """One process at a time, and the counters of all that have been."""

    def __init__(self, settings: Settings, place: int, scratch: Path) -> None:
        self.settings, self.scratch = settings, scratch
        scratch.mkdir(parents=True)
        self.status = Status(scratch / "status", len(settings.plan))
        deadline = time.monotonic() + 60 * settings.minutes if settings.minutes else 0.0
        self.job = Job(
            settings.seed, list(settings.plan), place, settings.workers, str(settings.corpus), str(scratch),
            str(settings.found), settings.address_space, deadline,
        )  # fmt: skip
        self.noise = scratch / "noise"
        self._start()

    def _start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": "1", "EXAONE_FUZZ_CANARY": "canary-3141592653"}
        command = [sys.executable, "-m", "tests.fuzz.worker", json.dumps(asdict(self.job))]
        with self.noise.open("ab") as noise:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=noise, stderr=noise
            )
        self._begun = time.monotonic()

    def look(self) -> bool:
        """Whether it still has work; a mutant that takes too long, or has killed the worker, is counted."""
        rows = self.status.rows
        code = self.process.poll()
        row = next((row for row in range(len(rows)) if not rows[row, Field.DONE]), None)
        if row is None and code is not None:
            return False
        started = int(rows[row, Field.STARTED_NS]) if row is not None else 0
        if code is None:
            idle = not started and time.monotonic() - self._begun > _START_LIMIT_S and not rows[:, Field.MUTANTS].any()
            if idle or (started and time.monotonic_ns() - started > self.settings.limit_s * 1e9):
                self.process.kill()
                self.process.wait()
                self._failed(row or 0, Field.HANGS, f"more than {self.settings.limit_s:g} s")
        elif row is not None:
            said = self.noise.read_bytes()[-600:].decode("utf-8", "replace")
            if not started:
                raise RuntimeError(f"the worker ended with {code} outside of a mutant: {said}")
            self._failed(row, Field.CRASHES, f"the process ended with {code}: {said}")
        return True

    def _failed(self, row: int, field: Field, detail: str) -> None:
        """Counts the mutant that ran, writes it down, and goes on behind it."""
        mine = self.status.rows[row]
        index, name = int(mine[Field.NEXT]), self.settings.plan[row][0]
        data = mutant(self.settings.corpus, self.scratch, name, self.settings.seed, index)
        kind = "hang" if field == Field.HANGS else "crash"
        keep(self.settings.found, name, self.settings.seed, index, Outcome(kind, 0, detail), data)
        mine[field] += 1
        mine[Field.MUTANTS] += 1
        mine[Field.NEXT], mine[Field.STARTED_NS] = index + self.settings.workers, 0
        self._start()


def mutant(corpus: Path, scratch: Path, name: str, seed: int, index: int) -> bytes:
    """One input again."""
    target = target_of(name)(corpus, scratch)
    try:
        return target.mutant(random_of(seed, name, index))
    finally:
        target.close()


def fuzz(settings: Settings, scratch: Path) -> dict[str, npt.NDArray[np.int64]]:
    """Runs all mutants; returns each target's counters, added up over the workers (times and memory: the highest).

    Args:
        settings: what to do.
        scratch: an empty folder, best in memory.
    """
    workers: list[_Worker] = []
    try:
        workers += [_Worker(settings, place, scratch / f"worker{place}") for place in range(settings.workers)]
        while sum(worker.look() for worker in workers):
            time.sleep(_LOOK_S)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    printed = b"".join(worker.noise.read_bytes() for worker in workers)
    if printed:
        settings.found.mkdir(parents=True, exist_ok=True)
        (settings.found / PRINTED).write_bytes(printed)
    return {name: _joined([w.status.rows[row] for w in workers]) for row, (name, _) in enumerate(settings.plan)}


def _joined(rows: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    total: npt.NDArray[np.int64] = np.sum(rows, axis=0)
    slowest = max(rows, key=lambda row: int(row[Field.SLOWEST_NS]))
    for field in (Field.SLOWEST_NS, Field.SLOWEST_INDEX):
        total[field] = slowest[field]
    total[Field.RSS_KIB] = max(row[Field.RSS_KIB] for row in rows)
    return total
