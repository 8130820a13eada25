"""The memory that `inspect` predicts for running a bundle, against what it really takes.

    python -m benchmarks.running_memory [FOLDER] [--contexts 512 4096 16384]

Random models of some hundred MB are exported to FOLDER (default: a temporary one) and each read a prompt of so many
tokens, the multimodal one with an image first, in a process of its own whose largest resident size counts. One thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exaone_export as ee
from tests.tiny import make_checkpoint

RECIPES = ("none", "int8", "int4")
TEXT: dict[str, Any] = {
    "vocab_size": 50000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "sliding_window": 1024,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
    "max_position_embeddings": 32768,
}
VISION: dict[str, Any] = {
    "depth": 6,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_heads": 8,
    "num_key_value_heads": 2,
    "fullatt_block_indexes": [2, 5],
    "out_hidden_size": 1024,
}
SIDE, UNIT = 1120, 28  # pixels of the largest image, and of one of its tokens
KINDS: dict[str, dict[str, Any]] = {"hybrid": TEXT, "vlm": TEXT | {"vision": VISION}}

CHILD = """
import sys
from pathlib import Path
import numpy as np
import exaone_export
from PIL import Image
from runtime import decode
from runtime.engine import Engine

folder, count, side = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with Engine.load(folder, threads=1) as engine:
    engine.open()
    if side:
        values, grid = engine.requests.image_processor(Image.new("RGB", (side, side)))
        engine.graphs.encode(values, grid, len(values) // 4)
    ids = np.random.default_rng(0).integers(100, 500, count)
    decode.prefill(engine.graphs.forward(1, None, count), [ids])
status = Path("/proc/self/status").read_text()
print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")))
"""


def main() -> None:
    """Measures and prints one row for each bundle and context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 4096, 16384])
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print("| model | recipe | tokens | predicted, MB | measured, MB | error, % |\n|---|---|---|---|---|---|")
        for row in rows(folder, arguments.contexts):
            print("| " + " | ".join(row) + " |", flush=True)


def rows(folder: Path, contexts: list[int]) -> Iterator[tuple[str, ...]]:
    """One row of the table after the other."""
    for kind, shape in KINDS.items():
        source = folder / kind
        if not source.exists():
            make_checkpoint(source, kind, dtype="bf16", **shape)
            path = source / "preprocessor_config.json"
            if path.exists():
                path.write_text(json.dumps(json.loads(path.read_text()) | {"max_pixels": SIDE * SIDE}))
        for recipe in RECIPES:
            bundle = folder / f"{kind}-{recipe}"
            if not bundle.exists():
                ee.export(source, bundle, quantize=recipe)
            for count in contexts:
                predicted = ee.inspect(bundle, context=count).memory_bytes[count]
                side = min(SIDE, UNIT * math.isqrt(count)) if kind == "vlm" else 0
                measured = peak(bundle, count, side)
                error = 100 * (predicted / measured - 1)
                yield kind, recipe, f"{count}", f"{predicted / 1e6:.0f}", f"{measured / 1e6:.0f}", f"{error:+.1f}"


def peak(bundle: Path, count: int, side: int) -> int:
    """Largest resident size of a process that opens a bundle and reads an image and a prompt."""
    command = [sys.executable, "-c", CHILD, str(bundle), str(count), str(side)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
