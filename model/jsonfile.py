"""Strict reading of JSON objects from files that may be damaged or hostile."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from model.errors import CheckpointError, ExaoneError, printable

MAX_BYTES = 64 << 20  # of a file that comes with a model, such as its tokenizer
# Of an object that is parsed here: real ones have under a megabyte, and 4 MiB of `[],` take 100 MB of memory.
LARGEST_OBJECT = 4 << 20


def read_json_object(
    path: Path, error: type[ExaoneError] = CheckpointError, what: str = "cannot read"
) -> dict[str, Any]:
    """Reads one JSON object.

    Args:
        path: an ordinary file (a symbolic link to one is followed).
        error: the class to raise.
        what: first part of the message.

    Raises:
        error: the file is missing, not an ordinary file, larger than 4 MiB, not UTF-8, not JSON,
            nested too deeply, not an object, or repeats a key.
    """

    def fail(why: str, remedy: str = "") -> ExaoneError:
        return error(what, path.name, why, remedy)

    try:
        status = path.stat()
    except FileNotFoundError:
        raise fail("the file does not exist", f"Check that {path.parent.name!r} is the right folder") from None
    except OSError as reason:
        raise fail(reason.strerror or str(reason)) from None
    # A FIFO or a device would block or never end.
    if not stat.S_ISREG(status.st_mode):
        raise fail("it is not an ordinary file")
    if status.st_size > LARGEST_OBJECT:
        raise fail(f"{status.st_size} bytes, more than the {LARGEST_OBJECT} allowed")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as reason:
        raise fail(f"not UTF-8 at byte {reason.start}") from None
    except OSError as reason:
        raise fail(reason.strerror or str(reason)) from None
    if not text.strip():
        raise fail("the file is empty")
    return parse_json_object(text, path.name, error, what)


def parse_json_object(text: str, name: str, error: type[ExaoneError], what: str) -> dict[str, Any]:
    """Parses `text` as one JSON object; `name` is what messages call it. Raises `error`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise error(what, name, f"the key {printable(twice, 80)!r} appears twice")
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as reason:
        raise error(what, name, f"not JSON (line {reason.lineno}: {reason.msg})") from None
    except RecursionError:
        raise error(what, name, "nested too deeply") from None
    except ValueError as reason:  # an integer of thousands of digits
        raise error(what, name, f"not usable JSON ({reason})") from None
    if not isinstance(value, dict):
        raise error(what, name, f"a JSON object is needed, this is a {type(value).__name__}")
    return value
