"""transformers as the reference implementation: small random models, and the same weights in our modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.config import load_config, parse_config
from model.exaone import Exaone
from model.load import load_exaone
from runtime.image import ImageProcessor

TINY45 = Path(__file__).parent / "data" / "tiny45"

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
HYBRID: dict[str, Any] = {
    "model_type": "exaone4",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": LLAMA3,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
DENSE: dict[str, Any] = HYBRID | {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "sliding_window": None,
    "layer_types": ["full_attention"] * 3,
    "tie_word_embeddings": True,
}
VISION: dict[str, Any] = {
    "model_type": "exaone4_5_vision",
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "hidden_act": "silu",
    "num_heads": 4,
    "num_key_value_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
    "out_hidden_size": 64,
    "in_channels": 3,
}
VLM: dict[str, Any] = {
    "model_type": "exaone4_5",
    "text_config": HYBRID,
    "vision_config": VISION,
    "tie_word_embeddings": False,
    "image_token_id": 67,
    "video_token_id": 68,
    "vision_start_token_id": 73,
    "vision_end_token_id": 74,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
IMAGE_TOKEN, VIDEO_TOKEN = 67, 68


def reference(raw: dict[str, Any], seed: int = 0) -> Any:
    """transformers' model of a configuration, float32 and eager, every parameter random (norms and biases too)."""
    from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration, Exaone4Config, Exaone4ForCausalLM

    raw = copy.deepcopy(raw)
    if raw["model_type"] == "exaone4":
        config, kind = Exaone4Config(**raw), Exaone4ForCausalLM
    else:
        config, kind = Exaone4_5_Config(**raw), Exaone4_5_ForConditionalGeneration
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    found = kind(config).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            randomize(name, parameter)
    return found.requires_grad_(False)


def randomize(name: str, parameter: Tensor) -> None:
    """Gains around one, biases around zero, weights small enough that five layers stay finite."""
    if "norm" in name or "ln_q" in name:
        parameter.uniform_(0.5, 1.5)
    elif name.endswith("bias"):
        parameter.normal_(0.0, 0.2)
    else:
        parameter.normal_(0.0, 0.08 if "embed_tokens" not in name else 0.5)


def ours(reference_model: Any, raw: dict[str, Any]) -> Exaone:
    """Our model with the reference's weights, moved by name."""
    model = Exaone(parse_config(raw)).eval()
    missing, unexpected = model.load_state_dict(dict(_renamed(reference_model, raw)), strict=False)
    tied = {"decoder.lm_head.weight"} if raw.get("tie_word_embeddings") else set()
    assert set(missing) <= tied, missing
    assert not unexpected, unexpected
    return model.requires_grad_(False)


def _renamed(reference_model: Any, raw: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    text = "model.language_model." if raw["model_type"] == "exaone4_5" else "model."
    for name, value in reference_model.state_dict().items():
        if name.startswith("model.visual."):
            shaped = value.flatten(1) if name.endswith("patch_embed.proj.weight") else value
            yield name.replace("model.visual.", "vision_encoder."), shaped
        elif name == f"{text}embed_tokens.weight" and raw["model_type"] == "exaone4_5":
            yield "embedding.embed_tokens.weight", value
        elif name.startswith(text):
            yield name.replace(text, "decoder.", 1), value
        else:
            yield f"decoder.{name}", value


def tiny45() -> Exaone:
    """The golden checkpoint of tests/data, draft head included."""
    return load_exaone(TINY45)


def random_pixels(grids: list[tuple[int, int, int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random patches [patches, 1176] of images of those grids (frames, rows, columns), and the grids."""
    count = sum(t * h * w for t, h, w in grids)
    pixels = np.random.default_rng(seed).normal(size=(count, 1176)).astype(np.float32)
    return torch.from_numpy(pixels), torch.tensor(grids)


def random_ids(count: int, seed: int = 0, vocab: int = 160) -> Tensor:
    """Token ids [1, count] without special tokens (they are below 80 here)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(80, vocab, size=(1, count)))


def placeholders(grid: tuple[int, int, int], merge: int = 2) -> int:
    """Placeholder tokens that an image of this grid takes."""
    t, h, w = grid
    return t * h * w // merge**2


def golden_pixels() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Patches of the golden image, by the runtime's own preprocessing."""
    raw = json.loads((TINY45 / "preprocessor_config.json").read_text())
    vision = load_config(TINY45).vision
    assert vision is not None
    with Image.open(TINY45 / "noise_300x200.png") as image:
        pixels, _ = ImageProcessor.from_config(raw, vision)(image)
    return pixels
