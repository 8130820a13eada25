"""What the parts of `cuda.py` share: what they run, how they take turns, and what figures are reckoned with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cuda_models import Models
from benchmarks.worker import Process
from exaone_export.benchmark.traffic import cache_bytes_per_token, weight_bytes_per_token
from model.bundle import read_manifest
from model.config import VisionConfig, load_config

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """What a figure is held to. `met` is None where it was not measured on a GPU."""

    what: str
    value: float
    goal: str
    met: bool | None


@dataclass
class Result:
    """What a part gives."""

    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """What all parts share.

    Attributes:
        models: to measure.
        shapes: "1.2b", "33b".
        prompts: lengths of prompts.
        new: tokens to decode.
        rounds: of interleaved measurements, after one that warms up.
    """

    models: Models
    shapes: Sequence[str]
    prompts: Sequence[int]
    new: int
    rounds: int

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return self.models.device

    def ours(self, bundle: Path, *, graph: str | None = None, images: bool = False) -> Process:
        """A process with a bundle."""
        return self._process("ours", bundle, {"graph": graph, "images": images})

    def torch(self, checkpoint: Path, dtype: str, *, random: bool | None = False) -> Process:
        """A process with PyTorch."""
        return self._process("torch", checkpoint, {"dtype": dtype, "random": random})

    def goal(self, what: str, value: float, at_least: float) -> Goal:
        """A figure that may not be smaller."""
        return Goal(what, value, f">= {at_least:g}", value >= at_least if self.device == "cuda" else None)

    def _process(self, kind: str, model: Path, options: dict[str, Any]) -> Process:
        print(f"loading {kind} {model.name} {options}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.cuda_worker", kind, str(model), self.device, json.dumps(options)]
        return Process(command, self.models.work / "logs" / f"{kind}-{model.name}.log")


def roofs(bench: Bench) -> dict[str, float]:
    """What the device can do at most: bytes copied and operations a second."""
    tiny = bench.models.tiny
    with bench.torch(bench.models.work, "bf16", random=None) as process:
        copied = process.ask({"call": "copy", "size": 1 << (20 if tiny else 32)})
        multiplied = process.ask({"call": "multiply", "side": 64 if tiny else 8192})
    return {"copy": copied["bytes_per_s"], "multiply": multiplied["flops_per_s"]}


def in_turns(bench: Bench, runs: dict[str, Callable[[], Row]]) -> dict[str, list[Row]]:
    """Every run once to warm up, then all in turns; the rounds of each."""
    for run in runs.values():
        run()
    found: dict[str, list[Row]] = {name: [] for name in runs}
    for _ in range(bench.rounds):
        for name, run in runs.items():
            found[name].append(run())
    return found


def cosines(left: Any, right: Any) -> Any:
    """Of the rows of two arrays, in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def vision_flops(vision: VisionConfig, patches: int) -> float:
    """Operations of encoding so many patches of one image: products and attention, two for each multiplication."""
    hidden, inner, unit = vision.hidden_size, vision.intermediate_size, vision.spatial_merge_size**2
    head = hidden // vision.num_heads
    projected = hidden * (2 * hidden + 2 * vision.num_kv_heads * head) + 3 * hidden * inner
    whole = len(vision.fullatt_block_indexes)
    seen = whole * patches + (vision.depth - whole) * vision.window_side**2
    merged = (unit * hidden) ** 2 + unit * hidden * vision.out_hidden_size
    each = vision.patch_dim * hidden + vision.depth * projected + 2 * hidden * seen + merged / unit
    return 2.0 * patches * each


def read_per_token(bundle: Path, depth: int) -> tuple[int, int]:
    """Bytes that one token reads: of weights, and with keys and values."""
    manifest, config = read_manifest(bundle), load_config(bundle)
    weights = weight_bytes_per_token(bundle, manifest)
    return weights, weights + cache_bytes_per_token(manifest, config.text.cached_window, depth)
