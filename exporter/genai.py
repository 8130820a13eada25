"""genai_config.json, with which stock onnxruntime-genai loads the same folder.

It knows no EXAONE; its types "decoder" (text) and "phi3v" (three graphs, ordinary positions, all images at once) run
the graphs as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model.bundle import DECODER, EMBEDDING, VISION_ENCODER, WINDOW_SLACK
from model.config import ExaoneConfig

FILE = "genai_config.json"


def genai_config(
    config: ExaoneConfig, generation: Mapping[str, Any], target: str, window_layers: Sequence[int] = ()
) -> dict[str, Any]:
    """The content of the file.

    Args:
        config: of the model.
        generation: the checkpoint's generation_config.json, which gives the defaults of sampling; may be empty.
        target: "cpu" or "cuda".
        window_layers: layers of the decoder whose cache holds a window only.
    """
    text = config.text
    eos = list(config.eos_token_ids) or [text.vocab_size - 1]
    model: dict[str, Any] = {
        "type": "decoder" if config.vision is None else "phi3v",
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "bos_token_id": config.bos_token_id if config.bos_token_id is not None else eos[0],
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_token_id if config.pad_token_id is not None else eos[0],
        "decoder": _decoder(config, target) | _windows(config, target, window_layers),
    }
    if config.vision is not None:
        model["vision"] = {
            "filename": f"{VISION_ENCODER}.onnx",
            "inputs": {"pixel_values": "pixel_values"},
            "outputs": {"image_features": "image_features"},
        }
        model["embedding"] = {
            "filename": f"{EMBEDDING}.onnx",
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        }
    return {"model": model, "search": _search(generation, text.max_position_embeddings)}


def _decoder(config: ExaoneConfig, target: str) -> dict[str, Any]:
    text = config.text
    entry = "input_ids" if config.vision is None else "inputs_embeds"
    return {
        "filename": f"{DECODER}.onnx",
        "hidden_size": text.hidden_size,
        "head_size": text.head_dim,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "num_hidden_layers": text.num_layers,
        "inputs": {
            entry: entry,
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"provider_options": [{"cuda": {}}] if target == "cuda" else []},
    }


def _windows(config: ExaoneConfig, target: str, layers: Sequence[int]) -> dict[str, Any]:
    """Tells that the graph itself evicts what leaves the window: nothing is to be slid from outside."""
    if not layers:
        return {}
    return {
        "sliding_window": {
            "window_size": config.text.sliding_window,
            "cache_slack": WINDOW_SLACK[target],
            "layers": list(layers),
            "slide_key_value_cache": False,
            "slide_inputs": False,
        }
    }


def _search(generation: Mapping[str, Any], context: int) -> dict[str, Any]:
    defaults = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    given = {key: generation[key] for key, default in defaults.items() if _same_kind(generation.get(key), default)}
    fixed = {
        "min_length": 0,
        "max_length": context,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
    }
    return defaults | given | fixed


def _same_kind(value: object, default: float) -> bool:
    return isinstance(value, int | float) and isinstance(value, bool) == isinstance(default, bool)
