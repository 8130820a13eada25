"""The demonstration checkpoint: a small model of the EXAONE 4.5 architecture that reads one line of text.

It is not EXAONE: it was trained for this project from random weights on rendered lines only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = "Read the text."


@dataclass(frozen=True)
class Sample:
    """An image and the line it shows."""

    path: Path
    text: str


def checkpoint_folder() -> Path:
    """The bundled checkpoint, laid out as on Hugging Face."""
    return Path(__file__).with_name("checkpoint")


def samples() -> list[Sample]:
    """The bundled images with the lines they show; none of the lines was in the training set."""
    folder = Path(__file__).with_name("images")
    lines: dict[str, str] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return [Sample(folder / name, text) for name, text in lines.items()]
