"""Whether a bundle is whole, and how close it is to the model it was made from."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_export.figures import keep_figures, settle_card
from exaone_export.integrity import check_files, extra_files
from exporter.licence import is_licence
from model.bundle import Manifest, file_sha256, read_manifest
from model.errors import BundleError, UsageError
from model.progress import NullProgress, Progress
from model.tasks import GENERATION

if TYPE_CHECKING:
    from exaone_export.parity import Parity
    from exaone_export.quality import Quality

log = logging.getLogger("exaone_export.verify")
FLOAT_MEAN_KLD = 0.02  # of 16-bit floats, whose single values may differ by more


@dataclass(frozen=True)
class Verification:
    """The figures of one verification.

    Attributes:
        ok: every file is sound, no figure is NaN, and what must be equal is.
        files: file name → whether it is what the manifest says.
        problems: what is wrong, one sentence each.
        parity: graph → error against the eager model; None without a source.
        quality: of the next-token distribution; None without a source, and for a task that has none.
    """

    ok: bool
    files: Mapping[str, bool]
    problems: tuple[str, ...] = ()
    parity: Mapping[str, Mapping[str, float]] | None = None
    quality: Quality | None = None


def verify_bundle(
    folder: Path,
    source: str | Path | None = None,
    prompts: str | Path | None = None,
    progress: Progress | None = None,
    *,
    max_mean_kld: float | None = None,
) -> Verification:
    """Verifies a bundle and, with a source, keeps the figures in its verify.json and its model card.

    Args:
        folder: the bundle.
        source: the checkpoint it was made from, a folder or hub id; None checks integrity alone.
        prompts: JSON lines to measure quality on; None takes built-in ones.
        progress: told how far it is.
        max_mean_kld: mean divergence from which a bundle is not ok; None takes a limit for float bundles only.

    Raises:
        BundleError: the manifest cannot be read, or the source is not what the bundle was made from.
        CheckpointError: the source is damaged.
        UsageError: the source or the prompts cannot be used.
        EnvironmentFault: a library, or a kernel for the bundle's type, is missing.
    """
    progress = progress or NullProgress()
    manifest = settle_card(folder, read_manifest(folder))
    for name in extra_files(folder, manifest):
        log.warning("%s is not part of the bundle", name)
    problems = check_files(folder, manifest, progress)
    files = {name: name not in problems for name in manifest.files}
    sentences = tuple(f"{name}: {why}" for name, why in problems.items())
    if problems or source is None:
        return Verification(not problems, files, sentences)
    return _compare(folder, manifest, files, source, prompts, progress, max_mean_kld)


def _compare(
    folder: Path,
    manifest: Manifest,
    files: Mapping[str, bool],
    source: str | Path,
    prompts: str | Path | None,
    progress: Progress,
    max_mean_kld: float | None,
) -> Verification:
    # All these need torch, which integrity does not.
    from exaone_export.parity import compare_graphs
    from exaone_export.quality import measure_quality
    from exaone_export.samples import load_samples
    from exporter.source import resolve_source
    from model.exaone import Exaone
    from model.load import load_encoder, load_exaone
    from runtime.graphs import Graphs
    from runtime.providers import choose_provider, choose_threads
    from runtime.session import GraphSession

    ep = "cuda" if manifest.target == "cuda" else "cpu"
    provider, threads = choose_provider(ep), choose_threads(None)
    graphs = Graphs(folder, ep=ep)
    generates = manifest.task in GENERATION
    if prompts is not None and not generates:
        why = f"a bundle for {manifest.task} tells no next token"
        raise UsageError("cannot use prompts", Path(prompts).name, why, "Leave out --prompts")
    samples = load_samples(folder, graphs.config, Path(prompts) if prompts else None) if generates else []
    revision = manifest.source.get("revision") if not Path(source).is_dir() else None
    origin = resolve_source(str(source), revision, progress)
    _check_same_source(origin, manifest, progress)
    model = load_exaone(origin) if generates else load_encoder(origin, manifest.task)
    infos = {graph.name: graph for graph in manifest.graphs}

    def open_graph(name: str) -> GraphSession:
        if name not in infos:
            raise BundleError(
                "damaged bundle", name, "the model has this part, the bundle no such graph", "Export again"
            )
        return GraphSession(folder, infos[name], provider, threads)

    parity = compare_graphs(model, open_graph, progress)
    quality = measure_quality(model, graphs, samples, progress) if isinstance(model, Exaone) else None
    graphs.close()
    problems = tuple(_problems(manifest, parity, quality, max_mean_kld))
    figures = {name: {"max_abs_error": p.max_abs_error, "cosine": p.cosine} for name, p in parity.items()}
    found = Verification(not problems, files, problems, figures, quality)
    keep_figures(folder, dataclasses.asdict(found))
    return found


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


def _problems(
    manifest: Manifest, parity: Mapping[str, Parity], quality: Quality | None, max_mean_kld: float | None
) -> list[str]:
    found = []
    exact = manifest.recipe == "none" and manifest.dtype == "fp32"
    for name, figures in parity.items():
        if not all(map(math.isfinite, (figures.max_abs_error, figures.cosine))):
            found.append(f"{name}: it gives NaN or infinite values")
        elif exact and not figures.exact:
            found.append(f"{name}: off by {figures.max_abs_error:.3g}, more than float32 rounding explains")
    if quality is None:
        return found
    if not all(math.isfinite(value) for value in dataclasses.astuple(quality)):
        found.append("quality: a figure is NaN or infinite")
    limit = max_mean_kld
    if limit is None and manifest.recipe == "none":
        limit = 1e-4 if exact else FLOAT_MEAN_KLD
    if limit is not None and quality.mean_kld > limit:
        found.append(f"quality: mean divergence {quality.mean_kld:.3g} nats is above {limit:g}")
    return found
