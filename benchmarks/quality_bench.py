"""What `quality.py` measures on: a float model, texts to compare logits on, and exercises with one right answer.

An answer is right if every token of it, and the end after it, is what the model likes best where all before are given:
then a greedy decoder writes it, and no other does. So one pass over prompt and answer tells as much as generating it
(but for answers that are spelled in other tokens, which count as wrong).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

import exaone_export as ee
from exaone_export.demo import INSTRUCTION
from exaone_export.demo.render import render_page
from exaone_export.demo.tasks import exercise
from exaone_export.quality import eager_logits, scored_positions
from exaone_export.samples import LONGEST, Sample, load_samples
from exaone_export.verifying.accuracy import wilson
from exaone_export.verifying.scores import Quality, compare, summed_up
from model.exaone import Exaone
from model.load import load_exaone
from quantize.stored import stored_weights
from runtime.graphs import Graphs

Logits = npt.NDArray[np.float32]
PART = 50  # exercises in a file: their images are in memory together


@dataclass(frozen=True)
class Item:
    """A text, the float encoder's features of its images [tokens, hidden], and of how many last positions to tell."""

    sample: Sample
    features: Logits | None
    kept: int


# Logits of the last positions of every text, [kept, vocabulary] each.
Run = Callable[[Iterable[Item]], Iterator[Logits]]


@dataclass(frozen=True)
class Exact:
    """Right answers: of how many, their share with its 95 % interval, and by task; and beside the float model's.

    Attributes:
        points, error: what the share gains on the float model's (both in 1/100), and the standard error of that: they
            are asked the same, so it is much smaller than the interval is wide.
    """

    asked: int
    share: float
    interval_95: tuple[float, float]
    tasks: dict[str, float]
    points: float
    error: float


@dataclass(frozen=True)
class Row:
    """One method in one format, or one recipe.

    Attributes:
        name, format: of it.
        bits_per_weight: of the weights that it quantizes, scales in 16 bits; of a recipe, of all, as they are stored.
        answers: figures on answers to held-out tasks.
        prompts: figures on the built-in prompts.
        weights_alone: the same mean KLD with the bundle's weights computed in float, or None.
        exact: right answers, or None.
    """

    name: str
    format: str
    bits_per_weight: float
    answers: Quality
    prompts: Quality
    weights_alone: float | None = None
    exact: Exact | None = None


