"""What the licence file that came with a checkpoint says of itself: as much as a model card repeats as fact."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(licen[cs]e|notice)([._-].*)?", re.IGNORECASE)
_LONGEST = 1 << 20  # bytes read of a licence
_EXAONE = re.compile(r"EXAONE AI Model License Agreement(?: \d[\d.]*)?(?: ?[-–] ?NC)?", re.IGNORECASE)
_COMMERCIAL = re.compile(r"prohibited from using the model\b[^.]{0,80}\bfor any commercial purposes", re.IGNORECASE)
# What the hub calls a licence → what its text holds.
_KNOWN = {
    "apache-2.0": ("Apache License", "Version 2.0"),
    "mit": ("MIT License", "Permission is hereby granted"),
}


@dataclass(frozen=True)
class Licence:
    """A licence file of a bundle.

    Attributes:
        file: its name.
        identifier: the hub's name of the licence; "other" for any that it has no name for.
        title: what EXAONE's licence calls itself, with its version; else empty.
        non_commercial: whether EXAONE's licence forbids commercial use in so many words.
    """

    file: str
    identifier: str
    title: str = ""
    non_commercial: bool = False

    @property
    def exaone(self) -> bool:
        """Whether it is LG AI Research's licence of EXAONE models."""
        return bool(self.title)


def is_licence(name: str) -> bool:
    """Whether a file of this name is a licence or a notice, in any spelling."""
    return _NAME.fullmatch(name) is not None


def read_licence(folder: Path, names: Iterable[str]) -> Licence | None:
    """Reads the licence of a folder; of several files the one that is EXAONE's, else the first by name.

    Args:
        folder: where the files are.
        names: of the folder's files.
    """
    found = [
        _read(folder, name) for name in sorted(names) if is_licence(name) and not name.lower().startswith("notice")
    ]
    return next((licence for licence in found if licence.exaone), found[0] if found else None)


def _read(folder: Path, name: str) -> Licence:
    with (folder / name).open("rb") as stream:
        text = " ".join(stream.read(_LONGEST).decode("utf-8", "replace").split())
    if title := _EXAONE.search(text):
        return Licence(name, "other", title.group(), _COMMERCIAL.search(text) is not None)
    identifier = next((known for known, marks in _KNOWN.items() if all(mark in text for mark in marks)), "other")
    return Licence(name, identifier)
