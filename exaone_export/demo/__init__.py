"""The demonstration checkpoint: a small model of the EXAONE 4.5 architecture that reads images of a few lines of text.

It is not EXAONE: it was trained for this project from random weights, on rendered lines, receipts and lists only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = "Read the text."


@dataclass(frozen=True)
class Abilities:
    """What the bundled checkpoint can do.

    Attributes:
        weights_sha256: of its model.safetensors.
        tasks: those of `exaone_export.demo.tasks` that it was trained for, with reasoning on and off.
    """

    weights_sha256: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """Something to ask the bundled checkpoint.

    Attributes:
        task: what it is about.
        paths: of the images.
        prompt: the user's text, after the images.
        text: the right answer.
        reasoning: what comes before it; if it is not empty, reasoning is to be on.
    """

    task: str
    paths: tuple[Path, ...]
    prompt: str
    text: str
    reasoning: str


def checkpoint_folder() -> Path:
    """The bundled checkpoint, laid out as on Hugging Face."""
    return Path(__file__).with_name("checkpoint")


def abilities() -> Abilities:
    """What the bundled checkpoint can do, from the file beside it."""
    raw = json.loads(Path(__file__).with_name("abilities.json").read_text(encoding="utf-8"))
    return Abilities(raw["weights_sha256"], tuple(raw["tasks"]))


def samples() -> list[Sample]:
    """What the bundled checkpoint is shown with, of the tasks it can do; nothing of it was in the training set."""
    folder, tasks = Path(__file__).with_name("images"), abilities().tasks
    entries = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return [
        Sample(
            entry["task"],
            tuple(folder / name for name in entry["images"]),
            entry["prompt"],
            entry["answer"],
            entry["reasoning"],
        )
        for entry in entries
        if entry["task"] in tasks
    ]
