"""What is fuzzed: how a mutant is made, what reads it, and an opinion of our own about what was accepted."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from model.errors import ExaoneError

_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")
_LONGEST = 2000
_MOST_LINES = 3


class Target(ABC):
    """One kind of input.

    Args:
        corpus: what `tests.fuzz.corpus.make_corpus` wrote; only read.
        scratch: a folder of its own.

    Attributes:
        name: for the command line.
        codes: exit codes that a refusal may have.
        short, long: mutants in the short form and in the long one.
    """

    name: ClassVar[str]
    codes: ClassVar[frozenset[int]]
    short: ClassVar[int] = 200
    long: ClassVar[int]

    def __init__(self, corpus: Path, scratch: Path) -> None:
        self.corpus, self.scratch = corpus, scratch

    @abstractmethod
    def mutant(self, random: Random) -> bytes:
        """A damaged or hostile input; nothing but `random` decides which."""

    @abstractmethod
    def run(self, data: bytes) -> Any:
        """Reads an input as the toolkit does. Raises ExaoneError where it is refused."""

    def judge(self, data: bytes, accepted: Any) -> str:
        """Why `data` should not have been accepted, or not as `accepted`; "" where that is right."""
        return ""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Ends what the target has started."""


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant: `kind` is "accepted", "refused" with an exit code, "crash" or "wrong"."""

    kind: str
    code: int = 0
    detail: str = ""


def random_of(seed: int, target: str, index: int) -> Random:
    """All that a mutant is made of."""
    return Random(f"{seed} {target} {index}")


def tried(target: Target, data: bytes) -> Outcome:
    """Lets a target read an input, and judges what it makes of it."""
    try:
        accepted = target.run(data)
    except ExaoneError as reason:
        fault = unsound(reason, target.codes)
        return Outcome("crash", reason.exit_code, fault) if fault else Outcome("refused", reason.exit_code)
    except KeyboardInterrupt:
        raise
    except BaseException as reason:  # noqa: BLE001 - whatever it is, it is a find
        return Outcome("crash", 1, f"{type(reason).__name__}: {reason} at {_place(reason)}")
    wrong = target.judge(data, accepted)
    return Outcome("wrong", 0, wrong) if wrong else Outcome("accepted")


def unsound(reason: ExaoneError, codes: frozenset[int]) -> str:
    """What is wrong with a refusal itself: its exit code or its message; "" for nothing."""
    text = str(reason)
    if reason.exit_code not in codes:
        return f"exit code {reason.exit_code}: {text}"
    if not (reason.what and reason.where and reason.why.strip()):
        return f"a part is missing: {text!r}"
    if len(text) > _LONGEST or len(text.splitlines()) > _MOST_LINES:
        return f"{len(text)} characters, {len(text.splitlines())} lines: {text[:200]!r}"
    if _ADDRESS.search(reason.why) or "Traceback" in text:
        return f"it tells of the inside: {text[:300]!r}"
    return ""


def _place(reason: BaseException) -> str:
    trace, places = reason.__traceback__, list[str]()
    while trace is not None:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(places[-4:])
