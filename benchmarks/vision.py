"""The vision encoder at its published shape: time, memory and agreement of a quantized bundle with the float one.

    python -m benchmarks.vision [FOLDER] [--depth 28] [--images 256 512 1024 8x224] [--recipes none int8-dynamic]
    python -m benchmarks.vision FOLDER --images 1024 --rounds 1 --runs FILE      # adds a round to those in FILE

A random encoder of 28 blocks, width 2048, is exported to FOLDER (default: a temporary one, 10 GB) with each recipe.
Every bundle runs in a process of its own; all are open at the same time and take turns, so that a slow minute of the
machine meets all of them. An image is given as the side of a square in pixels; 8x224 is eight of them, encoded one by
one and together. `beyond, MB` is what a process takes at most beyond what it takes before the image, `process, MB` its
largest size ever, loading included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import exaone_export as ee
from benchmarks.synthetic import MODELS
from benchmarks.worker import Process
from tests.tiny import make_config, make_tensors, save_tensors, write_assets

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
    """One encoding.

    Attributes:
        images, encoder: what was encoded, and by whom.
        patches: of all images.
        seconds: of the encoder alone.
        weights: bytes of its file of weights.
        grown, most: bytes of the process, see `vision_worker.py`.
        least, mean: cosine of an image token with that of the round's first encoder.
    """

    images: str
    patches: int
    encoder: str
    seconds: float
    weights: int
    grown: int
    most: int
    least: float
    mean: float


class Worker(Process):
    """A process of `vision_worker.py` that holds one encoder open; a context manager.

    Args:
        kind: as it calls it.
        model: a bundle, or the folder of llama.cpp's files.
        threads: for the encoder.
        python: of the environment.
    """

    def __init__(self, kind: str, model: Path, threads: int, python: Path = Path(sys.executable)) -> None:
        self._result = model.with_suffix(".npy")
        self.weights = sum(path.stat().st_size for pattern in ("*.data", "mmproj.gguf") for path in model.glob(pattern))
        command = [str(python), "-m", "benchmarks.vision_worker", kind]
        command += [str(model.resolve()), str(threads), str(self._result.resolve())]
        log = model.with_suffix(".log")
        log.unlink(missing_ok=True)
        super().__init__(command, log)

    def run(self, images: Images, together: bool = True) -> dict[str, Any]:
        """Encodes noise, the same in every process; its features, float32 [tokens, hidden], are among the answers."""
        asked = {"count": images.count, "side": images.side * PATCH, "together": together}
        return self.ask(asked) | {"features": np.load(self._result)}


def make_checkpoint(folder: Path, depth: int) -> Path:
    """A random checkpoint of the published encoder with so many blocks, and a text model of no account.

    Matrices keep the size of what goes through them, as those of trained models roughly do: with the larger ones of
    the tests, every block enlarges the error of all before it.
    """
    published = MODELS["4.5-33b"]["vision_config"]
    full = [block for block in published["fullatt_block_indexes"] if block < depth]
    vision = {**published, "depth": depth, "fullatt_block_indexes": full}
    text = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "hidden_size": vision["out_hidden_size"]}
    config = make_config("vlm", **text, vision=vision)
    tensors = make_tensors(config, draft=False, dtype="bf16")
    for tensor in tensors.values():
        if tensor.ndim > 1:
            tensor *= tensor.dtype.type(2 / 3)
    folder.mkdir(parents=True)
    save_tensors(folder, tensors)
    write_assets(folder, vision=True)
    bounds = {"min_pixels": 4 * UNIT**2, "max_pixels": 4096 * UNIT**2}
    pixels = folder / "preprocessor_config.json"
    pixels.write_text(json.dumps(json.loads(pixels.read_text()) | bounds))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def export(folder: Path, depth: int, recipes: Iterable[str]) -> dict[str, Path]:
    """The bundle of each recipe, made where it is not there yet."""
    source = folder / f"checkpoint-{depth}"
    if not source.exists():
        make_checkpoint(source, depth)
    bundles = {recipe: folder / f"vision-{depth}-{recipe}" for recipe in recipes}
    for recipe, bundle in bundles.items():
        if not bundle.exists():
            ee.export(source, bundle, quantize=recipe, task=TASK)
    return bundles


def measure(workers: dict[str, Worker], images: Sequence[Images], rounds: int) -> Iterator[Run]:
    """Every encoder in turn, for every kind of images and every round."""
    for _ in range(rounds):
        for kind in images:
            for together in (True, False) if kind.count > 1 else (True,):
                label = f"{kind}" + ("" if kind.count == 1 else ", together" if together else ", one by one")
                first = None
                for name, worker in workers.items():
                    found = worker.run(kind, together)
                    features = found["features"].astype(np.float64)
                    first = features if first is None else first
                    cosines = (features * first).sum(1) / np.sqrt((features**2).sum(1) * (first**2).sum(1))
                    yield Run(
                        label, kind.patches, name, found["seconds"], worker.weights, found["grown"], found["most"],
                        float(cosines.min()), float(cosines.mean()),
                    )  # fmt: skip


def table(runs: Sequence[Run], bases: Sequence[str]) -> str:
    """One row for each kind of images and encoder; ratios to the bases are of one round."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.images, run.encoder), []).append(run)
    over = [f"times as fast as {base}" for base in bases]
    head = ["image", "patches", "encoder", "s", *over, "weights, MB", "beyond, MB", "process, MB"]
    head.append("cosine, least / mean")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (images, encoder), mine in found.items():
        cells = [images, str(mine[0].patches), encoder, spread([run.seconds for run in mine])]
        for base in bases:
            pairs = zip(found.get((images, base), []), mine, strict=False)
            cells.append(spread([theirs.seconds / run.seconds for theirs, run in pairs]))
        sizes = (mine[0].weights, max(run.grown for run in mine), max(run.most for run in mine))
        cells += [f"{size / 1e6:.0f}" for size in sizes]
        cells.append(f"{min(run.least for run in mine):.5f} / {statistics.mean(run.mean for run in mine):.5f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Median (least–most)."""
    if not values:
        return "–"
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def kept(file: Path | None) -> list[Run]:
    """The runs that are in a file."""
    if file is None or not file.exists():
        return []
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()]


