"""The demonstration: export, quantize, read images, and say how it went."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_export import api
from exaone_export.demo import INSTRUCTION, Sample, checkpoint_folder, samples

if TYPE_CHECKING:
    from exporter.package import ExportReport
    from model.progress import Progress
    from runtime.engine import Engine

RECIPES = ("none", "int8", "int4")
IMAGES = 3


@dataclass(frozen=True)
class Reading:
    """What one bundle made of one image."""

    image: str
    expected: str
    text: str
    correct: bool
    seconds: float


@dataclass(frozen=True)
class DemoBundle:
    """One bundle: its folder (None if it was not kept), size in bytes, time to make it, and what it read."""

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


def run_demo(
    out: Path | None = None,
    *,
    progress: Progress | None = None,
    tell: Callable[[DemoBundle], None] = lambda bundle: None,
) -> DemoReport:
    """Exports the demonstration checkpoint, quantizes it to int8 and to int4, and reads three images with each.

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
                readings = tuple(_read(engine, sample) for sample in samples()[:IMAGES])
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
    result = engine.generate(INSTRUCTION, images=[sample.path], max_new_tokens=48, do_sample=False)
    text = result.text.strip()
    return Reading(sample.path.name, sample.text, text, text == sample.text, time.perf_counter() - start)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="exaone-demo-") as temporary:
            yield Path(temporary)
    else:
        out.mkdir(parents=True, exist_ok=True)
        yield out
