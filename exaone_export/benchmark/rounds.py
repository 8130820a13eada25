"""Rounds of measurement: bundles take turns, the memory's speed is measured between them, figures become a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from exaone_export.benchmark.bandwidth import ReadBandwidth
from exaone_export.benchmark.process import Worker
from exaone_export.benchmark.report import Bench, Growth, Sample, Settings, Spread
from exaone_export.benchmark.traffic import bundle_bytes, cache_bytes_per_token, weight_bytes_per_token
from model.bundle import read_manifest
from model.errors import UsageError
from model.progress import NullProgress, Progress
from model.tasks import GENERATION, TASKS
from runtime.engine import Engine
from runtime.execution import Execution
from runtime.graphs import Graphs
from runtime.prompt import check_length

# Where time is measured to see it grow: these parts of the largest size.
_PARTS: Final = (8, 4, 2, 1)
_Place = tuple[str, int | None, Execution]
_RATIOS: Final = ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "vision_s")


@dataclass
class _Subject:
    """A bundle while it is measured; `facts` is what its process told of itself."""

    folder: Path
    worker: Worker
    load_s: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    grown: list[dict[str, list[float]]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    peak: int = 0


def measure(
    bundle: Path,
    other: Path | None,
    settings: Settings,
    ep: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Bench:
    """Measures a bundle, or two side by side, each in a process of its own, one of them working at a time.

    Args:
        bundle, other: folders; two are held in memory together.
        settings: what to measure.
        ep, threads: as in `exaone_export.load`.
        progress: told of every step.
        execution: more about a provider that is not the CPU's.

    Returns:
        The figures of `bundle`, with those of `other` and the ratios in it.

    Raises:
        UsageError: the prompt exceeds the context, the model reads no images, or an option makes no sense.
        BundleError, EnvironmentFault, ResourceError, NumericalError: as loading and generating raise them.
    """
    folders = [bundle] if other is None else [bundle, other]
    chosen = execution or Execution()
    graphs = [_checked(folder, settings, (ep, threads, chosen)) for folder in folders]
    progress = progress or NullProgress()
    with ExitStack() as stack:
        subjects = _load(folders, settings, (ep, threads, chosen), stack, progress)
        bandwidth = stack.enter_context(ReadBandwidth(subjects[0].facts["threads"]))
        _run_rounds(subjects, settings, bandwidth, progress)
        for subject in subjects:
            subject.peak = subject.worker.call("peak")
        if settings.growth:
            _run_growth(subjects, settings, progress)
    first, *rest = (_report(subject, one, settings) for subject, one in zip(subjects, graphs, strict=True))
    return replace(first, compared=rest[0], ratios=_ratios(*subjects)) if rest else first


def _checked(folder: Path, settings: Settings, place: _Place) -> Graphs:
    """The bundle, unopened; what can be refused without its weights is refused before anything takes its time."""
    task = read_manifest(folder).task
    if task in TASKS and task not in GENERATION:
        why = f"it was exported for {task}, and what is measured is generating text"
        raise UsageError("cannot measure bundle", folder.resolve().name, why, "Name a bundle that generates")
    ep, threads, execution = place
    engine = Engine.load(folder, ep, threads, execution=execution)
    check_length(max(settings.prompt_tokens, settings.depth or 0), settings.new_tokens + 1, engine.graphs.context)
    if settings.image is not None:
        _ = engine.requests.image_processor
    return engine.graphs


def _ratios(subject: _Subject, other: _Subject) -> dict[str, Spread]:
    """Each figure over the other bundle's of the same round; one that is 0, as the image's time can be, is left out."""
    ratios = {}
    for name in _RATIOS:
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(subject.samples, other.samples, strict=True)]
        if all(theirs > 0 for _, theirs in pairs):
            ratios[name] = Spread.of(ours / theirs for ours, theirs in pairs)
    return ratios


def _load(
    bundles: Sequence[Path], settings: Settings, place: _Place, stack: ExitStack, progress: Progress
) -> list[_Subject]:
    """Loads every bundle in as many processes as there are rounds; the last one of each stays."""
    progress.start("loading", (settings.repeat + 1) * len(bundles), "loads")
    times: list[list[float]] = [[] for _ in bundles]
    subjects = []
    arguments: dict[str, Any] = {"ep": place[0], "threads": place[1], "images": settings.image is not None}
    arguments["execution"] = asdict(place[2])
    for i in range(settings.repeat + 1):
        for folder, seconds in zip(bundles, times, strict=True):
            last = i == settings.repeat
            with ExitStack() as brief:
                worker = (stack if last else brief).enter_context(Worker())
                facts = worker.call("load", folder=str(folder), **arguments)
            if i:  # the first one reads the files from the disk
                seconds.append(facts["load_s"])
            if last:
                subjects.append(_Subject(folder, worker, seconds, facts=facts))
            progress.advance(1)
    progress.finish()
    return subjects


def _run_rounds(subjects: Sequence[_Subject], settings: Settings, bandwidth: ReadBandwidth, progress: Progress) -> None:
    """Every bundle once a round, in turning order; the first round warms up."""
    progress.start("measuring", (settings.repeat + 1) * len(subjects), "runs")
    arguments = {
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "depth": settings.depth,
        "batch": settings.batch,
        "image": settings.image,
    }
    for i in range(settings.repeat + 1):
        for subject in subjects if i % 2 else reversed(subjects):
            before = bandwidth.measure()
            figures = subject.worker.call("run", seed=i, **arguments)
            roof = max(before, bandwidth.measure())
            subject.facts |= {key: figures.pop(key) for key in ("prompt_tokens", "image_tokens")}
            if i:
                subject.samples.append(Sample(**figures, read_bandwidth_bytes_per_s=roof))
            progress.advance(1)
    progress.finish()


def _run_growth(subjects: Sequence[_Subject], settings: Settings, progress: Progress) -> None:
    """Shorter prompts and smaller images, up to those of the rounds."""
    longest = max(settings.prompt_tokens, settings.depth or 0)
    lengths = sorted({max(1, longest // part) for part in _PARTS})
    runs = settings.repeat * len(subjects) * (len(lengths) + len(_smaller_images(settings.image)))
    progress.start("measuring growth", runs, "runs")
    for i in range(settings.repeat):
        for subject in subjects:
            subject.grown.append({"tokens": [float(length) for length in lengths]})
        for length in lengths:
            for subject in subjects:
                _note(subject, subject.worker.call("read", tokens=length, new_tokens=settings.new_tokens, seed=i))
                progress.advance(1)
        for width, height in _smaller_images(settings.image):
            for subject in subjects:
                _note(subject, subject.worker.call("encode", width=width, height=height, seed=i))
                progress.advance(1)
    progress.finish()


def _note(subject: _Subject, figures: Mapping[str, float]) -> None:
    for key, value in figures.items():
        subject.grown[-1].setdefault(key, []).append(value)


def _smaller_images(image: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Images of an eighth of the area up to all of it."""
    if image is None:
        return []
    width, height = image
    return [(max(1, int(width / math.sqrt(part))), max(1, int(height / math.sqrt(part)))) for part in _PARTS]


