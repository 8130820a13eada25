"""Builds the demonstration checkpoint's tokenizer: control tokens, 256 bytes and a few merges for fixed phrases.

Ids of the control tokens are the published ones where those are known. The merges spell whole phrases of the
prompts from their first letters on, so that prompts are short and other text stays one token a byte.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

CONTROL = {
    0: "[PAD]",
    1: "[BOS]",
    50: "<|system|>",
    51: "<|user|>",
    52: "<|assistant|>",
    53: "<|endofturn|>",
    54: "<|tool|>",
    55: "<|tool_declare|>",
    67: "<|image_pad|>",
    68: "<|video_pad|>",
    73: "<vision>",
    74: "</vision>",
}
MARKUP = {
    60: "<think>",
    61: "</think>",
    62: "<tool_call>",
    63: "</tool_call>",
    64: "<tool_result>",
    65: "</tool_result>",
    66: "<tool>",
    69: "</tool>",
}
FIRST_BYTE = 100
VOCABULARY = 768
# Letters and the single spaces between them stay together, digits stand alone.
PIECES = (
    r"\p{N}|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
# New phrases go to the end, so that tokens keep their ids.
PHRASES = (
    "\n\n",
    "Read the text",
    "What does the image say",
    "Repeat",
    "The image shows one line",
    '{"',
    '":',
    ',"',
    "Read the receipt as JSON",
    "Read the first image",
    "Read the second image",
    "What is the total",
    "What is the price of ",
    "What is the number of items",
    "What is the value of ",
    "The image shows a receipt of",
    "The line says ",
    "There are two images",
)


def byte_letters() -> dict[int, str]:
    """The printable letter byte-level BPE writes for each byte (Radford et al., 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(plain))
    return letters


def build() -> Tokenizer:
    """The tokenizer with 768 ids at most."""
    letters = byte_letters()
    vocabulary = {f"<|reserved_{i}|>": i for i in range(FIRST_BYTE) if i not in CONTROL and i not in MARKUP}
    vocabulary |= {text: i for i, text in (CONTROL | MARKUP).items()}
    vocabulary |= {letters[byte]: FIRST_BYTE + byte for byte in range(256)}
    merges: list[tuple[str, str]] = []
    for phrase in PHRASES:
        spelled = [letters[byte] for byte in phrase.encode()]
        for end in range(1, len(spelled)):
            pair = ("".join(spelled[:end]), spelled[end])
            if pair not in merges:
                merges.append(pair)
                vocabulary["".join(pair)] = len(vocabulary)
    if len(vocabulary) > VOCABULARY:
        raise ValueError(f"{len(vocabulary)} tokens are more than {VOCABULARY}")
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(PIECES), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    named = sorted(CONTROL | MARKUP)
    tokenizer.add_tokens([AddedToken(MARKUP[i], special=False, normalized=False) for i in named if i in MARKUP])
    tokenizer.add_special_tokens(
        [AddedToken(CONTROL[i], special=True, normalized=False) for i in named if i in CONTROL]
    )
    return tokenizer


def write(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    build().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "[BOS]",
        "eos_token": "<|endofturn|>",
        "pad_token": "[PAD]",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
