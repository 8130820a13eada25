"""All targets by name, in the order in which they run."""

from __future__ import annotations

from tests.fuzz.bundles import Damaged, ManifestFile, Onnx
from tests.fuzz.checkpoints import Header, Weights
from tests.fuzz.configurations import Config, Generation, Preprocessor, Words
from tests.fuzz.images import Picture
from tests.fuzz.saved import BatchJournal, ExportJournal, Session
from tests.fuzz.selftest import Selftest
from tests.fuzz.target import Target
from tests.fuzz.templates import Template
from tests.fuzz.texts import CalibrationLine, Conversation, Grammar, RecipeFile, RequestLine

_ALL: tuple[type[Target], ...] = (
    Header, Weights, ManifestFile, Damaged, Onnx, Config, Generation, Preprocessor, Words, Template, RecipeFile,
    Picture, Session, Conversation, RequestLine, CalibrationLine, Grammar, BatchJournal, ExportJournal,
)  # fmt: skip
TARGETS: dict[str, type[Target]] = {target.name: target for target in _ALL}


def target_of(name: str) -> type[Target]:
    """A target by name; also the one that tests the others' keepers."""
    return Selftest if name == Selftest.name else TARGETS[name]
