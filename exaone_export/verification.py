"""Whether a bundle is whole, and how close it is to the model it was made from."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exaone_export.figures import keep_figures, settle_card
from exaone_export.integrity import check_files, extra_files, misfits
from exaone_export.output import to_plain
from exporter.licence import is_licence
from model.bundle import DECODER, TRANSFORMERS_JS, VISION_ENCODER, Manifest, file_sha256, int8_cache, read_manifest
from model.errors import BundleError, UsageError
from model.limits import fault, passed
from model.progress import NullProgress, Progress
from model.tasks import GENERATION

if TYPE_CHECKING:
    from exaone_export.parity import Parity
    from exaone_export.samples import Sample
    from exaone_export.verifying.accuracy import Accuracy
    from exaone_export.verifying.layers import LayerNoise
    from exaone_export.verifying.scores import Quality
    from model.exaone import Exaone
    from model.source import WeightSource
    from runtime.graphs import Graphs

log = logging.getLogger("exaone_export.verify")
INT8_CACHE_MEAN_KLD = 0.002  # of float32 weights over keys and values of 8 bits
FLOAT_MEAN_KLD = 0.02  # of 16-bit floats, whose single values may differ by more
WORST_LAYERS = 12  # that are kept and shown


@dataclass(frozen=True)
class Verification:
    """The figures of one verification.

    Attributes:
        ok: every file is sound, no figure is NaN, what must be equal is, and nothing is beyond its limit.
        files: file name → whether it is what the manifest says.
        problems: what is wrong, one sentence each.
        parity: graph → error against the eager model; None without a source.
        quality: of the next-token distribution; None without a source, and for a task that has none.
        layers: the quantized weights with the most noise, the worst first.
        accuracy: of a bundle made from the demonstration checkpoint, each task's.
        limits: figure → most or least that passes: the recipe's, and over them the caller's.
    """

    ok: bool
    files: Mapping[str, bool]
    problems: tuple[str, ...] = ()
    parity: Mapping[str, Mapping[str, float]] | None = None
    quality: Quality | None = None
    layers: tuple[LayerNoise, ...] = ()
    accuracy: tuple[Accuracy, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)


def verify_bundle(
    folder: Path,
    source: str | Path | None = None,
    prompts: str | Path | None = None,
    progress: Progress | None = None,
    *,
    limits: Mapping[str, float] | None = None,
) -> Verification:
    """Verifies a bundle and, with a source, keeps the figures in its verify.json and its model card.

    Args:
        folder: the bundle.
        source: the checkpoint it was made from, a folder or hub id; None checks integrity alone.
        prompts: JSON lines to measure quality on; None takes built-in ones.
        progress: told how far it is.
        limits: names of `model.limits` → most or least that passes; they take the place of the recipe's own. Without
            either, a float bundle has one for its mean divergence.

    Raises:
        BundleError: the manifest cannot be read, or the source is not what the bundle was made from.
        CheckpointError: the source is damaged.
        UsageError: the source, the prompts or the limits cannot be used.
        EnvironmentFault: a library, or a kernel for the bundle's type, is missing.
    """
    progress = progress or NullProgress()
    _check_limits(limits or {}, measured=source is not None)
    manifest = settle_card(folder, read_manifest(folder))
    for name in extra_files(folder, manifest):
        log.warning("%s is not part of the bundle", name)
    problems = check_files(folder, manifest, progress) or misfits(folder, manifest)
    files = {name: name not in problems for name in (*manifest.files, *problems)}
    sentences = tuple(f"{name}: {why}" for name, why in problems.items())
    if problems or source is None:
        return Verification(not problems, files, sentences)
    found = _compare(folder, manifest, source, prompts, progress)
    held = {**_own_limits(manifest), **manifest.limits, **(limits or {})}
    sentences = tuple(_problems(manifest, found, held))
    report = Verification(
        not sentences, files, sentences, found.figures, found.quality, found.layers[:WORST_LAYERS], found.accuracy, held
    )
    keep_figures(folder, _plain(report))
    return report


@dataclass(frozen=True)
class _Found:
    """What was measured against the source."""

    parity: Mapping[str, Parity]
    quality: Quality | None = None
    layers: tuple[LayerNoise, ...] = ()
    accuracy: tuple[Accuracy, ...] = ()

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """Graph → its errors, as they are reported."""
        return {name: {"max_abs_error": p.max_abs_error, "cosine": p.cosine} for name, p in self.parity.items()}


def _check_limits(limits: Mapping[str, float], *, measured: bool) -> None:
    for name, limit in limits.items():
        if why := fault(name, limit):
            raise UsageError("cannot verify", "limits", why)
    if limits and not measured:
        raise UsageError("cannot verify", "limits", "without a source nothing is measured", "Add --source")


def _plain(report: Verification) -> dict[str, Any]:
    plain = to_plain(report)
    assert isinstance(plain, dict)
    return plain


def _compare(
    folder: Path, manifest: Manifest, source: str | Path, prompts: str | Path | None, progress: Progress
) -> _Found:
    # All these need torch, which integrity does not.
    from exaone_export.parity import compare_graphs
    from exaone_export.samples import load_samples
    from exporter.source import resolve_source
    from model.exaone import Exaone
    from model.load import load_encoder, load_exaone
    from model.weights import Checkpoint
    from runtime.graphs import Graphs
    from runtime.providers import choose_provider, choose_threads
    from runtime.session import GraphSession

    shared = manifest.offload and manifest.graph(VISION_ENCODER) is None  # runs on the CPU too
    ep = "auto" if shared else "cuda" if manifest.target == "cuda" else "cpu"
    provider, threads = choose_provider(ep), choose_threads(None)
    graphs = Graphs(folder, ep=provider)
    generates = manifest.task in GENERATION
    if prompts is not None and not generates:
        why = f"a bundle for {manifest.task} tells no next token"
        raise UsageError("cannot use prompts", Path(prompts).name, why, "Leave out --prompts")
    samples = load_samples(folder, graphs.config, Path(prompts) if prompts else None) if generates else []
    revision = manifest.source.get("revision") if not Path(source).is_dir() else None
    origin = resolve_source(str(source), revision, progress)
    _check_same_source(origin, manifest, progress)
    model = load_exaone(origin) if generates else load_encoder(origin, manifest.task)
    if manifest.layout == TRANSFORMERS_JS and isinstance(model, Exaone):
        model.mtp = None  # which is left out there
    infos = {graph.name: graph for graph in manifest.graphs}

    def open_graph(name: str) -> GraphSession:
        if name not in infos:
            raise BundleError(
                "damaged bundle", name, "the model has this part, the bundle no such graph", "Export again"
            )
        return GraphSession(folder, infos[name], provider, threads)

    parity = compare_graphs(model, open_graph, progress)
    if not isinstance(model, Exaone):
        return _Found(parity)
    bound = Checkpoint.open(origin).bind(graphs.config, compare=False)
    found = _measure(model, graphs, samples, bound, progress)
    graphs.close()
    return dataclasses.replace(found, parity=parity)


def _measure(
    model: Exaone,
    graphs: Graphs,
    samples: Sequence[Sample],
    weights: Mapping[str, WeightSource],
    progress: Progress,
) -> _Found:
    """What can be told of a bundle that generates, beside the parity of its graphs."""
    from exaone_export.quality import measure_quality
    from exaone_export.verifying.accuracy import measure_accuracy, of_demonstration
    from exaone_export.verifying.layers import input_powers, measure_layers

    with input_powers(model) as powers:
        quality = measure_quality(model, graphs, samples, progress)
    layers = measure_layers(graphs.folder, graphs.manifest, weights, powers, progress)
    accuracy = measure_accuracy(graphs, progress) if of_demonstration(graphs.manifest) else []
    return _Found({}, quality, tuple(layers), tuple(accuracy))


def _check_same_source(origin: Path, manifest: Manifest, progress: Progress) -> None:
    """Compares the source's files with the hashes that the bundle was made from."""
    expected = manifest.source.get("files", {})
    paths = {name: origin / name for name in expected}
    present = {name: path for name, path in paths.items() if path.is_file()}
    progress.start("hashing source", sum(path.stat().st_size for path in present.values()), "bytes")

    def same(name: str) -> bool:
        equal = name in present and file_sha256(present[name]) == expected[name]
        progress.advance(present[name].stat().st_size if name in present else 0)
        return equal

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        differing = [name for name, equal in zip(paths, pool.map(same, paths), strict=True) if not equal]
    progress.finish()
    # What the model computes does not depend on its licence text.
    differing = [name for name in differing if not is_licence(name)]
    if differing or not expected:
        why = (
            f"{differing[0]} is not the one that the bundle was made from"
            if differing
            else "the bundle names no source"
        )
        raise BundleError("cannot verify", origin.name, why, "Give the checkpoint that the bundle was made from")


