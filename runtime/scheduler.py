"""Answers many requests with the rows of one cache: a row that is done is taken by the next request at once.

The rows that are answering stand first in the cache, so that a pass takes them and nothing else. The next request is
read into a row behind them, alone (a limit of the attention kernel), piece by piece between their steps, and then joins
them. Where a row ends, the last one takes its place. One thread runs the graphs; any thread may submit and cancel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from model.errors import ResourceError, UsageError
from model.progress import NullProgress
from runtime.closing import Closing
from runtime.freed import give_back_freed
from runtime.generation import Generator
from runtime.media import ImageInput
from runtime.options import GenerationOptions
from runtime.request import Messages, Request
from runtime.rows import RowPasses
from runtime.ticket import Row, Ticket, fault_of, is_numerical, without

if TYPE_CHECKING:
    from runtime.engine import Engine

ROWS: Final = 8
# Seconds without requests after which memory that malloc holds for more of them is given back.
_REST_S: Final = 1.0


class Scheduler(Closing):
    """Runs requests side by side, on a GPU one after the other, until `close`, or the end of a ``with`` block.

    Meanwhile nobody else may use the engine.

    Args:
        engine: with the bundle.
        rows: requests answered at a time.
        pieces: pieces of prompts read between two steps of the rows that are answering, 256 tokens each: few keep their
            text flowing, None reads all that there is room for first, which takes the least time in all.
        shortest_first: of those that wait, take the one with the shortest prompt, so that rows are of similar lengths
            and the cache is no larger than it must be; else the one that came first.
        most_waiting: requests that may wait; None sets no limit.
        generator: the engine's, where progress is to be told; else one of the scheduler's own.

    Raises:
        UsageError: a number is below 1.
    """

    def __init__(
        self,
        engine: Engine,
        rows: int = ROWS,
        *,
        pieces: int | None = 1,
        shortest_first: bool = False,
        most_waiting: int | None = None,
        generator: Generator | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("pieces", pieces), ("most_waiting", most_waiting)):
            if value is not None and value < 1:
                raise UsageError("bad option", name, f"{value} is below 1", "Give 1 or more")
        # Nothing moves a row on a device yet.
        self.rows = rows if engine.graphs.residence is None else 1
        self._engine = engine
        self._generator = generator or Generator(engine.graphs, engine.requests, engine.eos_ids, NullProgress())
        self._pieces = pieces
        self._shortest_first = shortest_first
        self._most_waiting = most_waiting
        self._preparing = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: list[Row] = []
        self._closing = False
        self._numbers = 0
        # What follows is the thread's own.
        self._answering: list[Row] = []
        self._reading: tuple[Row, int] | None = None
        self._forward: RowPasses | None = None
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, prompt: str | Messages, images: Sequence[ImageInput] = (), **settings: Any) -> Ticket:
        """Takes a request; arguments are those of `Engine.generate` for one prompt.

        Raises:
            UsageError: the prompt, an image or an option cannot be used, or prompt and answer exceed the context.
            BundleError: the bundle is damaged.
            ResourceError: too many requests wait, or an image does not fit into memory.
        """
        return self.submit_request(*self.prepare(prompt, images, **settings))

    def prepare(
        self, prompt: str | Messages, images: Sequence[ImageInput] = (), **settings: Any
    ) -> tuple[Request, GenerationOptions]:
        """What `submit_request` takes; arguments and errors as in `submit`."""
        with self._preparing:
            return self._engine.prepare(prompt, images, **settings)

    def submit_request(self, request: Request, options: GenerationOptions) -> Ticket:
        """Takes a request that is prepared already. Raises ResourceError where too many wait."""
        return self.submit_requests([request], options)[0]

    def submit_requests(self, requests: Sequence[Request], options: GenerationOptions) -> list[Ticket]:
        """Takes several, or none of them; each draws from a stream of its own. Raises as `submit_request`."""
        with self._preparing:
            begun = list(zip(requests, *self._generator.begin(requests, options), strict=True))
        with self._changed:
            if self._closing:
                raise UsageError("cannot take the request", "scheduler", "it is closed")
            if self._most_waiting is not None and len(self._waiting) + len(begun) > self._most_waiting:
                why = f"{len(self._waiting)} requests wait already"
                raise ResourceError("cannot take the request", "queue", why, "Try again later")
            rows = [Row(Ticket(self._numbers + i, self._wake), *one) for i, one in enumerate(begun)]
            self._numbers += len(rows)
            self._waiting += rows
            self._changed.notify()
        return [row.ticket for row in rows]

    @property
    def waiting(self) -> int:
        """Requests that no row has taken yet."""
        return len(self._waiting)

    @property
    def answering(self) -> int:
        """Requests that are being read or answered."""
        return len(self._answering) + (self._reading is not None)

    def close(self) -> None:
        """Cancels what is not done, and waits for the pass that runs."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _work(self) -> None:
        """The thread: until the end, take up requests, read a little, do a step."""
        while self._wait():
            try:
                self._leave_cancelled()
                left = self._pieces
                while left != 0 and self._read():
                    left = None if left is None else left - 1
                if self._answering:
                    self._step()
            except Exception as reason:  # noqa: BLE001 - the thread must outlive whatever happens to a request
                self._fail_all(reason)
        for row in [*self._answering, *([self._reading[0]] if self._reading else []), *self._waiting]:
            row.cancel(self._generator)
        self._answering, self._reading, self._forward = [], None, None
        give_back_freed()

    def _wait(self) -> bool:
        """Waits for something to do; False at the end."""
        with self._changed:
            if not (self._waiting or self._answering or self._reading):
                self._forward = None  # nobody needs its memory
            patience: float | None = _REST_S
            while not (self._closing or self._waiting or self._answering or self._reading):
                if not self._changed.wait(patience):
                    give_back_freed()
                    patience = None
            return not self._closing

    def _leave_cancelled(self) -> None:
        with self._changed:
            gone = [row for row in self._waiting if row.ticket.cancelled]
            self._waiting = [row for row in self._waiting if not row.ticket.cancelled]
        if self._reading is not None and self._reading[0].ticket.cancelled:
            gone.append(self._reading[0])
            self._reading = None
        for place in reversed(range(len(self._answering))):
            if self._answering[place].ticket.cancelled:
                gone.append(self._answering[place])
                self._leave(place)
        for row in gone:
            row.cancel(self._generator)

    def _read(self) -> bool:
        """Reads a piece of a prompt; False where there is none, or no row for it."""
        if self._reading is None and not self._take_up():
            return False
        if self._reading is None:
            return True  # that request has failed
        row, place = self._reading
        forward = self._passes()
        try:
            piece = row.ids[row.read : row.read + forward.chunk]
            forward.give(row.features)
            logits = forward.append(place, piece[None])
            row.read += len(piece)
            row.features = without(row.features, int(np.isin(piece, sorted(self._engine.graphs.media_ids)).sum()))
            if row.read < len(row.ids):
                return True
            finished = row.say(logits[0], self._generator, self._engine.eos_ids)
        except Exception as reason:  # noqa: BLE001 - whatever it is, it concerns this request alone
            self._reading = None
            self._fail(row, place, reason)
            return True
        finally:
            forward.give(None)
        self._reading = None
        if not finished:
            if place != len(self._answering):
                forward.cache.move(place, len(self._answering))
            self._answering.append(row)
        return True

    def _take_up(self) -> bool:
        """Begins with one of those that wait, if a row is free."""
        with self._changed:
            if not self._waiting or len(self._answering) >= self.rows:
                return False
            sizes = [len(row.ids) if self._shortest_first else 0 for row in self._waiting]
            row = self._waiting.pop(sizes.index(min(sizes)))
        place = len(self._answering)
        try:
            row.began = time.perf_counter()
            self._engine.graphs.open(images=bool(row.request.images))
            row.features = self._generator.features([row.request])
            if self._forward is None:
                self._forward = self._engine.graphs.forward(self.rows, None, row.request.expected)
            self._forward.cache.lengths[place] = 0
            row.started = time.perf_counter()
        except Exception as reason:  # noqa: BLE001 - whatever it is, it concerns this request alone
            row.ticket.end(fault_of(reason))
            return True
        self._reading = row, place
        return True

    def _passes(self) -> RowPasses:
        if self._forward is None:
            raise RuntimeError("nothing was taken up")
        return self._forward

    def _step(self) -> None:
        """One token for every row that is answering."""
        forward, rows = self._passes(), self._answering
        try:
            logits = forward.append(0, np.array([[row.said[row.count - 1]] for row in rows]))
        except ResourceError as reason:
            # It is the longest that there is no room for.
            place = max(range(len(rows)), key=lambda place: rows[place].length)
            row = rows[place]
            self._leave(place)
            row.ticket.end(fault_of(reason))
            return
        for place in reversed(range(len(rows))):
            row = rows[place]
            try:
                finished = row.say(logits[place], self._generator, self._engine.eos_ids)
            except Exception as reason:  # noqa: BLE001 - whatever it is, it concerns this request alone
                self._fail(row, place, reason)
                continue
            if finished:
                self._leave(place)

    def _leave(self, place: int) -> None:
        """A row that answers no longer is taken by the last one."""
        last = len(self._answering) - 1
        if place != last:
            self._passes().cache.move(last, place)
            self._answering[place] = self._answering[last]
        self._answering.pop()

    def _fail(self, row: Row, place: int, reason: Exception) -> None:
        """Ends one request with an error; where its numbers are spoilt, its row of the cache is made clean."""
        if is_numerical(reason) and self._engine.graphs.residence is not None:
            self._forward = None  # of one row
        elif is_numerical(reason):
            self._passes().cache.wipe(place)
        if place < len(self._answering) and self._answering[place] is row:
            self._leave(place)
        row.ticket.end(fault_of(reason))

    def _fail_all(self, reason: Exception) -> None:
        """A pass of all rows failed: nobody can tell whose fault it is. Requests that wait are not concerned."""
        rows = [*self._answering, *([self._reading[0]] if self._reading else [])]
        self._answering, self._reading, self._forward = [], None, None
        for row in rows:
            row.ticket.end(fault_of(reason))
