"""The configurations of the published EXAONE 4.0 and 4.5 models, and ways to change them."""

from __future__ import annotations

import copy
from typing import Any

from model.config import FULL, SLIDING

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXAONE_4_32B: dict[str, Any] = {
    "architectures": ["Exaone4ForCausalLM"],
    "model_type": "exaone4",
    "vocab_size": 102400,
    "hidden_size": 5120,
    "intermediate_size": 27392,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": LLAMA3,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "pad_token_id": 0,
}
EXAONE_4_1B: dict[str, Any] = EXAONE_4_32B | {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "sliding_window": None,
    "sliding_window_pattern": None,
    "layer_types": [FULL] * 30,
    "tie_word_embeddings": True,
}
TEXT_45: dict[str, Any] = {
    key: value
    for key, value in EXAONE_4_32B.items()
    if key not in ("architectures", "rope_theta", "rope_scaling", "tie_word_embeddings")
} | {
    "model_type": "exaone4_5_text",
    "vocab_size": 153600,
    "max_position_embeddings": 262144,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 16 + [SLIDING],
    "rope_parameters": LLAMA3 | {"rope_theta": 1e6},
}
EXAONE_45_33B: dict[str, Any] = {
    "architectures": ["Exaone4_5_ForConditionalGeneration"],
    "model_type": "exaone4_5",
    "text_config": TEXT_45,
    "vision_config": {
        "model_type": "exaone4_5_vision",
        "depth": 28,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "hidden_act": "silu",
        "num_heads": 32,
        "num_key_value_heads": 8,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [6, 13, 20, 27],
        "out_hidden_size": 5120,
        "in_channels": 3,
        "in_chans": 3,
    },
    "num_nextn_predict_layers": 1,
    "mtp_share_layers": False,
    "mtp_loss_scaling_factor": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 53,
    "pad_token_id": 0,
    "image_token_id": 67,
    "video_token_id": 68,
    "vision_token_id": 67,
    "vision_start_token_id": 73,
    "vision_end_token_id": 74,
}
Raw = dict[str, Any]


def with_text(**changes: Any) -> Raw:
    """The published 4.5 configuration with other values under text_config; `...` removes a key."""
    raw = copy.deepcopy(EXAONE_45_33B)
    raw["text_config"] = {k: v for k, v in (raw["text_config"] | changes).items() if v is not ...}
    return raw


def with_vision(**changes: Any) -> Raw:
    """Likewise under vision_config."""
    raw = copy.deepcopy(EXAONE_45_33B)
    raw["vision_config"] = {k: v for k, v in (raw["vision_config"] | changes).items() if v is not ...}
    return raw


def without(raw: Raw, *keys: str, **changes: Any) -> Raw:
    """A copy without some keys, then with others."""
    return {key: value for key, value in raw.items() if key not in keys} | changes
