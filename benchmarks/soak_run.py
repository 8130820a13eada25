"""The soak itself: blocks of requests through one engine, and what the process takes meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.soak_answers import (
    CUT,
    Given,
    Outcome,
    asked,
    difference,
    drafting,
    gathered,
    given,
    guarded,
    parts_at_a_tie,
    resent,
    sent,
    spoiling,
)
from benchmarks.soak_cases import Block, Case
from benchmarks.soak_pictures import Pictures
from model.progress import NullProgress
from runtime.conversation import Session
from runtime.engine import Engine
from runtime.feature_cache import FeatureCache
from runtime.generation import Generator
from runtime.scheduler import Scheduler

ROWS: Final = 4
CLIENTS: Final = 4
# Bytes of features that sessions keep: so few that a tenth has more than fit.
FEATURES: Final = 512 << 10
_PATIENCE: Final = 300.0
_LEAVING: Final = 10
Floats = npt.NDArray[np.float64]


@dataclass
class Measured:
    """What a soak measured.

    Attributes:
        tenth: int64 [requests], of each.
        wall, cpu: float64 [requests], seconds; of CPU those of the whole process, NaN for requests side by side.
        memory: bytes after each block, anonymous or swapped.
        files, threads: after each block.
        answered: requests when the block was over.
        block_cpu: seconds of each block.
        wrong: names of requests with wrong answers, and what was wrong.
        parted: names of those that parted from the right answer at a tie.
        kept_features, encoded: bytes in the feature cache at the end, and what went through the encoder for it.
    """

    tenth: npt.NDArray[np.int64]
    wall: Floats
    cpu: Floats
    memory: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    block_cpu: list[float] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    parted: list[str] = field(default_factory=list)
    kept_features: int = 0
    encoded: int = 0

    @classmethod
    def of(cls, requests: int) -> Measured:
        """Room for so many, so that measuring takes no more with time."""
        return cls(np.zeros(requests, np.int64), np.full(requests, np.nan), np.full(requests, np.nan))


class Soak:
    """One engine, asked in both ways.

    Args:
        engine: used by nobody else.
        right: answers by name.
        pictures: draws.
    """

    def __init__(self, engine: Engine, right: Mapping[str, Outcome], pictures: Pictures) -> None:
        self._engine, self._right, self._pictures = engine, right, pictures
        self._generator = Generator(engine.graphs, engine.requests, engine.eos_ids, NullProgress())
        self._generator.features_of = FeatureCache(engine.graphs, engine.requests.media, NullProgress(), FEATURES)
        self._long_lived = Session(engine, self._generator)

    def run(self, blocks: Iterable[Block], cases: Sequence[Case]) -> Measured:
        """Answers all; `cases` are those of the blocks, each once."""
        blocks = list(blocks)
        found = Measured.of(sum(len(block.engine) + len(block.scheduler) for block in blocks))
        done = 0
        with spoiling(self._engine, [case for case in cases if case.kind == "spoilt"]):
            for block in blocks:
                began = time.process_time()
                for case in block.engine:
                    self._one(found, done, block.tenth, case)
                    done += 1
                self._many(found, done, block)
                done += len(block.scheduler)
                found.block_cpu.append(time.process_time() - began)
                self._look(found, done)
        found.kept_features, found.encoded = self._generator.features_of.bytes, self._generator.features_of.encoded
        return found

    def _one(self, found: Measured, place: int, tenth: int, case: Case) -> None:
        images = given(case, self._pictures)
        wall, cpu = time.perf_counter(), time.process_time()
        outcome = guarded(lambda: self._by_engine(case, images))
        found.wall[place], found.cpu[place] = time.perf_counter() - wall, time.process_time() - cpu
        found.tenth[place] = tenth
        self._judge(found, case, outcome)

    def _by_engine(self, case: Case, images: Given) -> Outcome:
        engine, changes = self._engine, drafting(self._engine, case)
        if case.kind == "sent":
            return sent(Session(engine, self._generator), case, images, **changes)
        if case.kind in ("resent", "edited"):
            return resent(self._long_lived, case, images, **changes)
        if case.kind == "spoilt" and case.number % 4 == 0:  # in the session that goes on
            return resent(self._long_lived, case, images, **changes)
        settings: dict[str, Any] = {**case.settings, **changes}
        if case.kind == "list":
            outcome = Outcome()
            for result in engine.generate([turn.text for turn in case.turns], images[0], **settings):
                outcome.add(result)
            return outcome
        if case.kind in ("streamed", "cancelled"):
            chunks = engine.stream(case.turns[0].text, images[0][0], **settings)
            return gathered(chunks, CUT if case.kind == "cancelled" else None)
        return asked(engine, case, images, **changes)

    def _many(self, found: Measured, first: int, block: Block) -> None:
        """Requests side by side: several clients submit, wait, read along and cancel."""
        waiting: SimpleQueue[tuple[int, Case, Given]] = SimpleQueue()
        for place, case in enumerate(block.scheduler, first):
            waiting.put((place, case, given(case, self._pictures)))

        def client() -> None:
            while True:
                try:
                    place, case, images = waiting.get_nowait()
                except Empty:
                    return
                began = time.perf_counter()
                outcome = guarded(lambda: _by_scheduler(scheduler, case, images))  # noqa: B023 - called at once
                found.wall[place] = time.perf_counter() - began
                found.tenth[place] = block.tenth
                self._judge(found, case, outcome)

        with Scheduler(self._engine, ROWS) as scheduler:
            clients = [threading.Thread(target=client, name="client") for _ in range(CLIENTS)]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()

    def _judge(self, found: Measured, case: Case, outcome: Outcome) -> None:
        right = self._right[case.name]
        fault = difference(case, right, outcome)
        if fault and parts_at_a_tie(right, outcome):
            found.parted.append(case.name)
        elif fault:
            found.wrong.append((case.name, fault))

    @staticmethod
    def _look(found: Measured, done: int) -> None:
        memory, threads = _status()
        for _ in range(_LEAVING):  # of a thread that was waited for, something may be there for a moment
            time.sleep(0.002)
            threads = min(threads, _status()[1])
        found.memory.append(memory)
        found.threads.append(threads)
        found.files.append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
        found.answered.append(done)


def _by_scheduler(scheduler: Scheduler, case: Case, images: Given) -> Outcome:
    ticket = scheduler.submit(case.turns[0].text, images[0][0], **case.settings)
    found = Outcome()
    if case.kind == "cancelled":
        said = 0
        for chunk in ticket:
            said += len(chunk.token_ids)
            if said >= CUT:
                ticket.cancel()
    elif case.number % 4 < 2:
        return gathered(iter(ticket))
    found.add(ticket.result(_PATIENCE))
    return found


def _status() -> tuple[int, int]:
    """Bytes of anonymous memory, swapped or not, and threads of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.split()}
    return 1024 * (int(fields["RssAnon"]) + int(fields["VmSwap"])), int(fields["Threads"])
