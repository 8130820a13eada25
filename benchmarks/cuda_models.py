"""What `cuda.py` measures: checkpoints of the published shapes with random weights, and bundles of them.

Checkpoints are sparse files but for those that PyTorch reads too, and exports read them through `synthetic.py`. Methods
that look at weights are replaced by rounding to nearest: the bytes are as many and lie in the same places, and 33
billion weights become a bundle in a minute or two. What is there is used again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.peers_envs import QUIET
from benchmarks.synthetic import MODELS, write_checkpoint
from benchmarks.worker import ROOT
from exaone_export.demo import checkpoint_folder
from model.bundle import MANIFEST
from quantize.recipe import Recipe, Rule, load_recipe
from tests.tiny import write_assets

SHAPES: Final = {"1.2b": "4.0-1.2b", "33b": "4.5-33b"}
SIDE: Final = 1024  # pixels of the image
# PyTorch needs the weights on the disk, and a reference in float32 in memory: of 64 layers, four have every kind.
LAYERS: Final = {"1.2b": None, "33b": 4}
_SMALL_TEXT: Final[dict[str, Any]] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
}  # fmt: skip
_SMALL_VISION: Final[dict[str, Any]] = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_key_value_heads": 2,
    "fullatt_block_indexes": [1], "out_hidden_size": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Models:
    """Makes what is asked for in a folder.

    Attributes:
        work: the folder.
        device: "cuda" or "cpu"; what bundles are exported for.
        tiny: small dimensions, for trying the scripts out.
        recipe: a shipped recipe's name or a file, for the quantized bundles.
        exact: keep the recipe's methods.
    """

    work: Path
    device: str = "cuda"
    tiny: bool = False
    recipe: str = "int4"
    exact: bool = False

    @property
    def half(self) -> str:
        """The float type of bundles; the CPU's kernels want float32."""
        return "fp16" if self.device == "cuda" else "fp32"

    @property
    def side(self) -> int:
        """Pixels of the image's side."""
        return 224 if self.tiny else SIDE

    def config(self, shape: str, layers: int | None = None) -> dict[str, Any]:
        """config.json of a shape, with so many text layers."""
        raw: dict[str, Any] = json.loads(json.dumps(MODELS[SHAPES[shape]]))
        text = raw.get("text_config", raw)
        if self.tiny:
            text.update(_SMALL_TEXT)
            if "vision_config" in raw:
                raw["vision_config"].update(_SMALL_VISION)
                raw["num_nextn_predict_layers"] = 0
                text["sliding_window"] = 32
        if layers is not None:
            text["num_hidden_layers"] = layers
        # transformers wants each layer's kind; every fourth one of the pattern LLLG sees everything.
        slides = text.pop("sliding_window_pattern", None) is not None
        text["layer_types"] = [
            "sliding_attention" if slides and (i + 1) % 4 else "full_attention"
            for i in range(text["num_hidden_layers"])
        ]
        return raw

    def checkpoint(self, shape: str, *, real: bool = False) -> Path:
        """A checkpoint; `real` ones have their weights on the disk, and fewer layers where `LAYERS` says so."""
        folder = self.work / f"checkpoint-{shape}{'-real' if real else ''}"
        if not folder.exists():
            unfinished = self.work / f"partial-{folder.name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            config = self.config(shape, LAYERS[shape] if real else None)
            self.work.mkdir(parents=True, exist_ok=True)
            write_checkpoint(unfinished, config, real=real)
            write_assets(unfinished, vision="vision_config" in config)
            preprocessor = unfinished / "preprocessor_config.json"
            if preprocessor.exists():  # the image measured is the largest there is, so that `inspect` reckons with it
                most = (self.side + 28) ** 2
                preprocessor.write_text(json.dumps(json.loads(preprocessor.read_text()) | {"max_pixels": most}))
            unfinished.rename(folder)
        return folder

    def bundle(self, shape: str, *, quantized: bool, dtype: str | None = None) -> Path:
        """A bundle of a shape: quantized of the sparse checkpoint, or float of the real one."""
        dtype = dtype or self.half
        out = self.work / f"bundle-{shape}-{'quantized' if quantized else dtype}"
        source = self.checkpoint(shape, real=not quantized)
        return self._export(source, out, dtype, str(self._recipe_file()) if quantized else None)

    def demonstration(self, dtype: str) -> Path:
        """The demonstration checkpoint as a float bundle."""
        return self._export(checkpoint_folder(), self.work / f"bundle-demo-{dtype}", dtype, None, synthetic=False)

    def _recipe_file(self) -> Path:
        path = self.work / "recipe.toml"
        recipe = load_recipe(self.recipe)
        if not self.exact:
            recipe = dataclasses.replace(recipe, rules=tuple(map(_nearest, recipe.rules)))
        path.write_text(Recipe(f"{recipe.name}-timed", recipe.rules).to_toml())
        return path

    def _export(self, source: Path, out: Path, dtype: str, recipe: str | None, *, synthetic: bool = True) -> Path:
        if (out / MANIFEST).exists():
            return out
        command = ["export", str(source), str(out), "--dtype", dtype, "--target", self.device, "--quiet"]
        command += ["--quantize", recipe] if recipe else []
        real = not synthetic or source.name.endswith("-real")
        start = ["-m", "exaone_export"] if real else ["-m", "benchmarks.synthetic", f"{out}.reading.json"]
        print(f"making {out.name}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, *start, *command], cwd=ROOT, env=os.environ | QUIET)
        if done.returncode:
            raise SystemExit(f"{out.name} cannot be made: the export ends with {done.returncode}")
        return out


def _nearest(rule: Rule) -> Rule:
    """The same rule with rounding to nearest."""
    if rule.scheme is None:
        return rule
    return dataclasses.replace(rule, scheme=dataclasses.replace(rule.scheme, method="rtn"))
