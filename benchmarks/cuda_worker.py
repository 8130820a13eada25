"""The process that runs one model on one device; started by `cuda.py`.

    python -m benchmarks.cuda_worker KIND MODEL DEVICE OPTIONS      # KIND: ours, torch; OPTIONS: JSON

It loads the model, says so, and answers each line {"call": NAME, ...} on its standard input by a line. Both kinds have
the calls run (a prompt of random ids, and tokens after it), encode (an image of noise), logits and greedy; "torch" also
copies and multiplies, for the roofs that the others are measured against.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Answer = dict[str, Any]
_SPECIAL = 100  # ids below are special tokens or placeholders, in every shape


def random_ids(count: int, vocabulary: int, seed: int) -> list[int]:
    """Ids [count] that mean nothing special, the same in every process."""
    return [int(token) for token in np.random.default_rng(seed).integers(_SPECIAL, vocabulary, count)]


def noise(side: int) -> NDArray[np.uint8]:
    """A square image, the same in every process."""
    return np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)


class Ours:
    """A bundle through this project's runtime.

    Args:
        model: the bundle.
        device: "cuda" or "cpu".
        graph: "on" or "off": CUDA graphs; None leaves it to the runtime.
        images: whether to open the vision encoder.
    """

    def __init__(self, model: Path, device: str, graph: str | None = None, images: bool = False) -> None:
        import exaone_export as ee

        options: dict[str, Any] = {"cuda_graph": graph} if device == "cuda" and graph is not None else {}
        self._engine: Any = ee.load(model, ep=device, **options)
        self._engine.graphs.open(images=images)
        self._vocabulary = self._engine.graphs.config.text.vocab_size
        self.about = {"ep": self._engine.ep}

    def run(self, tokens: int, new: int, seed: int = 0) -> Answer:
        """Seconds to read a prompt up to its first token, and for `new` tokens after that."""
        from model.progress import NullProgress
        from runtime.generation import Generator
        from runtime.options import GenerationOptions

        requests = self._engine.requests
        generator = Generator(self._engine.graphs, requests, (), NullProgress())
        request = requests.of_ids(random_ids(tokens, self._vocabulary, seed), (), new + 1)
        times = generator.run([request], GenerationOptions(max_new_tokens=new + 1, do_sample=False))[0].timings
        return {"prefill_s": times.prefill_s, "decode_s": times.decode_s}

    def encode(self, side: int) -> Answer:
        """Seconds to encode an image that was scaled and cut before, and its patches."""
        processor = self._engine.requests.image_processor
        scaled = self._engine.requests.scaled([noise(side)])[0]
        values, grid = processor.patches(scaled)
        start = time.perf_counter()
        self._engine.graphs.encode(values, grid, processor.token_count(scaled))
        return {"seconds": time.perf_counter() - start, "patches": len(values)}

    def logits(self, tokens: int, last: int, file: str, seed: int = 0) -> Answer:
        """Writes the logits at the last positions of a prompt to a file, float32 [last, vocab]."""
        found = self._engine.logits(random_ids(tokens, self._vocabulary, seed))[-last:]
        np.save(file, found)
        return {"rows": len(found)}

    def greedy(self, new: int, count: int) -> Answer:
        """What the demonstration's checkpoint is asked, and what it says, of one image each."""
        from exaone_export.demo import samples

        rows = []
        for sample in [sample for sample in samples() if len(sample.paths) == 1][:count]:
            given: dict[str, Any] = {"images": list(sample.paths), "enable_thinking": bool(sample.reasoning)}
            prompt = self._engine.prompt(sample.prompt, **given)
            result = self._engine.generate(sample.prompt, **given, max_new_tokens=new, do_sample=False)
            row = {"prompt": prompt.token_ids, "ids": result.token_ids}
            rows.append({"image": str(sample.paths[0]), **{name: list(map(int, ids)) for name, ids in row.items()}})
        return {"rows": rows}

    def peak(self) -> Answer:
        """Most memory this process held."""
        return {"bytes": resident_peak()}


def resident_peak() -> int:
    """The process's largest resident size, in bytes."""
    from exaone_export.benchmark.worker import peak_bytes

    return peak_bytes()


def main() -> None:
    """Answers until the standard input ends."""
    kind, model, device, options = sys.argv[1:]
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    start = time.perf_counter()
    if kind == "torch":
        from benchmarks.cuda_torch import Torch

        subject: Any = Torch(Path(model), device, **json.loads(options))
    else:
        subject = Ours(Path(model), device, **json.loads(options))
    about = {**subject.about, "load_s": time.perf_counter() - start}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(subject, asked.pop("call"))(**asked)), file=answers, flush=True)


if __name__ == "__main__":
    main()