@dataclass
class Bench:
    """The float model and what it is asked.

    Attributes:
        source: checkpoint.
        work: folder for bundles and exercises.
        count: answers of each task to compare logits on.
        asked: exercises of each task that are to be right.
        tasks: of `exaone_export.demo.tasks`, which the checkpoint was trained for.
    """

    source: Path
    work: Path
    count: int
    asked: int
    tasks: tuple[str, ...]
    calibration: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model: Exaone = load_exaone(self.source)
        ee.export(self.source, self.work / "float")
        self._float = Graphs(self.work / "float")
        (self.calibration,) = write(self.work, "calibration", self.tasks, 32, held_out=False)
        answers = [self._samples(path) for path in write(self.work, "held-out", self.tasks, self.count, held_out=True)]
        self.answers = [self._item(sample, sample.answer_tokens + 1) for part in answers for sample in part]
        self.prompts = [self._item(sample, len(sample.ids)) for sample in self._samples(None)]
        self._wanted = {
            id(item): eager_logits(self.model, item.sample)[-item.kept :] for item in (*self.answers, *self.prompts)
        }
        self._right: list[bool] = []
        self._parts: dict[Path, str] = {}
        self._plain: dict[Path, list[tuple[Sample, bool]]] = {}  # without images, and whether there are features
        for task in self.tasks if self.asked else ():
            parts = write(self.work, "asked", (task,), self.asked, held_out=True, part=PART)
            self._parts |= dict.fromkeys(parts, task)
        for path in self._parts:
            found = [self._item(sample, sample.answer_tokens + 1) for sample in self._samples(path)]
            np.savez(path.with_suffix(".npz"), *(item.features for item in found if item.features is not None))
            self._plain[path] = [(replace(item.sample, images=()), item.features is not None) for item in found]

    def quality(self, run: Run, items: list[Item], *, answers: bool) -> Quality:
        """Figures of logits against the float model's."""
        scores = []
        for item, logits in zip(items, run(items), strict=True):
            sample = item.sample
            ids = np.array(sample.ids, np.int64)[-item.kept :]
            positions = np.arange(item.kept - 1) if answers else scored_positions(self.model, sample)
            place = {"modality": sample.modality, "language": sample.language}
            scores.append((place, compare(logits, self._wanted[id(item)], ids, positions)))
        return summed_up(scores)

    def exact(self, run: Run, *, images: bool) -> Exact | None:
        """Right answers; `images` says whether `run` looks at them, or takes the features."""
        if not self.asked:
            return None
        marks: list[bool] = []
        tasks: dict[str, list[bool]] = {}
        ends = self._ends()
        for path, task in self._parts.items():
            items = list(self._asked_items(path, images))
            for item, logits in zip(items, run(items), strict=True):
                best = logits.argmax(-1)
                right = best[-1] in ends and bool(
                    (best[:-1] == item.sample.ids[len(item.sample.ids) - len(best) + 1 :]).all()
                )
                marks.append(right)
                tasks.setdefault(task, []).append(right)
        self._right = self._right or marks  # the float model comes first
        gained = [mark - before for mark, before in zip(marks, self._right, strict=True)]
        return Exact(
            len(marks), float(np.mean(marks)), wilson(sum(marks), len(marks)),
            {task: float(np.mean(found)) for task, found in tasks.items()},
            100 * float(np.mean(gained)), 100 * float(np.std(gained)) / math.sqrt(len(marks)),
        )  # fmt: skip

    def bundle(self, graphs: Graphs, *, images: bool) -> Run:
        """A bundle's logits; with `images`, by its own encoder."""

        def run(items: Iterable[Item]) -> Iterator[Logits]:
            for item in items:
                ids = np.array([item.sample.ids], np.int64)
                features = _encoded(graphs, item.sample) if images else item.features
                forward = graphs.forward(1, features, ids.shape[1])
                yield forward(ids, np.array([ids.shape[1]], np.int64), keep=item.kept)[0]

        return run

    def eager(self, items: Iterable[Item]) -> Iterator[Logits]:
        """The eager model's logits, with the float encoder's features."""
        for item in items:
            past, keep = self.model.decoder.empty_cache(1), torch.tensor([item.kept])
            with torch.inference_mode():
                given = self.embeddings(item)[None]
                yield self.model.decoder(given, torch.ones(given.shape[:2], dtype=torch.int64), past, keep)[0][
                    0
                ].numpy()

    def embeddings(self, item: Item) -> torch.Tensor:
        """What the decoder takes, [tokens, hidden]."""
        assert self.model.embedding is not None
        features = torch.zeros(0, self.model.config.text.hidden_size)
        if item.features is not None:
            features = torch.from_numpy(np.ascontiguousarray(item.features, np.float32))
        with torch.inference_mode():
            found: torch.Tensor = self.model.embedding(torch.tensor([item.sample.ids]), features)[0]
        return found

    def stored(self, graphs: Graphs) -> dict[str, npt.NDArray[np.float32]]:
        """Module path → the values that a bundle's weight stands for."""
        shapes = {
            name.removesuffix(".weight"): tuple(p.shape) for name, p in self.model.named_parameters() if p.dim() > 1
        }
        found = {}
        for graph in graphs.manifest.graphs:
            for stored in stored_weights(graph.name, ir.load(graphs.folder / graph.file).graph, shapes):
                found[stored.path] = stored.read(0, stored.shape[0])
        return found

    @contextmanager
    def replaced(self, weights: dict[str, npt.NDArray[np.float32]]) -> Iterator[None]:
        """The eager model with other weights, by module path."""
        kept = []
        for path, values in weights.items():
            parameter = self.model.get_parameter(f"{path}.weight")
            kept.append((parameter, parameter.data))
            parameter.data = torch.from_numpy(values).view(parameter.shape)
        try:
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    @property
    def float_graphs(self) -> Graphs:
        """The float bundle."""
        return self._float

    def _samples(self, path: Path | None) -> list[Sample]:
        return load_samples(self.work / "float", self.model.config, path)

    def _item(self, sample: Sample, kept: int) -> Item:
        if sample.answer_tokens and len(sample.ids) >= LONGEST:
            raise SystemExit(f"an exercise of {len(sample.ids)} tokens may have been cut")
        return Item(sample, _encoded(self._float, sample) if sample.images else None, kept)

    def _asked_items(self, path: Path, images: bool) -> Iterator[Item]:
        if images:
            yield from (Item(sample, None, sample.answer_tokens + 1) for sample in self._samples(path))
            return
        with np.load(path.with_suffix(".npz")) as stored:
            features = (stored[name] for name in stored.files)
            for sample, sees in self._plain[path]:
                yield Item(sample, next(features) if sees else None, sample.answer_tokens + 1)

    def _ends(self) -> frozenset[int]:
        text = json.loads((self.source / "generation_config.json").read_text())["eos_token_id"]
        return frozenset(text if isinstance(text, list) else [text])


def _encoded(graphs: Graphs, sample: Sample) -> Logits | None:
    if not sample.images or graphs.config.vision is None:
        return None
    merge = graphs.config.vision.spatial_merge_size**2
    found = [graphs.encode(pixels, grid, int(grid.prod()) // merge) for pixels, grid in sample.images]
    return np.concatenate(found).astype(np.float32)


def write(
    folder: Path, name: str, tasks: Iterable[str], count: int, *, held_out: bool, part: int | None = None
) -> list[Path]:
    """Exercises as files of prompts, so many of each task, `part` of them in a file or all; returns the files."""
    tasks = tuple(tasks)
    rng, lines = Random(f"{name} {'' if part is None else tasks[0]}11"), []
    for task in tasks:
        for i in range(count):
            work = exercise(rng, task, held_out)
            images = [f"{name}-{task}-{i}-{j}.png" for j in range(len(work.pages))]
            for image, page in zip(images, work.pages, strict=True):
                render_page(page).save(folder / image)
            prompt = INSTRUCTION if task == "line" else work.prompt
            parts = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
            talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": work.answer}]
            lines.append(json.dumps({"messages": talk, "images": images}))
    files = []
    for start in range(0, len(lines), part or len(lines)):
        files.append(folder / f"{name}-{'-'.join(tasks)}-{start}.jsonl")
        files[-1].write_text("\n".join(lines[start : start + (part or len(lines))]))
    return files
