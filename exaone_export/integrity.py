"""Whether every file of a bundle is what its manifest says, whether its graphs are of the kind we write, and whether
its weights are numbers.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Final

from model.bundle import (
    MANIFEST,
    VERIFY,
    GraphInfo,
    Manifest,
    bundle_path,
    check_sizes,
    file_problems,
    file_sha256,
    read_manifest,
)
from model.errors import BundleError, printable
from model.progress import Progress
from model.tasks import GENERATION
from runtime.agreement import check_agreement
from runtime.engine import read_defaults
from runtime.finite import Extent, FiniteWatch
from runtime.graph_check import check_graph, data_file, float_extents, scale_names, scale_problem, structure_problem
from runtime.graphs import bundle_config
from runtime.onnx_file import read_onnx
from runtime.request import RequestBuilder

_LARGEST: Final = 1 << 30  # bytes of a file that holds no weights; tokenizers have a hundredth of it
_SLACK: Final = 1 << 20  # bytes that may lie behind the last weight


def extra_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of files that do not belong to the bundle."""
    known = {*manifest.files, MANIFEST, VERIFY}
    homes = {home.as_posix() for name in manifest.files for home in PurePosixPath(name).parents}
    found = (path for home in homes if (folder / home).is_dir() for path in (folder / home).iterdir())
    names = (path.relative_to(folder).as_posix() for path in found)
    return sorted(name for name in names if name not in known | homes)


def check_files(folder: Path, manifest: Manifest, progress: Progress) -> dict[str, str]:
    """Hashes every file, reads the graphs' structure, and looks at the weights' numbers as they are hashed.

    Returns:
        File name → what is wrong with it; empty for a sound bundle.
    """
    problems = file_problems(folder, manifest)
    inside: dict[str, str] = {}
    weights: dict[Path, list[Extent]] = {}
    ends: dict[str, int] = {}
    for graph in manifest.graphs:
        if not problems.keys() & {graph.file, *graph.data}:
            try:
                inside[graph.file] = _look_into(folder, graph, weights, ends)
            except BundleError as error:
                inside[graph.file] = error.why
    # A file of holes costs nobody anything but those who hash it.
    for name in manifest.files.keys() - problems.keys():
        whole = all(inside.get(graph.file) == "" for graph in manifest.graphs if name in graph.data)
        if whole and (why := _too_large(name, manifest, ends)):
            problems[name] = why
    # The largest first, so that no thread is left with it alone at the end.
    names = sorted(manifest.files.keys() - problems.keys(), key=lambda name: -manifest.files[name].size)
    watches = {name: FiniteWatch(weights.get(folder / name, ())) for name in names}
    progress.start("hashing", sum(manifest.files[name].size for name in names), "bytes")

    def digest(name: str) -> str:
        return file_sha256(folder / name, progress.advance, watches[name])

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, found in zip(names, pool.map(digest, names), strict=True):
            if found != manifest.files[name].sha256:
                problems[name] = "its sha256 is not the manifest's"
            elif watches[name].bad:
                problems[name] = f"{printable(watches[name].bad, 60)!r} holds NaN or an infinity"
    progress.finish()
    return {name: why for name, why in inside.items() if why and name not in problems} | problems


def _too_large(name: str, manifest: Manifest, ends: dict[str, int]) -> str:
    """Why a file cannot be what it should: it holds much more than its weights, or than any without weights."""
    size = manifest.files[name].size
    if any(name in graph.data for graph in manifest.graphs):
        behind = size - ends.get(name, 0)
        return f"{behind} bytes behind its last weight" if behind > _SLACK else ""
    return f"{size} bytes, at most {_LARGEST} are in a file without weights" if size > _LARGEST else ""


def _look_into(folder: Path, graph: GraphInfo, weights: dict[Path, list[Extent]], ends: dict[str, int]) -> str:
    """What is wrong with a graph's structure; where floats lie is added to `weights`, where data ends to `ends`."""
    found = read_onnx(bundle_path(folder, graph.file))
    for data in found.external:
        name = data_file(graph, data.location)
        ends[name] = max(ends.get(name, 0), data.offset + data.length)
    why = structure_problem(folder, graph, found) or scale_problem(folder, graph, found)
    if not why:
        # A single number may be the infinity of a mask; scales have been looked at.
        others = found.initializers.keys() - scale_names(found)
        several = [name for name in others if math.prod(found.initializers[name].shape) > 1]
        for extent in float_extents(folder, graph, found, several):
            weights.setdefault(extent.path, []).append(extent)
    return why


def check_graphs(folder: Path) -> None:
    """Refuses graphs that would read what is not theirs, before another library opens them.

    Raises:
        BundleError: names the graph and what is wrong with it.
        EnvironmentFault: the bundle is newer than this package.
    """
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    for graph in manifest.graphs:
        check_graph(folder, graph)


def misfits(folder: Path, manifest: Manifest) -> dict[str, str]:
    """What of a bundle of sound files does not fit together, as those who run it would find out; empty for nothing."""
    try:
        config = bundle_config(folder, manifest.task)
        check_agreement(manifest, config)
        requests = RequestBuilder(folder, config)
        if requests.has_tokenizer:
            requests.tokenizer  # noqa: B018 - it is read, and compared with the model
        if manifest.task in GENERATION:
            read_defaults(folder)
    except BundleError as error:
        return {error.where: error.why}
    return {}