def report(runs: Iterator[Run], bases: Sequence[str], file: Path | None) -> None:
    """Adds new runs to those in the file, and prints a table of all."""
    every = kept(file)
    for run in runs:
        every.append(run)
        print(f"{run.images}: {run.encoder} {run.seconds:.1f} s", file=sys.stderr, flush=True)
        if file is not None:
            with file.open("a") as stream:
                stream.write(json.dumps(asdict(run)) + "\n")
    print(table(every, bases))


def options(parser: argparse.ArgumentParser, images: list[str]) -> None:
    """What the scripts about the encoder have in common."""
    parser.add_argument("--depth", type=int, default=28, help="blocks, of which every seventh sees the whole image")
    parser.add_argument("--images", nargs="+", type=Images.parse, default=[Images.parse(text) for text in images])
    parser.add_argument("--recipes", nargs="*", default=[FLOAT, "int8-dynamic"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, help="a file of runs that count as well, and to which new ones are added")
    parser.add_argument("--export-only", action="store_true")


def main() -> None:
    """Exports, measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    options(parser, ["256", "512", "1024", "8x224"])
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundles = export(folder, arguments.depth, arguments.recipes)
        if arguments.export_only:
            return
        workers = {
            recipe: stack.enter_context(Worker("ours", bundle, arguments.threads)) for recipe, bundle in bundles.items()
        }
        report(measure(workers, arguments.images, arguments.rounds), arguments.recipes[:1], arguments.runs)


if __name__ == "__main__":
    main()
