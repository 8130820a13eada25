"""Byte-level BPE tokenizers of a few hundred tokens, with control tokens named like EXAONE's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|pad|>", "<|endofturn|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|tool_declare|>"]
SPECIAL += ["<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_result>", "</tool_result>", "<tool>", "</tool>"]
CORPUS = ["The user said hello to the tool; think again.", "이 이미지를 설명해 줘. 대단한지 설명해 봐"]
CORPUS += ["a < b > c [1] (2)"]


def make_backend(special: list[str] = SPECIAL, tags: list[str] = TAGS) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 20, trainer)
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return backend


def write_tokenizer(folder: Path, backend: Any | None = None, **config: Any) -> Path:
    (folder / "tokenizer.json").write_text((backend or make_backend()).to_str(), encoding="utf-8")
    config = {"eos_token": "<|endofturn|>", "pad_token": "<|pad|>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
