"""All methods and recipes on the demonstration checkpoint, beside onnxruntime's own quantizers and llama.cpp's.

    python -m benchmarks.quality --formats 32a 32s 128a 128s --asked 2000 --out FILE
    python -m benchmarks.quality --formats 8:64s 8:32s 8:16s --methods rtn search
    python -m benchmarks.quality --recipes int8 int4 int8-dynamic int4-edge int4-quality --asked 2000
    python -m benchmarks.quality --llama ENVS/llama/bin/python --asked 2000

Every method quantizes the same weights, those of the decoder with its head, in the same blocks; the rest stays float.
onnxruntime's quantizers are put in the place of a method of ours, so their codes run through the same graphs and
kernels; its HQQ has float zero points, which the fast kernel does not take, and is computed in PyTorch. llama.cpp
quantizes the same weights by its own rules and runs them itself (`benchmarks/quality_llama.py`). Told is the KL
divergence from the float model on answers to held-out tasks (teacher forced) and on `verify`'s built-in prompts, on
request what rounding weights alone costs of the latter (the bundle's weights in PyTorch; the rest is the kernel's
rounding of activations), and how many of so many answers to each task are right to the letter, with the 95 % interval
and what that is against the float model, which is asked the same, with its standard error.

A method with "+" is calibrated on the set that comes with the package, where it needs one; with "+t" on exercises of
the kind that the checkpoint was trained on. Neither set has any of what is scored. With --out, rows that are in the
file already are not measured again. The demonstration checkpoint is not LG's EXAONE: ratios between rows mean
something, their level does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import exaone_export as ee
from benchmarks.methods import bits_per_weight
from benchmarks.ort_quantizers import KINDS, hqq_weight, onnxruntime_method
from benchmarks.quality_bench import Bench, Row
from benchmarks.quality_llama import F32, TYPES, Llama
from exaone_export.demo import checkpoint_folder
from exaone_export.verifying.accuracy import TASKS
from model.bundle import file_sha256
from quantize import methods as registry
from quantize.recipe import Recipe, Rule, load_recipe
from quantize.scheme import Scheme
from runtime.graphs import Graphs

OURS = ("rtn", "search", "hqq", "gptq+", "awq+", "awq-gptq+", "gptq+t")
THEIRS = tuple(f"ort-{kind}" for kind in (*KINDS, "hqq"))
FLOAT = "float"
HEAD = ("method", "format", "bits", "KLD of answers", "same top, %", "KLD of prompts", "same top, %")
# Name and format of a row, and what measures it.
Work = tuple[str, str, Callable[[], Row]]


def float_row(bench: Bench) -> Row:
    """The float bundle, which the answers of all others are held against; it has to come first."""
    run = bench.bundle(bench.float_graphs, images=False)
    answers = bench.quality(run, bench.answers, answers=True)
    return Row(FLOAT, "–", 32, answers, bench.quality(run, bench.prompts, answers=False), None,
               bench.exact(run, images=False))  # fmt: skip


def bundle_row(bench: Bench, name: str, label: str, recipe: Recipe, bits: float | None = None) -> Row:
    """Makes a bundle and measures it; `name` says whether it is calibrated, and on what."""
    out, (_, plus, set_) = bench.work / "bundle", name.partition("+")
    if plus or recipe.calibrated_rule is not None:
        given = bench.calibration if set_ else None
        report = ee.export(bench.source, out, quantize=recipe, force=True, calibration=given)
    else:
        report = ee.quantize(bench.work / "float", out, recipe=recipe, force=True)
    graphs = Graphs(out)
    images = any(path.startswith("vision_encoder") for path in bench.stored(graphs))
    run = bench.bundle(graphs, images=images)
    row = Row(
        name, label, bits or report.bits_per_weight, bench.quality(run, bench.answers, answers=True),
        bench.quality(run, bench.prompts, answers=False), None, bench.exact(run, images=images),
    )  # fmt: skip
    graphs.close()
    return row


def weights_alone(bench: Bench) -> float:
    """Mean KLD on the built-in prompts with the last bundle's decoder computed in float."""
    graphs = Graphs(bench.work / "bundle")
    with bench.replaced({path: w for path, w in bench.stored(graphs).items() if path.startswith("decoder.")}):
        return bench.quality(bench.eager, bench.prompts, answers=False).mean_kld


def eager_row(bench: Bench, name: str, label: str, weights: Callable[[npt.NDArray[np.float32]], Any]) -> Row:
    """The same of weights that no bundle can hold."""
    state = bench.model.decoder.state_dict()
    new = {f"decoder.{key.removesuffix('.weight')}": weights(v.numpy()) for key, v in state.items() if v.dim() == 2}
    with bench.replaced(new):
        answers = bench.quality(bench.eager, bench.answers, answers=True)
        prompts = bench.quality(bench.eager, bench.prompts, answers=False)
        exact = bench.exact(bench.eager, images=False)
    return Row(name, label, bits_per_weight(scheme_of(label)), answers, prompts, prompts.mean_kld, exact)


def scheme_of(text: str) -> Scheme:
    """A format such as 32a (4 bits, blocks of 32, asymmetric) or 8:64s."""
    bits, _, rest = text.rpartition(":")
    return Scheme(int(bits or 4), int(rest[:-1]), symmetric=rest[-1] == "s")


