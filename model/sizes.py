"""Sizes in bytes as users write them."""

from __future__ import annotations

import re

from model.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]i?B|B)?", re.ASCII)
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{middle}B": base**power
    for power, prefix in enumerate("kMGT", 1)
    for middle, base in (("", 1000), ("i", 1024))
}


def parse_size(size: int | str, what: str, where: str) -> int:
    """Bytes, of a number of them or of text such as "18GB", "17.5 GiB".

    Args:
        size: to read.
        what, where: of the error: what could not be done, and the option.

    Raises:
        UsageError: it is no size, or none at all.
    """
    found = _SIZE.fullmatch(str(size).strip())
    value = 0 if found is None else int(float(found[1]) * _UNITS[found[2] or ""])
    if value < 1:
        raise UsageError(what, where, f"{str(size)[:40]!r} is no size", "Write for example 18GB or 17.5GiB")
    return value
