"""The process that runs mutants; `tests.fuzz.parent` starts it, watches it, and starts another where it dies."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.status import Field, Status
from tests.fuzz.target import Outcome, Target, random_of, tried
from tests.fuzz.targets import target_of

_EVERY = 64  # mutants between two looks at the clock of the processor


@dataclass(frozen=True)
class Job:
    """What a worker is told, as JSON in its only argument.

    Attributes:
        seed: of all mutants.
        plan: target and number of mutants, in order.
        first, step: a worker's own are those of `first`, `first + step`, ... that are below the number.
        corpus, scratch, found: folders: of the corpus, the worker's own, and where failing inputs go.
        address_space: bytes that the worker may use beyond what it has when a target is ready.
        deadline: on the clock `time.monotonic`; 0 for none.
    """

    seed: int
    plan: list[tuple[str, int]]
    first: int
    step: int
    corpus: str
    scratch: str
    found: str
    address_space: int
    deadline: float


def main(text: str) -> None:
    """Runs a job from where the status says; leaves what it counts there."""
    job = Job(**json.loads(text))
    warnings.simplefilter("ignore")
    logging.getLogger("exaone_export").addHandler(logging.NullHandler())
    logging.getLogger("exaone_export").propagate = False
    scratch = Path(job.scratch)
    status = Status(scratch / "status", len(job.plan))
    for row, (name, count) in enumerate(job.plan):
        if not status.rows[row, Field.DONE]:
            _run_target(job, status, row, target_of(name)(Path(job.corpus), scratch), count)


def _run_target(job: Job, status: Status, row: int, target: Target, count: int) -> None:
    mine = status.rows[row]
    index = max(job.first, int(mine[Field.NEXT]))
    before = _limit_memory(job.address_space)
    cpu = _cpu_us()
    while index < count and not (job.deadline and time.monotonic() > job.deadline):
        mine[Field.NEXT] = index
        data = target.mutant(random_of(job.seed, target.name, index))
        start = time.monotonic_ns()
        mine[Field.STARTED_NS] = start
        outcome = tried(target, data)
        taken = time.monotonic_ns() - start
        mine[Field.STARTED_NS] = 0
        _count(job, status, row, index, outcome, data)
        if taken > mine[Field.SLOWEST_NS]:
            mine[Field.SLOWEST_NS], mine[Field.SLOWEST_INDEX] = taken, index
        index += job.step
        mine[Field.NEXT] = index
        if mine[Field.MUTANTS] % _EVERY == 0:
            mine[Field.CPU_US] += (now := _cpu_us()) - cpu
            cpu = now
    target.close()
    mine[Field.CPU_US] += _cpu_us() - cpu
    mine[Field.RSS_KIB] = max(int(mine[Field.RSS_KIB]), _kib("VmHWM") - before)
    mine[Field.DONE] = 1


def _count(job: Job, status: Status, row: int, index: int, outcome: Outcome, data: bytes) -> None:
    mine = status.rows[row]
    mine[Field.MUTANTS] += 1
    if outcome.kind == "refused":
        status.refused(row, outcome.code)
    elif outcome.kind == "accepted":
        mine[Field.ACCEPTED] += 1
    else:
        mine[Field.WRONG if outcome.kind == "wrong" else Field.CRASHES] += 1
        keep(Path(job.found), job.plan[row][0], job.seed, index, outcome, data)


def keep(folder: Path, target: str, seed: int, index: int, outcome: Outcome, data: bytes) -> None:
    """Writes a failing input, and what came of it beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target}-{seed}-{index}"
    path.with_suffix(".bin").write_bytes(data)
    told: dict[str, Any] = {"target": target, "seed": seed, "index": index, "kind": outcome.kind}
    path.with_suffix(".json").write_text(json.dumps(told | {"detail": outcome.detail[:2000]}, indent=1))


def _limit_memory(allowance: int) -> int:
    """Limits the address space to what there is and `allowance`; returns KiB of memory that are in use now."""
    limit = _kib("VmSize") * 1024 + allowance
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is forgotten
    except OSError:  # a kernel that cannot: it stays what counts
        return _kib("VmHWM")
    return _kib("VmRSS")


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _cpu_us() -> int:
    times = os.times()
    return round(1e6 * (times.user + times.system + times.children_user + times.children_system))


if __name__ == "__main__":
    main(sys.argv[1])