def methods(bench: Bench, formats: list[str], names: list[str], alone: bool) -> Iterator[Work]:
    """Every method in every format."""
    for kind in KINDS:
        for table, value in ((registry.METHODS, onnxruntime_method(kind)), (registry.NEEDS, registry.NOTHING)):
            table[f"ort-{kind}"] = value  # type: ignore[index]
        registry.USES[f"ort-{kind}"] = registry.NOTHING  # type: ignore[index]

    def measured(name: str, label: str, scheme: Scheme) -> Row:
        rule = Rule("decoder.*", replace(scheme, method=name.partition("+")[0]))
        row = bundle_row(bench, name, label, Recipe(name, (rule,)), bits_per_weight(scheme))
        return replace(row, weights_alone=weights_alone(bench)) if alone else row

    for text in formats:
        scheme = scheme_of(text)
        zero_points = not scheme.symmetric and scheme.bits == 4
        for name in names:
            if name in ("ort-k_quant", "ort-hqq") and not zero_points:
                continue
            if name == "ort-hqq":
                yield name, text, lambda t=text, s=scheme: eager_row(bench, "ort-hqq", t, lambda w: hqq_weight(w, s))  # type: ignore[misc]
            else:
                yield name, text, lambda n=name, t=text, s=scheme: measured(n, t, s)  # type: ignore[misc]


def recipes(bench: Bench, names: list[str]) -> Iterator[Work]:
    """Every recipe; of a file, its name."""
    for name in names:
        recipe = load_recipe(name)
        yield recipe.name, "recipe", lambda r=recipe: bundle_row(bench, r.name, "recipe", r)  # type: ignore[misc]


def llamas(bench: Bench, python: Path | None) -> Iterator[Work]:
    """llama.cpp's types, and its float32, which shows how much of the distance is not rounding."""
    if python is None:
        return
    llama = Llama(bench, python)
    for kind in (F32, *TYPES):
        yield f"llama-{kind}", "its own", lambda k=kind: llama.row(k)  # type: ignore[misc]


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [row["name"], row["format"], f"{row['bits_per_weight']:.2f}"]
    for part in (row["answers"], row["prompts"]):
        cells += [
            f"{part['mean_kld']:.5f} ± {part['standard_errors']['mean_kld']:.5f}",
            f"{100 * part['same_top']:.2f}",
        ]
    cells.append("–" if row["weights_alone"] is None else f"{row['weights_alone']:.5f}")
    if (exact := row["exact"]) is None:
        return f"| {' | '.join([*cells, '–', '–', '–'])} |"
    low, high = exact["interval_95"]
    cells.append(f"{100 * exact['share']:.2f} ({100 * low:.2f}–{100 * high:.2f})")
    cells.append(f"{exact['points']:+.2f} ± {exact['error']:.2f}")
    cells.append(" · ".join(f"{task} {100 * share:.2f}" for task, share in exact["tasks"].items()))
    return f"| {' | '.join(cells)} |"


def measure(works: Iterator[Work], key: dict[str, Any], out: Path | None) -> None:
    """Prints a row for each, measured or from the file, and adds it there."""
    texts = [] if out is None or not out.exists() else out.read_text().splitlines()
    known = {_mark(row, key): row for row in map(json.loads, texts)}
    for name, label, work in works:
        mark = _mark({"name": name, "format": label} | key, key)
        row = known.get(mark)
        if row is None or name == FLOAT:
            row = asdict(work()) | key
            if out is not None and mark not in known:
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)


def _mark(row: dict[str, Any], key: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row of the file from others."""
    return tuple(str(row.get(part)) for part in ("name", "format", *key))


def main() -> None:
    """Prints a table's rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=checkpoint_folder())
    parser.add_argument("--formats", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=[*OURS, *THEIRS])
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="what the checkpoint was trained for")
    parser.add_argument("--llama", type=Path, help="Python of an environment with llama_cpp and gguf")
    parser.add_argument(
        "--count", type=int, default=150, help="samples of each task whose answers' logits are compared"
    )
    parser.add_argument("--asked", type=int, default=0, help="samples of each task whose answers are to be right")
    parser.add_argument("--weights-alone", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="a JSON line for every row; those that are there are not measured again"
    )
    options = parser.parse_args()
    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    print(f"| {' | '.join((*HEAD, 'weights alone', 'exact, %', 'against float', 'by task, %'))} |", flush=True)
    sum_ = file_sha256(options.folder / "model.safetensors")
    key = {"checkpoint": sum_, "count": options.count, "asked": options.asked, "tasks": list(options.tasks)}
    with tempfile.TemporaryDirectory(prefix="exaone-quality-") as name:
        bench = Bench(options.folder, Path(name), options.count, options.asked, tuple(options.tasks))
        measure(iter([(FLOAT, "–", lambda: float_row(bench))]), key, options.out)
        measure(methods(bench, options.formats, options.methods, options.weights_alone), key, options.out)
        measure(recipes(bench, options.recipes), key, options.out)
        measure(llamas(bench, options.llama), key, options.out)


if __name__ == "__main__":
    main()
