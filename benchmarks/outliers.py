"""Whether rounding activations changes the answers of a model with massive activations.

    python -m benchmarks.outliers          # a tiny random model and the demonstration checkpoint, a minute each

Some channels before down_proj are made 2^8 times as large, the function staying the same (`tests/outliers.py`). Bundles
of several recipes then run the same texts three times: as they are, where the kernel rounds activations to 8 bits,
a block or a row at a time; with the same weights and exact activations; and as the float bundle. The table has how
often the most likely token is another one.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import exaone_export as ee
from exaone_export.demo import checkpoint_folder
from exaone_export.samples import Sample, load_samples
from model.config import load_config
from runtime.engine import Engine
from tests import outliers, tiny

RECIPE = """
name = "int{bits}-{block}"
[[rule]]
match = "*.down_proj"
bits = {bits}
block_size = {block}
[[rule]]
match = "decoder.layers.*"
bits = {bits}
block_size = {block}
"""
SCHEMES = ((4, 32), (4, 128), (8, 32), (8, 128))
Logits = NDArray[np.float32]


def logits(bundle: Path, samples: Sequence[Sample]) -> Logits:
    """Of every position of every text."""
    engine = Engine.load(bundle, "cpu")
    with engine:
        return np.concatenate([engine.logits(sample.ids) for sample in samples])


def divergence(given: Logits, wanted: Logits) -> float:
    """Mean KL divergence of `given` from `wanted`, in nats."""
    q, p = (_log_softmax(values.astype(np.float64)) for values in (given, wanted))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    values = values - values.max(-1, keepdims=True)
    shifted: NDArray[np.float64] = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return shifted


def changed(given: Logits, wanted: Logits) -> str:
    """How often the most likely token is another one, and the mean divergence."""
    share = (given.argmax(-1) != wanted.argmax(-1)).mean()
    return f"{100 * share:.1f} % ({divergence(given, wanted):.2g})"


def measure(checkpoint: Path, work: Path) -> list[list[str]]:
    """Rows of the table: the recipe, and how often answers change."""
    work.mkdir()
    ee.export(checkpoint, work / "float")
    config = load_config(work / "float")
    samples = [sample for sample in load_samples(work / "float", config, None) if not sample.images]
    wanted = logits(work / "float", samples)
    rows = [["float", f"{len(wanted)} positions", "", "", ""]]
    for bits, block in SCHEMES:
        recipe = work / f"{bits}-{block}.toml"
        recipe.write_text(RECIPE.format(bits=bits, block=block))
        rounded = work / recipe.stem
        ee.quantize(work / "float", rounded, recipe=str(recipe))
        given = logits(rounded, samples)
        exact = logits(outliers.rewrite(rounded, work / "exact", outliers.exact_activations), samples)
        whole = logits(outliers.rewrite(rounded, work / "whole", outliers.whole_tensor_activations), samples)
        shutil.rmtree(work / "exact")
        shutil.rmtree(work / "whole")
        pairs = ((exact, wanted), (given, wanted), (given, exact), (whole, exact))
        rows.append([f"int{bits}, blocks of {block}", *(changed(*pair) for pair in pairs)])
    ee.quantize(work / "float", work / "dynamic", recipe="int8-dynamic")
    rows.append(["int8-dynamic", "", changed(logits(work / "dynamic", samples), wanted), "", ""])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--exponents", type=int, nargs="+", default=[0, 5, 8], help="of 2; 0 for no outliers")
    parser.add_argument("--channels", type=int, default=4, help="of each layer")
    options = parser.parse_args()
    head = ["", "weights", "weights and activations", "activations", "activations, one scale for all"]
    print(f"| model | outliers | {' | '.join(head)} |\n|{'---|' * (len(head) + 2)}")
    with tempfile.TemporaryDirectory(prefix="exaone-outliers-") as name:
        work = Path(name)
        sources = {"demonstration": checkpoint_folder(), "random": tiny.make_checkpoint(work / "tiny", "dense")}
        for model, source in sources.items():
            for exponent in options.exponents:
                place = work / f"{model}-{exponent}"
                spiked = outliers.write_checkpoint(source, place / "source", exponent, options.channels)
                for row in measure(spiked, place / "bundles"):
                    print(f"| {model} | 2^{exponent} | {' | '.join(row)} |", flush=True)
                shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
