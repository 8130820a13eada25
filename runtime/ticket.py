"""One request among those that a `runtime.scheduler.Scheduler` has taken: its answer as it comes, and its end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

import numpy as np

from model.errors import ExaoneError, NumericalError, ResourceError
from runtime.choosing import Chooser
from runtime.decode import FinishReason
from runtime.device_features import Features
from runtime.generation import Generator
from runtime.logprobs import TokenLogprob
from runtime.reasoning import Piece
from runtime.request import Request
from runtime.rows import Ids, Logits
from runtime.sampling import likeliest
from runtime.session import Array
from runtime.transcript import Chunk, Event, Result, Transcript, chunks

_log = logging.getLogger("exaone_export.runtime")


class Ticket:
    """What `Scheduler.submit` gives for a request. Any thread may use it.

    Args:
        number: in the order of submission.
        wake: called when the caller wants the request to end.
    """

    def __init__(self, number: int, wake: Callable[[], None]) -> None:
        self.number = number
        self._wake = wake
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._ended = threading.Event()
        self._result: Result | None = None
        self._error: Exception | None = None
        self._callback: Callable[[Ticket], None] | None = None
        self._held: Sequence[Piece] = ()
        self._lock = threading.Lock()
        self.cancelled = False

    @property
    def done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Asks for the end of the request; what was said so far is its result. Does nothing to one that has ended."""
        self.cancelled = True
        self._wake()

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the whole answer.

        Args:
            timeout: seconds to wait; None waits as long as it takes.

        Raises:
            TimeoutError: it takes longer.
            ExaoneError: the request failed; others are not concerned.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"no result within {timeout} s")
        if self._error is not None:
            # Its trace would hold whoever asked, and with them this ticket.
            raise fault_of(self._error)
        if self._result is None:
            raise RuntimeError("the request ended with nothing")
        return self._result

    def __iter__(self) -> Iterator[Chunk]:
        """The answer piece by piece, as `Engine.stream` gives it; one thread may ask for it, once.

        Raises as `result`.
        """
        finished, given = False, 0
        for chunk in chunks(iter(self._events.get, None)):
            finished = chunk.finished
            given += len(chunk.token_ids)
            yield chunk
        result = self.result()
        if finished:
            return
        # It was cancelled: what came last stands in no chunk yet.
        left = Chunk("", "text", tuple(result.token_ids[given:]), None, _rest(result, given))
        for kind, text in self._held:
            yield replace(left, text=text, kind="reasoning" if kind == "reasoning" else "text")
            left = Chunk("", "text", (), None, _rest(result, len(result.token_ids)))
        yield replace(left, result=result)

    def when_done(self, callback: Callable[[Ticket], None]) -> None:
        """Calls `callback` with this ticket when it ends, in the scheduler's thread, or now if it has ended.

        In the scheduler's thread, what it raises is logged.
        """
        with self._lock:
            if not self._ended.is_set():
                self._callback = callback
                return
        callback(self)

    def put(self, event: Event) -> None:
        """A new token; for the scheduler."""
        self._events.put(event)

    def end(self, outcome: Result | Exception, held: Sequence[Piece] = ()) -> None:
        """The end; for the scheduler. `held` are pieces of text that no event had."""
        with self._lock:
            if self._ended.is_set():
                return
            if isinstance(outcome, Exception):
                self._error = outcome
            else:
                self._result, self._held = outcome, held
            self._ended.set()
            callback = self._callback
        self._events.put(None)
        if callback is None:
            return
        try:
            callback(self)
        except Exception:  # noqa: BLE001 - it is one request's; the thread that calls it answers the others too
            _log.exception("what was to be called at the end of request %d fails", self.number)


@dataclass
class Row:
    """A request while it is answered.

    Attributes:
        ticket, request, chooser, transcript: of the request.
        ids: its prompt, int64.
        features: of its images, those not read yet; None without images.
        read: tokens of the prompt that are in the cache.
        said: what was generated, int64; the first `count` are valid.
        began, started, first: seconds on the clock when it was taken up, its images were read, its first token came.
    """

    ticket: Ticket
    request: Request
    chooser: Chooser
    transcript: Transcript
    ids: Ids = field(init=False)
    features: Array | Features | None = None
    read: int = 0
    count: int = 0
    began: float = 0.0
    started: float = 0.0
    first: float = 0.0
    said: Ids = field(init=False)

    def __post_init__(self) -> None:
        self.ids = np.array(self.request.token_ids, np.int64)
        self.said = np.empty(self.request.limit, np.int64)

    @property
    def length(self) -> int:
        """Tokens that the cache holds when the last one chosen is in it."""
        return len(self.ids) + self.count

    def say(self, logits: Logits, generator: Generator, eos_ids: Collection[int]) -> bool:
        """Chooses the next token by logits [vocab] and tells it; whether the request is answered with it.

        Raises:
            NumericalError: the logits are NaN or infinite.
        """
        likeliest(logits)
        token = self.chooser(logits, self.ids, self.said[: self.count])
        self.said[self.count] = token
        self.count += 1
        self.first = self.first or time.perf_counter()
        pieces = self.transcript.feed(token)
        finish: FinishReason | None = "length" if self.count == self.request.limit else None
        if self.transcript.stopped or self.chooser.complete or token in eos_ids:
            finish = "stop"
        result = None
        if finish is not None:
            pieces += self.transcript.finish()
            result = self._result(generator, finish)
        self.ticket.put(Event(0, token, pieces, result, self.chooser.last_told))
        if result is not None:
            self.ticket.end(result)
        return result is not None

    def cancel(self, generator: Generator) -> None:
        """Ends a request that is wanted no longer; what was said so far is its result."""
        held = self.transcript.finish()
        self.ticket.end(replace(self._result(generator, "length"), finish_reason="cancelled", warnings=[]), held)

    def _result(self, generator: Generator, finish: FinishReason) -> Result:
        answering = time.perf_counter() - self.first if self.first else 0.0
        times = (self.started - self.began, max(0.0, self.first - self.started), answering)
        return generator.result(self.transcript, self.chooser, self.request, finish, times)


def _rest(result: Result, given: int) -> tuple[TokenLogprob, ...] | None:
    return None if result.logprobs is None else tuple(result.logprobs[given:])


def without(features: Array | Features | None, count: int) -> Array | Features | None:
    """Features when so many of them were used; those on a device know it themselves."""
    return features[count:] if isinstance(features, np.ndarray) else features


def fault_of(reason: Exception) -> Exception:
    """What a request is told of a failure: one of our errors where it is one, or memory's end."""
    if isinstance(reason, MemoryError):
        return ResourceError("out of memory", "this process", "the system gave no more", "Use a smaller batch")
    if isinstance(reason, ExaoneError):
        # The same error may end several requests, each raised with a trace of its own.
        return type(reason)(reason.what, reason.where, reason.why, reason.remedy)
    return reason


def is_numerical(reason: Exception) -> bool:
    """Whether a row's numbers are spoilt, and must not stay in the cache."""
    return isinstance(reason, NumericalError)
