"""The demonstration: export, quantize, ask about images, and say how it went."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_export import api
from exaone_export.demo import Sample, checkpoint_folder, samples

if TYPE_CHECKING:
    from exporter.report import ExportReport
    from model.progress import Progress
    from runtime.engine import Engine

RECIPES = ("none", "int8", "int4")
LINES = 2  # of the lines to read, so many


@dataclass(frozen=True)
class Reading:
    """What one bundle answered to one prompt.

    Attributes:
        task: what it is about.
        images: names of the files.
        prompt: the user's text.
        expected, text: the right answer, and the bundle's.
        expected_reasoning, reasoning: what has to come before, and what did; empty where reasoning was off.
        correct: whether both are right to the letter.
        seconds: it took.
    """

    task: str
    images: tuple[str, ...]
    prompt: str
    expected: str
    text: str
    expected_reasoning: str
    reasoning: str
    correct: bool
    seconds: float


@dataclass(frozen=True)
class DemoBundle:
    """One bundle: its folder (None if it was not kept), size in bytes, time to make it, and what it answered."""

    quantize: str
    folder: str | None
    bytes: int
    bits_per_weight: float
    seconds: float
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class DemoReport:
    """The whole demonstration; `checkpoint` says that this is not LG's model."""

    checkpoint: str
    bundles: tuple[DemoBundle, ...]
    correct: int
    total: int


def shown() -> list[Sample]:
    """What is asked: a few lines, and all else the checkpoint can do."""
    known = samples()
    lines = [sample for sample in known if sample.task == "line"]
    return (
        [*lines[:LINES], *(sample for sample in known if sample.task != "line")] if len(known) > len(lines) else lines
    )


def run_demo(
    out: Path | None = None,
    *,
    progress: Progress | None = None,
    tell: Callable[[DemoBundle], None] = lambda bundle: None,
) -> DemoReport:
    """Exports the demonstration checkpoint, quantizes it to int8 and to int4, and asks each the same.

    Args:
        out: folder to keep the three bundles in; None keeps nothing.
        progress: told how far each step is.
        tell: called with each bundle as it is done.

    Raises:
        ExaoneError: as `export` and `load`.
    """
    from runtime.engine import Engine

    bundles: list[DemoBundle] = []
    with _folder(out) as parent:
        for recipe in RECIPES:
            start = time.perf_counter()
            report = _make(parent, recipe, progress)
            seconds = time.perf_counter() - start
            with Engine.load(report.folder) as engine:
                readings = tuple(_read(engine, sample) for sample in shown())
            folder = str(report.folder) if out is not None else None
            bundles.append(DemoBundle(recipe, folder, report.bytes, report.bits_per_weight, seconds, readings))
            tell(bundles[-1])
    verdicts = [reading.correct for bundle in bundles for reading in bundle.readings]
    return DemoReport("demonstration checkpoint, not LG's EXAONE", tuple(bundles), sum(verdicts), len(verdicts))


def _make(parent: Path, recipe: str, progress: Progress | None) -> ExportReport:
    plain = parent / "exaone-demo-fp32"
    if recipe == "none":
        return api.export(checkpoint_folder(), plain, progress=progress)
    return api.quantize(plain, parent / f"exaone-demo-{recipe}", recipe=recipe, progress=progress)


def _read(engine: Engine, sample: Sample) -> Reading:
    start = time.perf_counter()
    thinking = bool(sample.reasoning)
    result = engine.generate(
        sample.prompt, images=sample.paths, max_new_tokens=128, do_sample=False, enable_thinking=thinking
    )
    text, reasoning = result.text.strip(), result.reasoning.strip()
    correct = (text, reasoning) == (sample.text, sample.reasoning)
    names = tuple(path.name for path in sample.paths)
    seconds = time.perf_counter() - start
    asked = (sample.task, names, sample.prompt, sample.text, text)
    return Reading(*asked, sample.reasoning, reasoning, correct, seconds)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="exaone-demo-") as temporary:
            yield Path(temporary)
    else:
        out.mkdir(parents=True, exist_ok=True)
        yield out
