"""Shape and starting weights of the demonstration checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.config import parse_config
from model.exaone import Exaone
from model.load import load_exaone
from model.text import RMSNorm

CONFIG: dict[str, Any] = {
    "architectures": ["Exaone4_5_ForConditionalGeneration"],
    "model_type": "exaone4_5",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 53,
    "pad_token_id": 0,
    "image_token_id": 67,
    "video_token_id": 68,
    "vision_start_token_id": 73,
    "vision_end_token_id": 74,
    "num_nextn_predict_layers": 1,
    "text_config": {
        "model_type": "exaone4_5_text",
        "dtype": "bfloat16",
        "vocab_size": 768,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 16384,
        "attention_dropout": 0.0,
        "sliding_window": 32,
        "sliding_window_pattern": "LLLG",
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 1,
        "eos_token_id": 53,
        "pad_token_id": 0,
        "use_cache": True,
    },
    "vision_config": {
        "model_type": "exaone4_5_vision",
        "depth": 4,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_heads": 6,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 256,
    },
}
POST_NORM_GAIN = 0.3
GROWN_GAIN = 0.02  # after the branches of added layers, which change next to nothing at first
UNUSED = 511  # an id no text of the smaller vocabulary has


def new_model(seed: int, config: dict[str, Any] = CONFIG) -> Exaone:
    """An untrained model with its draft head: linear weights N(0, 1/fan_in), gains after a branch small."""
    torch.manual_seed(seed)
    model = Exaone(parse_config(config), draft=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.7)
        elif isinstance(module, RMSNorm) and "post_" in name:
            nn.init.constant_(module.weight, POST_NORM_GAIN)
    return model


def grown_model(folder: Path, seed: int) -> Exaone:
    """A model that begins where a smaller checkpoint of the same widths stands.

    Rows of new tokens are random in the embedding and those of an unused token in the head. Layers beyond the
    checkpoint's are copies of its layers with small gains after each branch (Gong et al., 2019, stack so).

    Args:
        folder: the checkpoint.
        seed: of what is random.
    """
    model, old = new_model(seed), dict(load_exaone(folder).named_parameters())
    layers = sum(name.startswith("decoder.layers.") and name.endswith("q_norm.weight") for name in old)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        added = name.startswith("decoder.layers.") and int(parts[2]) >= layers
        if added:
            parts[2] = str(int(parts[2]) % layers)
        known = old[".".join(parts)]
        if added and ".post_" in name:
            nn.init.constant_(parameter, GROWN_GAIN)
        elif known.shape == parameter.shape:
            parameter.data.copy_(known)
        else:
            parameter.data[: len(known)] = known
            if "lm_head" in name:
                parameter.data[len(known) :] = known[UNUSED]
    return model