def _own_limits(manifest: Manifest) -> dict[str, float]:
    """What is expected of a bundle whose recipe says nothing."""
    if manifest.recipe != "none":
        return {}
    if int8_cache(manifest.graph(DECODER)):
        return {"mean_kld": INT8_CACHE_MEAN_KLD}
    return {"mean_kld": 1e-4 if manifest.dtype == "fp32" else FLOAT_MEAN_KLD}


def _problems(manifest: Manifest, found: _Found, limits: Mapping[str, float]) -> Iterator[str]:
    exact = manifest.recipe == "none" and manifest.dtype == "fp32" and not int8_cache(manifest.graph(DECODER))
    for name, figures in found.parity.items():
        if not all(map(math.isfinite, (figures.max_abs_error, figures.cosine))):
            yield f"{name}: it gives NaN or infinite values"
        elif exact and not figures.exact:
            yield f"{name}: off by {figures.max_abs_error:.3g}, more than float32 rounding explains"
    if found.quality is None:
        return
    if not all(map(math.isfinite, found.quality.values.values())):
        yield "quality: a figure is NaN or infinite"
        return
    measured = found.quality.values
    if found.accuracy:
        from exaone_export.verifying.accuracy import overall

        measured |= {"exact": overall(found.accuracy)}
    yield from (f"quality: {sentence}" for sentence in passed(measured, limits))
