"""Whether every file of a bundle is what its manifest says, and whether its graphs are of the kind we write."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exaone_export.onnx_file import OnnxFile, read_onnx
from model.bundle import MANIFEST, VERIFY, GraphInfo, Manifest, bundle_path, file_sha256
from model.errors import BundleError
from model.progress import Progress

# Besides ONNX's own; an operator of any other domain is not ours and may run foreign code.
_DOMAINS = ("com.microsoft", "com.microsoft.experimental")


def extra_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of files that do not belong to the bundle."""
    known = {*manifest.files, MANIFEST, VERIFY}
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


def check_files(folder: Path, manifest: Manifest, progress: Progress) -> dict[str, str]:
    """Hashes every file, and reads the graphs' structure.

    Returns:
        File name → what is wrong with it; empty for a sound bundle.
    """
    problems: dict[str, str] = {}
    for name, info in manifest.files.items():
        path = bundle_path(folder, name)
        if not path.is_file():
            problems[name] = "the file is missing"
        elif (size := path.stat().st_size) != info.size:
            problems[name] = f"{size} bytes, {info.size} expected"
    names = [name for name in manifest.files if name not in problems]
    progress.start("hashing", sum(manifest.files[name].size for name in names), "bytes")

    def digest(name: str) -> str:
        found = file_sha256(folder / name)
        progress.advance(manifest.files[name].size)
        return found

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, found in zip(names, pool.map(digest, names), strict=True):
            if found != manifest.files[name].sha256:
                problems[name] = "its sha256 is not the manifest's"
    progress.finish()
    for graph in manifest.graphs:
        if graph.file not in problems and (why := _graph_problem(folder, manifest, graph)):
            problems[graph.file] = why
    return problems


def _graph_problem(folder: Path, manifest: Manifest, graph: GraphInfo) -> str:
    """What a graph does that no exported one does; empty for nothing."""
    try:
        found = read_onnx(bundle_path(folder, graph.file))
    except BundleError as error:
        return error.why
    foreign = [op for op in found.ops if "." in op and op.rpartition(".")[0] not in _DOMAINS]
    if foreign:
        return f"it holds an operator of another domain, {foreign[0][:60]!r}"
    if found.functions:
        return "it brings functions of its own"
    return _external_problem(found, manifest, graph)


def _external_problem(found: OnnxFile, manifest: Manifest, graph: GraphInfo) -> str:
    places = sorted((data.location, data.offset, data.length) for data in found.external)
    for location, offset, length in places:
        if location not in graph.data:
            return f"a tensor lies in {location[:60]!r}, which is not the graph's data file"
        if offset + length > manifest.files[location].size:
            return f"a tensor lies beyond the end of {location}"
    for (file, start, length), (next_file, next_start, _) in itertools.pairwise(places):
        if file == next_file and start + length > next_start and start != next_start:
            return f"two tensors overlap in {file}"
    return ""
