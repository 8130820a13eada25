"""Work on many pieces side by side, results in order: what comes out does not depend on the number of threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from model.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_THREADS = 256
# Beyond this many the disk is the limit, and every thread more costs memory.
_DEFAULT_MOST = 16


def thread_count(threads: int | None) -> int:
    """The number of threads to use; None is one for each core that this process may use, 16 at most.

    Raises:
        UsageError: the number is not between 1 and 256.
    """
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return min(cores or 1, _DEFAULT_MOST)
    if not 1 <= threads <= MOST_THREADS:
        raise UsageError("cannot export", "--threads", f"{threads} is not between 1 and {MOST_THREADS}")
    return threads


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yields `function(item)` for each item, in their order.

    While one result is used, `threads` others are being computed or wait; no item is taken earlier than that. The
    first failure, in the order of the items, is raised where its result would have been. NumPy, reading and hashing
    leave the interpreter to others while they work, so threads do help.
    """
    if threads == 1:
        yield from map(function, items)
        return
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
