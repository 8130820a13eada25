"""Folders that other exporters accept, of a random checkpoint of the EXAONE 4.0 kind.

They want a tokenizer beside the weights, and one of them does not know the architecture: it gets a twin of the same
dimensions under a name that it knows.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<0>", "eos_token": "<1>"}
# Qwen 3 normalizes queries and keys as EXAONE 4.0 does, and has as many norms; it puts them before the blocks.
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
NOT_QWEN3 = ("sliding_window", "layer_types", "rope_scaling")  # the plain rotation costs what the scaled one does
QWEN3_NORMS = (
    ("post_attention_layernorm", "input_layernorm"),
    ("post_feedforward_layernorm", "post_attention_layernorm"),
)


def with_tokenizer(checkpoint: Path, out: Path) -> None:
    """The same checkpoint, its weights linked, with a tokenizer of bytes and unused tokens."""
    out.mkdir(parents=True)
    for path in checkpoint.glob("*.safetensors*"):
        (out / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    # transformers 4 divides by zero where a model without windows does not say so for each layer.
    config.setdefault("layer_types", ["full_attention"] * config["num_hidden_layers"])
    _write_json(out / "config.json", config)
    _write_tokenizer(config["vocab_size"], out)


def as_qwen3(checkpoint: Path, out: Path) -> None:
    """The same weights as a Qwen 3 of the same dimensions; its files are copies."""
    out.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    for key in NOT_QWEN3:
        config.pop(key, None)
    _write_json(out / "config.json", config | QWEN3)
    for path in checkpoint.glob("*.safetensors"):
        _copy_renamed(path, out / path.name)
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        found = json.loads(index.read_text())
        found["weight_map"] = {_renamed(name): file for name, file in found["weight_map"].items()}
        _write_json(out / index.name, found)
    _write_tokenizer(config["vocab_size"], out)


def _renamed(name: str) -> str:
    for old, new in QWEN3_NORMS:
        if f".{old}." in name:
            return name.replace(f".{old}.", f".{new}.")
    return name


def _copy_renamed(source: Path, target: Path) -> None:
    """A copy whose header has the new names; they are no longer than the old ones, so no byte of a tensor moves."""
    shutil.copyfile(source, target)
    with target.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
        text = json.dumps({_renamed(name): entry for name, entry in header.items()}, separators=(",", ":")).encode()
        if len(text) > size:
            raise SystemExit(f"{source.name}: the new header is longer than the old one")
        stream.seek(8)
        stream.write(text.ljust(size))


def _write_tokenizer(vocabulary: int, out: Path) -> None:
    names = [f"<{number}>" for number in range(vocabulary - 256)] + _byte_characters()
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [
        {"id": i, "content": f"<{i}>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i in range(2)
    ]
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": []}
    _write_json(
        out / "tokenizer.json",
        {"version": "1.0", "added_tokens": special, "pre_tokenizer": level, "decoder": level, "model": model},
    )
    _write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte: itself where it is one, else the next from 256 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False))
