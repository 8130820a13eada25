"""What a command prints: one JSON object for programs, or short lines for people."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, TextIO

# What moves a terminal's cursor, changes its colours or asks it to answer, and what turns text round; but not newline
# and tab.
_COMMANDING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Watched:
    """A stream that knows whether anything was written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.written = False

    def write(self, text: str) -> int:
        """Writes, and remembers it."""
        self.written = True
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def harmless(text: str) -> str:
    """A model's text as it may go to a terminal: control characters as escapes, joiners of emoji and letters kept."""
    return _COMMANDING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def print_json(report: object, stream: TextIO) -> None:
    """Print `report` (a dataclass or a mapping) as one JSON object on one line of `stream`.

    Paths become text; NaN and infinities, which JSON does not have, become null.
    """
    ascii_only = not (stream.encoding or "").lower().replace("-", "").startswith("utf8")
    print(json.dumps(to_plain(report), ensure_ascii=ascii_only, allow_nan=False), file=stream)


def to_plain(value: object) -> object:
    """`value` made of JSON's own types: dataclasses to objects, sequences to lists, paths to text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = getattr(value, "item", None)  # a numpy or torch scalar
    value = number() if callable(number) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int) else str(value)


def human_bytes(size: float) -> str:
    """`size` in decimal units with three significant digits: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
