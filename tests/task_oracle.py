"""transformers' models with other heads than a language model's: random ones, saved the way transformers saves them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests import tiny
from tests.oracle import DENSE, HYBRID, VLM, randomize

Arrays = dict[str, npt.NDArray[Any]]
WINDOW = int(HYBRID["sliding_window"])
# Few layers, so that tracing is quick; the vocabulary has room for the tests' tokenizer.
SMALL_HYBRID = HYBRID | {
    "vocab_size": tiny.VOCABULARY,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
SMALL_DENSE = DENSE | {"vocab_size": tiny.VOCABULARY, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
SMALL_VLM = VLM | {
    "text_config": SMALL_HYBRID,
    "vision_config": VLM["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]},
}


def task_model(architecture: str, raw: dict[str, Any], seed: int = 0, **changes: Any) -> Any:
    """transformers' model of that class, float32 and eager, every parameter random; `changes` go into the config."""
    import transformers

    known = copy.deepcopy(raw) | changes
    model_type = known.pop("model_type")
    kind = transformers.Exaone4Config if model_type == "exaone4" else transformers.Exaone4_5_Config
    config = kind(**known)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            randomize(name, parameter)
            if name.startswith(("score", "qa_outputs")):
                parameter.normal_(0.0, 0.5)
    return model.requires_grad_(False)


def save(model: Any, folder: Path) -> Path:
    """A checkpoint folder as transformers writes it, with the tests' tokenizer."""
    model.save_pretrained(folder)
    tiny.write_assets(folder, vision=hasattr(model.config, "vision_config"))
    return folder


def outputs(model: Any, **inputs: Any) -> Arrays:
    """What the model gives for arrays, by the names of its outputs."""
    with torch.inference_mode():
        found = model(**{name: torch.as_tensor(value) for name, value in inputs.items()}, use_cache=False)
    return {name: value.numpy() for name, value in found.items() if isinstance(value, torch.Tensor)}


def padded(lengths: list[int], side: str = "right", pad: int = 0, seed: int = 0) -> Arrays:
    """Random ids of rows of those lengths, padded on one side."""
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    mask = mask if side == "right" else mask[:, ::-1]
    ids = np.random.default_rng(seed).integers(tiny.BYTES_AT, tiny.BYTES_AT + 256, mask.shape)
    return {"input_ids": np.where(mask, ids, pad), "attention_mask": mask.astype(np.int64)}
