"""A list of requests answered side by side, as many at a time as there is memory for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from model.memory import available_bytes
from runtime.generation import Generator
from runtime.graphs import Graphs
from runtime.options import GenerationOptions
from runtime.request import Request
from runtime.scheduler import Scheduler
from runtime.transcript import Result

if TYPE_CHECKING:
    from runtime.engine import Engine

MOST_ROWS: Final = 32  # more are hardly faster


def answer_all(
    engine: Engine, generator: Generator, requests: Sequence[Request], options: GenerationOptions
) -> list[Result]:
    """All results, in the order of the requests; a row that is done is taken by the next request.

    What a request draws depends on the seed and its place in the list alone.

    Raises:
        ExaoneError: of the first request in the list that fails; those that are not answered yet are given up.
    """
    graphs = engine.graphs
    if len(requests) == 1 or graphs.residence is not None:  # a scheduler has one row there
        return generator.run(requests, options)
    longest = max(request.expected for request in requests)
    rows = rows_that_fit(graphs, longest, min(MOST_ROWS, len(requests)))
    with Scheduler(engine, rows, pieces=None, shortest_first=True, generator=generator) as scheduler:
        tickets = scheduler.submit_requests(requests, options)
        return [ticket.result() for ticket in tickets]


def rows_that_fit(graphs: Graphs, tokens: int, most: int) -> int:
    """Rows of so many tokens that half the free memory holds, one at least and `most` at most."""
    cache, there = graphs.forward(1).cache, available_bytes()
    if there is None:
        return most
    each = cache.layout.size(cache.buffer).of(min(cache.limit, tokens))
    return max(1, min(most, there // 2 // max(1, each)))
