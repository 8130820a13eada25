"""Random tiny checkpoints of every architecture, with a byte-level tokenizer, made in milliseconds without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.config import parse_config
from model.weights import expected_tensors

KINDS = ("hybrid", "dense", "vlm")
VOCABULARY = 512
BYTES_AT = 100  # id of byte 0; the other special tokens are below
SPECIAL = {
    "<|pad|>": 0,
    "<|bos|>": 1,
    "<|system|>": 50,
    "<|user|>": 51,
    "<|assistant|>": 52,
    "<|endofturn|>": 53,
    "<|tool|>": 54,
    "<think>": 60,
    "</think>": 61,
    "<tool_call>": 62,
    "</tool_call>": 63,
    "<|image_pad|>": 67,
    "<|video_pad|>": 68,
    "<vision>": 73,
    "</vision>": 74,
}
VISIBLE = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # kept when special tokens are skipped

TEMPLATE = """{%- for message in messages -%}
<|{{ message.role }}|>
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<vision><|image_pad|></vision>
{% elif part.type == 'video' -%}<vision><|video_pad|></vision>
{% else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|endofturn|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{% if enable_thinking is defined and enable_thinking %}<think>
{% else %}<think>

</think>

{% endif -%}
{%- endif -%}
"""

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "bos_token_id": 1,
    "eos_token_id": 53,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "model_type": "exaone4_5_vision",
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [3],
    "out_hidden_size": 64,
    "in_channels": 3,
    "hidden_act": "silu",
}


def make_config(kind: str, **overrides: Any) -> dict[str, Any]:
    """A config.json; `overrides` go into the text model, but for model_type and architectures."""
    tied = kind == "dense"
    text = _TEXT | {"tie_word_embeddings": tied}
    if tied:
        text |= {"sliding_window": None, "layer_types": ["full_attention"] * _TEXT["num_hidden_layers"]}
    text |= {key: value for key, value in overrides.items() if key not in ("model_type", "architectures", "vision")}
    if kind == "vlm":
        config = {
            "model_type": "exaone4_5",
            "architectures": ["Exaone4_5_ForConditionalGeneration"],
            "text_config": text | {"model_type": "exaone4"},
            "vision_config": _VISION | overrides.get("vision", {}),
            "tie_word_embeddings": text["tie_word_embeddings"],
            "num_nextn_predict_layers": 1,
            "image_token_id": SPECIAL["<|image_pad|>"],
            "video_token_id": SPECIAL["<|video_pad|>"],
            "vision_start_token_id": SPECIAL["<vision>"],
            "vision_end_token_id": SPECIAL["</vision>"],
            "bos_token_id": 1,
            "eos_token_id": 53,
            "pad_token_id": 0,
        }
    else:
        config = text | {"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"]}
    return config | {key: overrides[key] for key in ("model_type", "architectures") if key in overrides}


def published_name(canonical: str, vlm: bool) -> str:
    """The name that a published file gives a tensor."""
    graph, _, rest = canonical.partition(".")
    if rest == "lm_head.weight":
        return rest
    prefixes = {
        "vision_encoder": "model.visual.",
        "mtp": "mtp.",
        "embedding": "model.language_model.",
        "decoder": "model.language_model." if vlm else "model.",
    }
    return prefixes[graph] + rest


def make_tensors(
    config: dict[str, Any], seed: int = 0, *, draft: bool = True, dtype: str = "fp32"
) -> dict[str, NDArray[Any]]:
    """Random weights under published names; norms and biases are random too, so that dropping one shows."""
    parsed = parse_config(config)
    rng = np.random.default_rng(seed)
    kind = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    tensors = {}
    for name, shape in expected_tensors(parsed, draft=draft and parsed.vision is not None).items():
        values = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            values *= 1.5 / np.sqrt(np.prod(shape[1:])) if "embed_tokens" not in name else 0.5
        elif name.endswith("bias"):
            values *= 0.1
        else:
            values = 1 + 0.2 * values
        tensors[published_name(name, parsed.vision is not None)] = values.astype(kind)
    return tensors


def save_tensors(folder: Path, tensors: dict[str, NDArray[Any]], shards: int = 1) -> None:
    """One model.safetensors, or as many shards with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def make_checkpoint(
    folder: Path,
    kind: str,
    seed: int = 0,
    *,
    dtype: str = "fp32",
    sharded: int = 1,
    draft: bool = True,
    assets: bool = True,
    **overrides: Any,
) -> Path:
    """Writes a checkpoint folder and returns it.

    Args:
        folder: created if it is not there.
        kind: "hybrid" (EXAONE 4.0 32B-like: window 8, LLLG, untied), "dense" (1.2B-like: no window, tied), or
            "vlm" (EXAONE 4.5-like: hybrid text, vision encoder, draft head).
        seed: of the weights.
        dtype: "fp32", "fp16" or "bf16".
        sharded: number of safetensors files.
        draft: whether a "vlm" gets its draft head.
        assets: whether to write tokenizer, template and preprocessor configuration.
        **overrides: keys of the text configuration; `vision` is a dict of keys of the vision configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(kind, **overrides)
    _write_json(folder / "config.json", config)
    save_tensors(folder, make_tensors(config, seed, draft=draft, dtype=dtype), sharded)
    if assets:
        write_assets(folder, vision=kind == "vlm")
    return folder


TASK_ARCHITECTURES = {
    "text-classification": "Exaone4ForSequenceClassification",
    "token-classification": "Exaone4ForTokenClassification",
    "question-answering": "Exaone4ForQuestionAnswering",
}


def make_task_checkpoint(
    folder: Path, kind: str, architecture: str, seed: int = 0, *, labels: int = 2, **overrides: Any
) -> Path:
    """A checkpoint of a model with another head than a language model's, or with none, named as transformers saves it.

    Args:
        folder: created if it is not there.
        kind: as in `make_checkpoint`.
        architecture: what config.json names, e.g. "Exaone4ForSequenceClassification", "Exaone4_5_Model".
        seed: of the weights.
        labels: outputs of a classifier, called "label 0", "label 1" and so on.
        **overrides: as in `make_checkpoint`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {str(i): f"label {i}" for i in range(labels)}
    classifier = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    config = make_config(kind, **({} if kind == "vlm" else classifier) | {"architectures": [architecture]} | overrides)
    _write_json(folder / "config.json", config)
    tensors = make_tensors(config, seed, draft=False)
    save_tensors(folder, {task_name(name, architecture): tensor for name, tensor in tensors.items()})
    write_assets(folder, vision=kind == "vlm")
    return folder


def task_name(published: str, architecture: str) -> str:
    """The name that a checkpoint of this architecture gives a tensor of the published ones."""
    if published.startswith(("model.score.", "model.qa_outputs.")):
        return published.removeprefix("model.")
    if architecture.endswith("Model"):
        return published.removeprefix("model.")
    if architecture == "Exaone4ForQuestionAnswering":
        return published.replace("model.", "transformer.", 1)
    return published


def write_assets(folder: Path, *, vision: bool) -> None:
    """tokenizer.json (bytes and special tokens, no merges), template, generation and preprocessor configuration."""
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 53, "pad_token_id": 0})
    _write_json(folder / "tokenizer.json", tokenizer_json())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|endofturn|>",
            "pad_token": "<|pad|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
        },
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "LICENSE").write_text("Random numbers; free to use.\n", encoding="utf-8")
    if vision:
        _write_json(folder / "preprocessor_config.json", PREPROCESSOR)


PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 3136,
    "max_pixels": 3211264,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}


def tokenizer_json() -> dict[str, Any]:
    """A byte-level BPE tokenizer without merges: byte b is token 100 + b."""
    vocabulary = dict(SPECIAL)
    for byte, character in enumerate(_byte_characters()):
        vocabulary[character] = BYTES_AT + byte
    taken = set(vocabulary.values())
    vocabulary |= {f"<|unused_{i}|>": i for i in range(VOCABULARY) if i not in taken}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token not in VISIBLE,
            }
            for token, number in SPECIAL.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """The visible character that byte-level tokenizers write for each byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters, extra = [], 0
    for byte in range(256):
        if byte in plain:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + extra))
            extra += 1
    return characters


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
