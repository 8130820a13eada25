"""The vision encoder at its published shape: time, memory and agreement of a quantized bundle with the float one.

    python -m benchmarks.vision [FOLDER] [--depth 28] [--images 256 512 1024 8x224] [--recipes none int8-dynamic]

A random encoder of 28 blocks, width 2048, is exported to FOLDER (default: a temporary one, 10 GB) with each recipe.
Every bundle runs in a process of its own; all are open at the same time and take turns, so that a slow minute of the
machine meets all of them. An image is given as the side of a square in pixels; 8x224 is eight of them, encoded one by
one and together. `peak` is what a process takes at most beyond what it takes before the image.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import exaone_export as ee
from benchmarks.synthetic import MODELS
from tests.tiny import make_checkpoint

UNIT, PATCH = 28, 14
FLOAT = "none"
TASK = "image-feature-extraction"


@dataclass(frozen=True)
class Images:
    """So many square images of one size, in patches a side; the published preprocessing rounds to whole tokens."""

    count: int
    side: int

    @classmethod
    def parse(cls, text: str) -> Images:
        count, _, pixels = text.rpartition("x")
        return cls(int(count or 1), round(int(pixels) / UNIT) * (UNIT // PATCH))

    @property
    def patches(self) -> int:
        return self.count * self.side * self.side

    def __str__(self) -> str:
        size = f"{self.side * PATCH}x{self.side * PATCH}"
        return size if self.count == 1 else f"{self.count} of {size}"


@dataclass(frozen=True)
class Run:
    """What one encoding took: seconds, bytes beyond those before, and the file with its features."""

    seconds: float
    peak: int
    features: Path


class Worker:
    """A process that holds one bundle's encoder open."""

    def __init__(self, bundle: Path, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.vision", "--worker", str(bundle), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._result = bundle.with_suffix(".npy")

    def run(self, images: Images, together: bool = True) -> Run:
        """Encodes random pixels, the same in every process."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        asked = {"count": images.count, "side": images.side, "together": together, "result": str(self._result)}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the worker has died")
        answer = json.loads(line)
        return Run(answer["seconds"], answer["peak"], self._result)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def work(bundle: Path, threads: int) -> None:
    """Encodes what is asked for on standard input, one line each."""
    from runtime.graphs import Graphs

    graphs = Graphs(bundle, threads=threads)
    encode_images(graphs, Images(1, 8), True)  # so that what is only set up once is there before
    for line in sys.stdin:
        asked = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size so far
        before = memory("VmRSS")
        seconds, features = encode_images(graphs, Images(asked["count"], asked["side"]), asked["together"])
        np.save(asked["result"], features)
        print(json.dumps({"seconds": seconds, "peak": memory("VmHWM") - before}), flush=True)


def encode_images(graphs: Any, images: Images, together: bool) -> tuple[float, NDArray[Any]]:
    """Seconds, and the features of all images."""
    values = np.random.default_rng(1).standard_normal((images.patches, 3 * 2 * PATCH * PATCH), np.float32)
    grid = np.array([[1, images.side, images.side]] * images.count, np.int64)
    parts = 1 if together else images.count
    started = time.perf_counter()
    features = [
        graphs.encode(part, size, len(part) // 4)
        for part, size in zip(np.split(values, parts), np.split(grid, parts), strict=True)
    ]
    return time.perf_counter() - started, np.concatenate(features)


def memory(key: str) -> int:
    """Bytes of this process, as the kernel counts them."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key + ":"))


def export(folder: Path, depth: int, recipes: list[str]) -> dict[str, Path]:
    """The bundle of each recipe, made where it is not there yet."""
    source = folder / f"checkpoint-{depth}"
    published = MODELS["4.5-33b"]["vision_config"]
    if not source.exists():
        full = [block for block in published["fullatt_block_indexes"] if block < depth]
        vision = {**published, "depth": depth, "fullatt_block_indexes": full}
        text = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "hidden_size": vision["out_hidden_size"]}
        make_checkpoint(source, "vlm", dtype="bf16", draft=False, **text, vision=vision)
    bundles = {recipe: folder / f"vision-{depth}-{recipe}" for recipe in recipes}
    for recipe, bundle in bundles.items():
        if not bundle.exists():
            ee.export(source, bundle, quantize=recipe, task=TASK)
    return bundles


def cosine(one: Path, other: Path) -> tuple[float, float]:
    """Smallest and mean cosine of the image tokens of two runs."""
    a, b = np.load(one).astype(np.float64), np.load(other).astype(np.float64)
    found = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return float(found.min()), float(found.mean())


def rows(workers: dict[str, Worker], images: list[Images], rounds: int) -> Iterator[tuple[str, ...]]:
    """One row for each kind of image and recipe."""
    for kind in images:
        ways = (True, False) if kind.count > 1 else (True,)
        runs: dict[tuple[str, bool], list[Run]] = {}
        for _ in range(rounds):
            for recipe, worker in workers.items():
                for together in ways:
                    runs.setdefault((recipe, together), []).append(worker.run(kind, together))
        base = next(iter(runs))
        for key, found in runs.items():
            paired = [one.seconds / other.seconds for one, other in zip(runs[base], found, strict=True)]
            seconds = [run.seconds for run in found]
            smallest, mean = cosine(runs[base][-1].features, found[-1].features)
            yield (
                f"{kind}" + ("" if len(ways) == 1 else ", together" if key[1] else ", one by one"),
                f"{kind.patches}",
                key[0],
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})",
                f"{statistics.median(paired):.2f}",
                f"{max(run.peak for run in found) / 1e6:.0f}",
                f"{smallest:.5f} / {mean:.5f}",
            )


def main() -> None:
    """Exports, measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, default=28, help="blocks, of which every seventh sees the whole image")
    parser.add_argument("--images", nargs="+", type=Images.parse, default=["256", "512", "1024", "8x224"])
    parser.add_argument("--recipes", nargs="+", default=[FLOAT, "int8-dynamic"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.threads)
        return
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundles = export(folder, arguments.depth, arguments.recipes)
        if arguments.export_only:
            return
        workers = {}
        for recipe, bundle in bundles.items():
            workers[recipe] = Worker(bundle, arguments.threads)
            stack.callback(workers[recipe].close)
        images = [Images.parse(kind) if isinstance(kind, str) else kind for kind in arguments.images]
        print("| image | patches | recipe | s | times as fast | peak, MB | cosine, least / mean |\n|" + "---|" * 7)
        for row in rows(workers, images, arguments.rounds):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
