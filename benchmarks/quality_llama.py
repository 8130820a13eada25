"""llama.cpp's quantizers on the demonstration checkpoint's decoder, for `quality.py`.

Its models called exaone4 have window layers only where there are 64 layers in all. The decoder's eight are therefore
put among 56 whose weights and norms are zero, which add nothing to what goes through them; where, is chosen so that
layers keep their kind (a layer in four sees everything) and Q4_K_M gives more bits to those that it would give them to
among eight: the first, the fourth and the last two. It is given embeddings, those of images included, so that embedding
and vision encoder stay float, as they do for all other methods; matrices go in as they are in the checkpoint. What its
float32 gave for four layers was within 1e-5 nats of ours, so the graph is the same.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.quality_bench import Bench, Item, Logits, Row
from model.exaone import Exaone
from tests.tiny import save_tensors

LAYERS, PLACES = 64, (0, 8, 9, 19, 20, 21, 22, 31)
F32, TYPES = "F32", ("Q8_0", "Q4_K_M", "Q4_0")


class Llama:
    """llama.cpp's files of a bench's decoder.

    Args:
        bench: the float model.
        python: of an environment with `llama_cpp` and `gguf`.
    """

    def __init__(self, bench: Bench, python: Path) -> None:
        self._bench, self._python, self._folder = bench, python, bench.work / "llama"
        write_twin(bench.source, bench.model, self._folder / "twin")
        self._call("peers_gguf.py", self._folder / "twin", self._folder, F32, *TYPES)

    def row(self, kind: str) -> Row:
        """Figures of a type."""
        bench = self._bench

        def run(items: Iterable[Item]) -> Iterator[Logits]:
            return self._logits(kind, list(items))

        answers, prompts = (
            bench.quality(run, items, answers=items is bench.answers) for items in (bench.answers, bench.prompts)
        )
        sizes = json.loads((self._folder / "result.json").read_text())
        blocks = [*(f"blk.{place}." for place in PLACES), "output."]
        found = [size for name, size in sizes.items() if name.startswith(tuple(blocks))]
        bits = 8 * sum(size for _, size in found) / sum(count for count, _ in found)
        return Row(f"llama-{kind}", "its own", bits, answers, prompts, None, bench.exact(run, images=False))

    def _logits(self, kind: str, items: list[Item]) -> Iterator[Logits]:
        given = [self._bench.embeddings(item).numpy() for item in items]
        asked, result = self._folder / "asked.npz", self._folder / "result.npy"
        kept = np.array([item.kept for item in items])
        np.savez(asked, embeddings=np.concatenate(given), lengths=np.array(list(map(len, given))), kept=kept)
        self._call("llama_logits.py", self._folder / f"{kind}.gguf", asked, result, 1)
        yield from np.split(np.load(result), np.cumsum(kept)[:-1])

    def _call(self, script: str, *arguments: object) -> None:
        command = [str(self._python), str(Path(__file__).with_name(script)), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{script}: {done.stderr[-500:]}")


def write_twin(source: Path, model: Exaone, folder: Path) -> None:
    """A text checkpoint of `LAYERS` layers that computes what the decoder of the demonstration checkpoint does."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text())["text_config"]
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * (len(PLACES) // 4)
    if config["layer_types"] != kinds:
        raise SystemExit("llama.cpp's twin is meant for eight layers of which every fourth sees everything")
    rope = config["rope_parameters"]
    config |= {"num_hidden_layers": LAYERS, "rope_theta": rope["rope_theta"], "rope_scaling": rope}
    config |= {"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], "tie_word_embeddings": False}
    config["layer_types"] = config["layer_types"] * (LAYERS // len(PLACES))
    tensors: dict[str, Any] = {}
    for name, value in model.decoder.state_dict().items():
        values = value.numpy().astype(ml_dtypes.bfloat16)
        layer, _, rest = name.removeprefix("layers.").partition(".")
        if not name.startswith("layers."):
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = values
            continue
        tensors[f"model.layers.{PLACES[int(layer)]}.{rest}"] = values
        if layer == "0":
            nothing = np.zeros_like(values)
            tensors |= {f"model.layers.{n}.{rest}": nothing for n in range(LAYERS) if n not in PLACES}
    assert model.embedding is not None
    table = model.embedding.embed_tokens.weight.numpy()
    tensors["model.embed_tokens.weight"] = table.astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True)
    save_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
