"""All methods and recipes on the demonstration checkpoint, beside onnxruntime's own quantizers at equal bits.

    python -m benchmarks.quality --formats 32a 32s 128a 128s
    python -m benchmarks.quality --formats 8:64s 8:32s 8:16s --methods rtn search
    python -m benchmarks.quality --recipes int8 int4 int8-dynamic

Every method quantizes the same weights, those of the decoder with its head, in the same blocks; the rest stays float.
onnxruntime's quantizers are put in the place of a method of ours, so their codes run through the same graphs and
kernels; its HQQ has float zero points, which the fast kernel does not take, and is computed in PyTorch. Told is the
KL divergence from the float model on answers to held-out tasks (teacher forced) and on `verify`'s built-in prompts,
what rounding weights alone costs of the latter (the bundle's weights in PyTorch; the rest is the kernel's rounding of
activations), and how many answers are right to the letter.

llama.cpp's quantizers are not among them: its converter knows EXAONE 4's text model, not this checkpoint's tokenizer,
and its models of this architecture have no such vision encoder (`benchmarks/peers_gguf.py` writes random ones).

A method with "+" is calibrated on the set that comes with the package, where it needs one; with "+t" on exercises of
the kind that the checkpoint was trained on. Neither set has any of what is scored.
The demonstration checkpoint is not LG's EXAONE: ratios between rows mean something, their level does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

import exaone_export as ee
from benchmarks.ort_quantizers import KINDS, hqq_weight, onnxruntime_method
from exaone_export.demo import INSTRUCTION, checkpoint_folder
from exaone_export.demo.render import render_page
from exaone_export.demo.tasks import exercise
from exaone_export.quality import bundle_logits, eager_logits, scored_positions
from exaone_export.samples import Sample, load_samples
from exaone_export.verifying.accuracy import TASKS, measure_accuracy
from exaone_export.verifying.scores import Quality, compare, summed_up
from model.exaone import Exaone
from model.load import load_exaone
from model.progress import NullProgress
from quantize import methods as registry
from quantize.recipe import Recipe, Rule, load_recipe
from quantize.scheme import Scheme
from quantize.stored import stored_weights
from runtime.graphs import Graphs

OURS = ("rtn", "search", "hqq", "gptq+", "awq+", "awq-gptq+", "gptq+t")
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One method in one format, or one recipe.

    Attributes:
        name, format: of it.
        bits_per_weight: of the weights that it quantizes; of a recipe, of all.
        answers: figures on answers to held-out tasks.
        prompts: figures on the built-in prompts.
        weights_alone: the same mean KLD with the bundle's weights computed in float.
        exact: share of right answers with its 95 % interval, or None.
    """

    name: str
    format: str
    bits_per_weight: float
    answers: Quality
    prompts: Quality
    weights_alone: float
    exact: tuple[float, float, float] | None


class Bench:
    """The float model and what it is asked.

    Args:
        source: checkpoint.
        work: folder for bundles.
        count: samples of each task to score; of the answers for `exact`, `asked`.
    """

    def __init__(self, source: Path, work: Path, count: int, asked: int) -> None:
        self.source, self.work, self._asked = source, work, asked
        self.model: Exaone = load_exaone(source)
        ee.export(source, work / "float")
        self.calibration = _write(work, "calibration", 32, held_out=False)
        held_out = _write(work, "held-out", count, held_out=True)
        config = self.model.config
        self.answers = load_samples(work / "float", config, held_out)
        self.prompts = load_samples(work / "float", config, None)
        self._wanted = {id(s): eager_logits(self.model, s) for s in (*self.answers, *self.prompts)}

    def quality(self, logits: Callable[[Sample], Logits], samples: list[Sample], *, answers: bool) -> Quality:
        """Figures of logits against the float model's."""
        scores = []
        for sample in samples:
            positions = scored_positions(self.model, sample)
            if answers:
                positions = positions[positions >= len(sample.ids) - 1 - sample.answer_tokens]
            ids = np.array(sample.ids, np.int64)
            place = {"modality": sample.modality, "language": sample.language}
            scores.append((place, compare(logits(sample), self._wanted[id(sample)], ids, positions)))
        return summed_up(scores)

    def row(self, name: str, label: str, recipe: Recipe, bits: float | None = None) -> Row:
        """Makes a bundle and measures it; `name` says whether it is calibrated, and on what."""
        out, (_, plus, set_) = self.work / "bundle", name.partition("+")
        if plus:
            given = self.calibration if set_ else None
            report = ee.export(self.source, out, quantize=recipe, force=True, calibration=given)
        else:
            report = ee.quantize(self.work / "float", out, recipe=recipe, force=True)
        graphs = Graphs(out)
        answers = self.quality(lambda sample: bundle_logits(graphs, sample), self.answers, answers=True)
        prompts = self.quality(lambda sample: bundle_logits(graphs, sample), self.prompts, answers=False)
        exact = None
        if self._asked:
            tasks = measure_accuracy(graphs, NullProgress(), self._asked)
            exact = (tasks[0].exact, *tasks[0].interval_95)
        with self._weights_of(graphs):
            alone = self.quality(lambda sample: eager_logits(self.model, sample), self.prompts, answers=False)
        graphs.close()
        return Row(name, label, bits or report.bits_per_weight, answers, prompts, alone.mean_kld, exact)

    def eager_row(self, name: str, label: str, weights: Callable[[npt.NDArray[np.float32]], Any], bits: float) -> Row:
        """The same of weights that no bundle can hold."""
        state = self.model.decoder.state_dict()
        new = {
            f"decoder.{key.removesuffix('.weight')}": weights(value.numpy())
            for key, value in state.items()
            if value.dim() == 2
        }
        with self._replaced(new):
            answers = self.quality(lambda sample: eager_logits(self.model, sample), self.answers, answers=True)
            prompts = self.quality(lambda sample: eager_logits(self.model, sample), self.prompts, answers=False)
        return Row(name, label, bits, answers, prompts, prompts.mean_kld, None)

    def _weights_of(self, graphs: Graphs) -> Any:
        shapes = {
            name.removesuffix(".weight"): tuple(p.shape) for name, p in self.model.named_parameters() if p.dim() > 1
        }
        found = {}
        for graph in graphs.manifest.graphs:
            for stored in stored_weights(graph.name, ir.load(graphs.folder / graph.file).graph, shapes):
                found[stored.path] = stored.read(0, stored.shape[0])
        return self._replaced(found)

    @contextmanager
    def _replaced(self, weights: dict[str, npt.NDArray[np.float32]]) -> Iterator[None]:
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


