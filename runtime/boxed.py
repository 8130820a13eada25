r"""The final answer that a model puts into ``\boxed{}``, as EXAONE's model card asks of it."""

from __future__ import annotations

import re
from typing import Final

_MARK: Final = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` of `text`, without white space at its ends; None if there is none.

    Braces nest, ``\{`` and ``\}`` are characters, and a box that is never closed, as in an answer cut off, is none. Of
    boxes within each other the outermost that is closed counts.
    """
    opened: list[int | None] = []  # for each open brace, where its box begins; None: no box
    found: tuple[int, int] | None = None
    for mark in _MARK.finditer(text):
        sign = mark.group()
        if sign == "}":
            start = opened.pop() if opened else None
            if start is not None:
                found = start, mark.start()
        elif sign.endswith("{") and sign != "\\{":
            opened.append(None if sign == "{" else mark.end())
    return None if found is None else text[found[0] : found[1]].strip()
