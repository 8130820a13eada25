"""From texts or ids to the rows that an encoder runs, and the checks of arrays that a caller gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.config import ExaoneConfig
from model.errors import UsageError
from runtime.encoding import Encoding
from runtime.prompt import expand_placeholders, far_too_long
from runtime.request import RequestBuilder

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
TextInput = str | list[int]
TextInputs = list[str] | list[list[int]]

PASS_TOKENS: Final = 4096  # of one pass, padding included; a longer row runs alone
_WHAT = "cannot use token ids"


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        rows: their numbers in the whole list.
        ids: [rows, longest], padded on the right.
        mask: the same shape, whether a token is of the row.
    """

    rows: range
    ids: Ids
    mask: Mask


class RowBuilder:
    """Makes rows of one bundle's texts.

    Args:
        requests: the bundle's tokenizer and image processor.
        config: of its model.
    """

    def __init__(self, requests: RequestBuilder, config: ExaoneConfig) -> None:
        self._requests, self._config = requests, config

    def encoding(self, name: str, text: object, pair: str | None = None) -> Encoding:
        """A text's tokens, or a pair's. Raises UsageError, which calls it `name`, if there are none or too many."""
        if not isinstance(text, str) or not isinstance(pair, str | None):
            raise UsageError("cannot use text", name, "it is no text")
        tokenizer, context = self._requests.tokenizer, self._config.text.max_position_embeddings
        if any(far_too_long(tokenizer, part, context) for part in (text, pair or "")):
            why = f"it has many more tokens than the {context} that the context holds"
            raise UsageError("text too long", name, why, "Shorten it, or split it")
        encoding = tokenizer.encode_pair(text, pair)
        check_fits(len(encoding.ids), context, name)
        return encoding

    def ids(
        self, given: TextInput, name: str, pair: str | None = None, images: Sequence[Image.Image] = ()
    ) -> Sequence[int]:
        """A row's ids; in a text, placeholders are expanded to the tokens of their images. Raises UsageError."""
        config = self._config
        counts = [self._requests.image_processor.token_count(image) for image in images]
        if isinstance(given, str):
            ids: Sequence[int] = self.encoding(name, given, pair).ids
            if config.vision is not None:
                ids = expand_placeholders(ids, config.image_token_id, counts, config.video_token_id)
        else:
            if pair is not None:
                raise UsageError("cannot use texts", "text_pair", "it goes with texts, not with token ids")
            ids = checked_ids([given], config.text.vocab_size)[0].tolist()
            found = sum(token in (config.image_token_id, config.video_token_id) for token in ids)
            if config.vision is not None and found != sum(counts):
                why = f"{found} placeholders, {sum(counts)} are needed for {len(images)} images"
                raise UsageError(_WHAT, name, why, "Expand the placeholders to the images' tokens")
        check_fits(len(ids), config.text.max_position_embeddings, name)
        return ids


def is_single(inputs: object) -> bool:
    """Whether `inputs` is one text, or one list of ids, and not a list of such."""
    if isinstance(inputs, str):
        return True
    if not isinstance(inputs, (list, tuple, np.ndarray)):
        why = f"a {type(inputs).__name__} is neither a text, nor a list of texts or of token ids"
        raise UsageError("cannot use texts", "texts", why)
    return len(inputs) > 0 and isinstance(inputs[0], (int, np.integer))


def check_fits(tokens: int, context: int, where: str) -> None:
    """Refuses what is longer than the model's positions. Raises UsageError, which names both numbers."""
    if tokens > context:
        why = f"it has {tokens} tokens and the context holds {context}"
        raise UsageError("text too long", where, why, "Shorten it, or split it")
    if tokens == 0:
        raise UsageError("cannot use text", where, "it has no tokens", "Give at least one character")


def batches(rows: Sequence[Sequence[int]], pad_id: int, most: int = PASS_TOKENS) -> Iterator[Batch]:
    """The rows in their order, as many at a time as fit into `most` tokens together with their padding."""
    first = 0
    while first < len(rows):
        last, longest = first + 1, len(rows[first])
        while last < len(rows) and max(longest, len(rows[last])) * (last + 1 - first) <= most:
            longest = max(longest, len(rows[last]))
            last += 1
        chosen = range(first, last)
        mask = np.arange(longest) < np.array([len(rows[i]) for i in chosen])[:, None]
        ids = np.full(mask.shape, pad_id, np.int64)
        ids[mask] = np.concatenate([np.asarray(rows[i], np.int64) for i in chosen])
        yield Batch(chosen, ids, mask)
        first = last


def checked_ids(given: Any, vocabulary: int) -> Ids:
    """`input_ids` as int64 [batch, sequence].

    Raises:
        UsageError: another shape or kind, or an id outside the vocabulary.
    """
    ids = _array(given, "input_ids")
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.size:
        why = f"{int(outside[0])} is not between 0 and {vocabulary - 1}"
        raise UsageError(_WHAT, "input_ids", why)
    return ids


def checked_mask(given: Any, ids: Ids) -> Mask:
    """`attention_mask` as bool [batch, sequence]; None is all tokens.

    Raises:
        UsageError: another shape, other numbers than 0 and 1, a row without ones, or zeros between ones.
    """
    if given is None:
        return np.ones(ids.shape, np.bool_)
    mask = _array(given, "attention_mask")
    if mask.shape != ids.shape:
        why = f"its shape is {list(mask.shape)}, that of input_ids {list(ids.shape)}"
        raise UsageError(_WHAT, "attention_mask", why)
    # A run of ones begins where a one follows a zero, or the edge.
    begins = np.diff(mask, axis=1, prepend=0) == 1
    for row in np.flatnonzero(((mask != 0) & (mask != 1)).any(1) | (begins.sum(1) != 1))[:1]:
        why = f"row {row} is not ones side by side, with zeros for padding on the left, the right or both"
        raise UsageError(_WHAT, "attention_mask", why)
    return mask.astype(np.bool_)


def check_last_tokens(ids: Ids, mask: Mask, pad_id: int | None) -> None:
    """Refuses rows of which a text classifier, as transformers defines it, would look at padding.

    It looks at the rightmost token whose id is not the padding's, or at the last column where the model has no padding
    token.

    Raises:
        UsageError: names the row.
    """
    if pad_id is None and len(ids) > 1:
        why = f"there are {len(ids)} rows, and config.json names no pad_token_id"
        raise UsageError(_WHAT, "input_ids", why, "Give one row at a time")
    columns = np.arange(ids.shape[1]) * (ids != pad_id) if pad_id is not None else np.arange(ids.shape[1])[None]
    padded = ~mask[np.arange(len(ids)), columns.max(1)]
    for row in np.flatnonzero(padded)[:1]:
        why = f"row {row}: the mask leaves out its last token that is not padding"
        raise UsageError(_WHAT, "attention_mask", why, "Pad with the model's pad_token_id")


def spans_of(encoding: Encoding) -> list[tuple[int, int] | None]:
    """Where each token lies in its text; None for one that the tokenizer added."""
    return [None if part is None else span for span, part in zip(encoding.offsets, encoding.parts, strict=True)]


def _array(given: Any, name: str) -> Ids:
    try:
        array = np.asarray(given)
    except ValueError:
        raise UsageError(_WHAT, name, "its rows differ in length", "Pad them, and give an attention_mask") from None
    if array.dtype.kind not in "iub" or array.ndim != 2 or not array.size:
        why = f"{array.dtype} of shape {list(array.shape)}, whole numbers [batch, sequence] are needed"
        raise UsageError(_WHAT, name, why)
    return array.astype(np.int64)
