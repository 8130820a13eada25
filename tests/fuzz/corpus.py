"""Undamaged inputs: two tiny checkpoints, the bundles made of them, and a saved conversation with each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import tiny

BOTH = ("text", "vision")
_SMALL: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_VISION: dict[str, Any] = {"depth": 2, "fullatt_block_indexes": [1]}
SAID = " ".join(f"word {i}" for i in range(12))


def make_corpus(folder: Path, kinds: tuple[str, ...] = BOTH) -> Path:
    """Writes what is not there yet: ``<kind>`` a checkpoint, ``<kind>-bundle``, ``<kind>-session``; returns `folder`.

    Checkpoints are made of both kinds, bundles and conversations of `kinds`: exporting takes seconds.
    """
    for kind in BOTH:
        if not (folder / kind).is_dir():
            _checkpoint(folder / kind, kind)
    for kind in kinds:
        if not (folder / f"{kind}-session").exists():
            _bundle(folder, kind)
    return folder


def bundles(corpus: Path) -> list[Path]:
    """The bundles of a corpus."""
    return [corpus / f"{kind}-bundle" for kind in BOTH if (corpus / f"{kind}-bundle").is_dir()]


def _checkpoint(folder: Path, kind: str) -> None:
    if kind == "text":
        tiny.make_checkpoint(folder, "hybrid", seed=7, **_SMALL)
        return
    tiny.make_checkpoint(folder, "vlm", seed=7, sharded=2, vision=_VISION, **_SMALL)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"min_pixels": 784}))


def _bundle(folder: Path, kind: str) -> None:
    import exaone_export as ee

    bundle = folder / f"{kind}-bundle"
    if not bundle.exists():
        ee.export(folder / kind, bundle, quantize="int4")
    seen = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8))]
    with ee.load(bundle, threads=1) as engine:
        assert isinstance(engine, ee.Engine)
        session = engine.session(tools=[{"name": "clock"}])
        options = ee.GenerationOptions(do_sample=False, max_new_tokens=4)
        session.send(SAID, options=options)
        session.send("둘", seen if kind == "vision" else [], options=options)
        session.save(folder / f"{kind}-session")
