"""Greedy tokens by stock onnxruntime-genai; run with the Python of an environment that has it, by test_genai.py.

    python genai_worker.py BUNDLE CASES.json

CASES.json lists {"ids": [...], "new": N, "patches": FILE.npz or null}; on its output comes the list of their tokens.
It imports nothing of the project.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def main(bundle: str, cases: Path) -> None:
    og: Any = import_module("onnxruntime_genai")
    model = og.Model(bundle)
    answers = []
    for case in json.loads(cases.read_text()):
        ids = case["ids"]
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=len(ids) + case["new"], do_sample=False)
        generator = og.Generator(model, options)
        if case["patches"] is None:
            generator.append_tokens(np.array(ids, np.int32))
        else:
            tensors = og.NamedTensors()
            for name, value in np.load(case["patches"]).items():
                tensors[name] = value
            tensors["input_ids"] = np.array([ids], np.int32)
            generator.set_inputs(tensors)
        while not generator.is_done():
            generator.generate_next_token()
        answers.append([int(token) for token in generator.get_sequence(0)[len(ids) :]])
    foreign = [name for name in ("runtime", "model", "exaone_export", "torch", "transformers") if name in sys.modules]
    print(json.dumps({"answers": answers, "version": version("onnxruntime-genai"), "foreign": foreign}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
