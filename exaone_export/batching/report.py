"""What a batch did: the output's lines, and the figures over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exaone_export.batching.journal import Journal
from exaone_export.failures import parts
from model import errors
from model.errors import ExaoneError
from runtime.transcript import Result

_LEFT_OUT: Final = ("timings", "ep")  # differ from run to run


@dataclass
class BatchReport:
    """What was done.

    Attributes:
        requests: lines that are not blank.
        answered, failed: how many of them have an answer, and an error, in the output.
        resumed: how many of both an earlier run had done.
        prompt_tokens, new_tokens: of all answers.
        seconds, new_tokens_per_s: of this run, loading not counted.
        batch_size, ep: of this run; None where nothing was left to answer.
        first_error: of the first line that failed.
    """

    requests: int
    answered: int = 0
    failed: int = 0
    resumed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    new_tokens_per_s: float = 0.0
    batch_size: int | None = None
    ep: str | None = None
    first_error: dict[str, Any] | None = None


def answered_line(number: int, identity: str | int, result: Result) -> dict[str, Any]:
    """The output's line of an answer."""
    found = {name: value for name, value in result.to_dict().items() if name not in _LEFT_OUT}
    return {"id": identity, "line": number, **found, "new_tokens": len(result.token_ids), "error": None}


def failed_line(number: int, identity: str | int, error: ExaoneError) -> dict[str, Any]:
    """The output's line of a request that has no answer."""
    return {"id": identity, "line": number, "error": parts(error)}


def first_fault(report: BatchReport, out: Path) -> ExaoneError | None:
    """What the command ends with: an error of the first failed line's kind; None where all are answered."""
    first = report.first_error
    if first is None:
        return None
    kind = getattr(errors, str(first["kind"]), ExaoneError)
    why = f"{report.failed} of {report.requests}, the first: {first['what']}: {first['where']}: {first['why']}"
    failure: ExaoneError = kind("some requests have no answer", out.name, why, 'See its lines with an "error"')
    return failure


def count(journal: Journal, report: BatchReport) -> None:
    """Adds up all answers and errors."""
    for record in journal.records():
        error = record["error"]
        report.answered += error is None
        report.failed += error is not None
        report.first_error = report.first_error or error
        report.prompt_tokens += record.get("prompt_tokens", 0)
        report.new_tokens += record.get("new_tokens", 0)
