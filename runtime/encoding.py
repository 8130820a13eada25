"""Text to token ids the way transformers' tokenizers do by default: special tokens added, and where each token lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Encoding:
    """One text, or two in a row.

    Attributes:
        ids: token ids.
        offsets: for each token, the first character and the one behind the last, in its own text.
        parts: for each token, 0 or 1 for the text it is of; None for a special token that the tokenizer added.
    """

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    parts: tuple[int | None, ...]


def encode_texts(backend: Any, text: str, pair: str | None) -> Encoding:
    """Encodes with a `tokenizers.Tokenizer`.

    ``tokenizer.json`` alone says which special tokens are added, as in transformers, which passes over
    ``add_bos_token`` of ``tokenizer_config.json``; where it says nothing, the ids of a pair follow one another.
    """
    found = backend.encode(text, pair, add_special_tokens=True)
    return Encoding(tuple(found.ids), tuple(found.offsets), tuple(found.sequence_ids))