def _report(subject: _Subject, graphs: Graphs, settings: Settings) -> Bench:
    samples = subject.samples
    bandwidth = _spread(samples, "read_bandwidth_bytes_per_s")
    decode = _spread(samples, "decode_tokens_per_s")
    length = subject.facts["prompt_tokens"]
    depth = length if settings.depth is None else settings.depth
    weights = weight_bytes_per_token(graphs.folder, graphs.manifest)
    held = max(1, depth) + settings.new_tokens // 2
    cache = cache_bytes_per_token(graphs.manifest, graphs.config.text.sliding_window, held)
    # The rows of a pass share the weights it reads; each has a cache of its own.
    loads = (weights / settings.batch, weights / settings.batch + cache)
    roof, traffic = (
        [one.decode_tokens_per_s * load / one.read_bandwidth_bytes_per_s for one in samples] for load in loads
    )
    middle = decode.median / bandwidth.median
    on_cpu = subject.facts["ep"] == "cpu"  # elsewhere the weights lie in another memory
    return Bench(
        bundle=subject.folder.resolve().name,
        prefill_tokens_per_s=_spread(samples, "prefill_tokens_per_s"),
        decode_tokens_per_s=decode,
        time_to_first_token_s=_spread(samples, "time_to_first_token_s"),
        vision_s=_spread(samples, "vision_s"),
        load_s=Spread.of(subject.load_s),
        peak_rss_bytes=subject.peak,
        bundle_bytes=bundle_bytes(graphs.manifest),
        weight_bytes_per_token=weights,
        read_bandwidth_bytes_per_s=bandwidth.median,
        roofline_fraction=middle * loads[0] if on_cpu else None,
        ep=subject.facts["ep"],
        threads=subject.facts["threads"],
        prompt_tokens=length,
        image_tokens=subject.facts["image_tokens"],
        new_tokens=settings.new_tokens,
        depth=depth,
        batch=settings.batch,
        repeat=settings.repeat,
        read_bandwidth=bandwidth,
        roofline=Spread.of(roof) if on_cpu else None,
        cache_bytes_per_token=cache,
        traffic_fraction=middle * loads[1] if on_cpu else None,
        traffic=Spread.of(traffic) if on_cpu else None,
        growth=_growth(subject.grown) if subject.grown else None,
    )


def _spread(samples: Sequence[Sample], name: str) -> Spread:
    return Spread.of(getattr(sample, name) for sample in samples)


def _growth(grown: Sequence[Mapping[str, Sequence[float]]]) -> Growth:
    def spreads(key: str) -> tuple[Spread, ...]:
        rounds = [found.get(key, ()) for found in grown]
        return tuple(Spread.of(values) for values in zip(*rounds, strict=True))

    def sizes(key: str) -> tuple[int, ...]:
        return tuple(int(size) for size in grown[0].get(key, ()))

    return Growth(sizes("tokens"), spreads("prefill_s"), spreads("decode_s"), sizes("patches"), spreads("vision_s"))
