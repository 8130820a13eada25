"""How well bundles of the demonstration checkpoint read: the product's own way, image file in, text out.

Exports the checkpoint as float and with every recipe, and lets each bundle read the same held-out lines through
`exaone_export.load`, with sizes and speed:

    python -m benchmarks.quality_demo --count 2000

The demonstration checkpoint is not LG's EXAONE: ratios between the rows mean something, their level does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

import exaone_export as ee
from benchmarks.reading import GREEDY, Line, held_out_lines, score
from exaone_export.demo import INSTRUCTION, checkpoint_folder
from quantize.recipe import SHIPPED, load_recipe

BATCH = 16


def read_all(engine: ee.Engine, lines: list[Line], batch: int) -> tuple[list[str], float]:
    """Answers in order, and decoded tokens per second."""
    answers: dict[int, str] = {}
    tokens, seconds = 0, 0.0
    # Prompts of one length share a pass without padding.
    order = sorted(range(len(lines)), key=lambda i: lines[i].image.shape)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        images = [[Image.fromarray(lines[i].image)] for i in part]
        begin = time.perf_counter()
        results = engine.generate([INSTRUCTION] * len(part), images=images, **GREEDY)
        seconds += time.perf_counter() - begin
        for i, result in zip(part, results, strict=True):
            answers[i] = result.text.strip()
            tokens += len(result.token_ids)
    return [answers[i] for i in range(len(lines))], tokens / seconds


def measure(folder: Path, report: Any, lines: list[Line], batch: int) -> dict[str, object]:
    """One row of the table."""
    with ee.load(folder) as engine:
        assert isinstance(engine, ee.Engine)
        answers, speed = read_all(engine, lines, batch)
    figures = score(lines, answers)
    return {
        "recipe": report.recipe,
        **{key: figures[key] for key in ("lines", "exact", "interval_95", "character_error_rate")},
        "bytes": report.bytes,
        "bits_per_weight": report.bits_per_weight,
        "tokens_per_s": speed,
    }


def main() -> None:
    """Prints one JSON object per bundle, then the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--folder", type=Path, default=checkpoint_folder())
    options = parser.parse_args()
    lines = list(held_out_lines(options.count, options.seed))
    rows = []
    with tempfile.TemporaryDirectory(prefix="exaone-quality-") as name:
        parent = Path(name)
        report = ee.export(options.folder, parent / "none")
        rows.append(measure(parent / "none", report, lines, options.batch))
        print(json.dumps(rows[-1]))
        for recipe in SHIPPED:
            if load_recipe(recipe).calibrated_rule is None:
                report = ee.quantize(parent / "none", parent / recipe, recipe=recipe)
            else:
                report = ee.export(options.folder, parent / recipe, quantize=recipe)
            rows.append(measure(parent / recipe, report, lines, options.batch))
            print(json.dumps(rows[-1]))
    for row in rows:
        low, high = row["interval_95"]  # type: ignore[misc]
        print(
            f"| {row['recipe']} | {row['bytes'] / 1e6:.1f} | {row['bits_per_weight']:.2f} "  # type: ignore[operator]
            f"| {100 * row['exact']:.1f} ({100 * low:.1f}–{100 * high:.1f}) "  # type: ignore[operator, has-type]
            f"| {100 * row['character_error_rate']:.2f} | {row['tokens_per_s']:.0f} |"  # type: ignore[operator]
        )


if __name__ == "__main__":
    main()
