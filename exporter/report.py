"""What an export made, in figures: what `export` prints and returns."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from exporter.card_tables import own_bytes
from exporter.push import PushReport
from exporter.write import Written
from model.bundle import MANIFEST, Manifest, WeightInfo


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        folder: the bundle.
        model_type, task, dtype, target, recipe, notes: as in its manifest.
        graphs: graph name → bytes of its own files.
        bytes: of the whole folder.
        parameters: number of weights.
        bits_per_weight: stored bits of all weights over their number.
        weights: module path → how it is stored.
        seconds: how long it took.
        peak_rss_bytes: the most memory this process had so far; 0 where the system does not say.
        resumed_parts, resumed_bytes: weights, and bytes of them, that an interrupted export had written.
        predicted_bytes, predicted_peak_bytes: what `bytes` and the memory were reckoned to be before any work; 0 where
            nobody reckoned.
        pushed: where it was uploaded to; None if it was not.
        plan: of a recipe that was planned: its file, and what was predicted; None of any other.
    """

    folder: Path
    model_type: str
    task: str
    dtype: str
    target: str
    recipe: str
    notes: tuple[str, ...]
    graphs: Mapping[str, int]
    bytes: int
    parameters: int
    bits_per_weight: float
    weights: Mapping[str, WeightInfo]
    seconds: float
    peak_rss_bytes: int
    resumed_parts: int = 0
    resumed_bytes: int = 0
    predicted_bytes: int = 0
    predicted_peak_bytes: int = 0
    pushed: PushReport | None = None
    plan: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self) | {"folder": str(self.folder)}


def report_of(folder: Path, manifest: Manifest, parameters: int, bits: float, written: Written) -> ExportReport:
    """The report of a bundle that is complete; it names that folder, and no time.

    Args:
        folder: of the bundle.
        manifest: as written there.
        parameters: number of weights.
        bits: of each on the disk, on average.
        written: its graphs.
    """
    sizes = {name: info.size for name, info in manifest.files.items()}
    return ExportReport(
        folder=folder,
        model_type=manifest.model_type,
        task=manifest.task,
        dtype=manifest.dtype,
        target=manifest.target,
        recipe=manifest.recipe,
        notes=manifest.notes,
        graphs={graph.name: own_bytes(manifest, graph) for graph in manifest.graphs},
        bytes=sum(sizes.values()) + (folder / MANIFEST).stat().st_size,
        parameters=parameters,
        bits_per_weight=bits,
        weights=manifest.weights,
        seconds=0.0,
        peak_rss_bytes=peak_rss_bytes(),
        resumed_parts=written.resumed_parts,
        resumed_bytes=written.resumed_bytes,
    )


def finished(report: ExportReport, folder: Path, started: float) -> ExportReport:
    """The report with its final folder, and the time since `started` (`time.monotonic`)."""
    return replace(report, folder=folder, seconds=time.monotonic() - started)


def peak_rss_bytes() -> int:
    """The most memory this process ever had; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")  # with the program's name
    except OSError:
        if sys.platform == "win32":
            return 0
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