def _write(folder: Path, name: str, count: int, *, held_out: bool) -> Path:
    """Exercises as a file of prompts; returns it."""
    rng, lines = Random(f"{name} 11"), []
    for task in TASKS:
        for i in range(count):
            work = exercise(rng, task, held_out)
            images = [f"{name}-{task}-{i}-{j}.png" for j in range(len(work.pages))]
            for image, page in zip(images, work.pages, strict=True):
                render_page(page).save(folder / image)
            prompt = INSTRUCTION if task == "line" else work.prompt
            parts = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
            talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": work.answer}]
            lines.append(json.dumps({"messages": talk, "images": images}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines))
    return path


def scheme_of(text: str) -> Scheme:
    """A format such as 32a (4 bits, blocks of 32, asymmetric) or 8:64s."""
    bits, _, rest = text.rpartition(":")
    return Scheme(int(bits or 4), int(rest[:-1]), symmetric=rest[-1] == "s")


def rows(bench: Bench, formats: list[str], names: list[str]) -> Iterator[Row]:
    """Every method in every format."""
    for kind in KINDS:
        for table, value in ((registry.METHODS, onnxruntime_method(kind)), (registry.NEEDS, registry.NOTHING)):
            table[f"ort-{kind}"] = value  # type: ignore[index]
        registry.USES[f"ort-{kind}"] = registry.NOTHING  # type: ignore[index]
    for text in formats:
        scheme = scheme_of(text)
        bits = scheme.bits + (32 + (0 if scheme.symmetric else scheme.bits)) / scheme.block_size
        for name in names:
            method = name.partition("+")[0]
            if name == "ort-k_quant" and (scheme.symmetric or scheme.bits != 4):
                continue
            if name == "ort-hqq":
                if not scheme.symmetric and scheme.bits == 4:
                    yield bench.eager_row(name, text, lambda w, s=scheme: hqq_weight(w, s), bits)  # type: ignore[misc]
                continue
            rules = (Rule("decoder.*", replace(scheme, method=method)),)
            yield bench.row(name, text, Recipe(name, rules), bits)


def line(row: Row) -> str:
    """A row of the table."""
    exact = "–" if row.exact is None else "{:.2f} ({:.2f}–{:.2f})".format(*(100 * share for share in row.exact))
    figures = [
        f"{part.mean_kld:.5f} ± {part.standard_errors['mean_kld']:.5f} | {100 * part.same_top:.2f}"
        for part in (row.answers, row.prompts)
    ]
    start = f"| {row.name} | {row.format} | {row.bits_per_weight:.2f}"
    return f"{start} | {' | '.join(figures)} | {row.weights_alone:.5f} | {exact} |"


def main() -> None:
    """Prints a table's rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=checkpoint_folder())
    parser.add_argument("--formats", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=[*OURS, *(f"ort-{kind}" for kind in (*KINDS, "hqq"))])
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--count", type=int, default=150, help="samples of each task whose answers are scored")
    parser.add_argument("--asked", type=int, default=0, help="samples that are answered freely, for exact answers")
    parser.add_argument("--out", type=Path, help="a JSON line for every row")
    options = parser.parse_args()
    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    figures = "KLD of answers | same top, % | KLD of prompts | same top, % | weights alone | exact, %"
    print(f"| method | format | bits | {figures} |")
    with tempfile.TemporaryDirectory(prefix="exaone-quality-") as name:
        bench = Bench(options.folder, Path(name), options.count, options.asked)
        found = rows(bench, options.formats, options.methods)
        recipes = (bench.row(r, "recipe", load_recipe(r)) for r in options.recipes)
        for source in (found, recipes):
            for row in source:
                print(line(row), flush=True)
                if options.out is not None:
                    with options.out.open("a") as file:
                        file.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
