"""A bundle's tokenizer: byte-level BPE with control tokens.

A thin layer over `tokenizers.Tokenizer` that also knows which ids are control tokens, so that text from outside can
be encoded without them (see `runtime.escape`), and what bytes a token stands for, so that text can be streamed.
"""

from __future__ import annotations

import json
import logging
import re
import string
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

from tokenizers import AddedToken
from tokenizers import Tokenizer as _Backend

from model.errors import BundleError, ExaoneError, UsageError, printable
from runtime.encoding import Encoding, encode_texts
from runtime.escape import ControlText, Disguise
from runtime.quiet import stderr_held_back
from runtime.reasoning import TAGS

logger = logging.getLogger("exaone_export.runtime")

LARGEST_FILE: Final = 256 * 2**20
# The library makes room for every id below the highest when it writes a vocabulary.
LARGEST_ID: Final = 1 << 24
_LONG_NUMBER: Final = re.compile(r":\s*[0-9]{8}")
_SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
_REMEDY: Final = "Take the file from the model's source, or export again"
Result = TypeVar("Result")


class Tokenizer:
    """Encodes and decodes with the tokenizer of a bundle; made by `Tokenizer.load`.

    Attributes:
        vocab_size: number of ids, added tokens included.
        control_ids: ids that only the template may write: special tokens and tags such as ``<think>``.
        hidden_ids: special tokens that are left out of the text; think and tool-call tags are never hidden.
        special_tokens: ``bos_token``, ``eos_token`` and so on, as the chat template's variables.
        padding_side: "left" or "right", where the model's training had its padding.
    """

    def __init__(self, backend: Any, special_tokens: dict[str, str], padding_side: str = "right") -> None:
        self._backend = backend
        self.padding_side = padding_side
        self.special_tokens = special_tokens
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._control = {i: token.content for i, token in added.items() if _is_control(token)}
        self.control_ids = frozenset(self._control)
        self.hidden_ids = frozenset(i for i, token in added.items() if token.special and token.content not in TAGS)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads ``tokenizer.json`` and, where there is one, ``tokenizer_config.json``.

        Raises:
            BundleError: a file is missing, damaged or not a byte-level BPE tokenizer.
        """
        source = _read(folder / "tokenizer.json")
        backend = _guarded(lambda: _Backend.from_str(source), "it is damaged")
        if _LONG_NUMBER.search(source):  # looking at every id takes as long as loading
            _check_ids(backend)
        config = load_tokenizer_config(folder)
        _check_kind(backend)
        special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name)))}
        _guarded(lambda: _add_tokens(backend, config, special), "its added tokens are damaged")
        side = config.get("padding_side") or (backend.padding or {}).get("direction")
        # The file may keep lengths of a training run, which transformers passes over too.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, special, "left" if side == "left" else "right")

    def vocabulary_problem(self, vocab_size: int, named: Iterable[int]) -> str:
        """What makes this the tokenizer of another model; empty for nothing.

        Args:
            vocab_size: rows of the model's embedding, which may be more than there are tokens.
            named: ids that its configuration names.
        """
        if self.vocab_size > vocab_size:
            return f"{self.vocab_size} tokens, the model has {vocab_size}"
        beyond = [token for token in self._added if token >= vocab_size]
        if beyond:
            return f"an added token has the id {beyond[0]}, the model has {vocab_size}"
        unknown = [token for token in named if self.id_to_token(token) is None]
        return f"it has no token {unknown[0]}, which config.json names" if unknown else ""

    @cached_property
    def control_text(self) -> ControlText:
        """The characters that text from outside must not pass on to the template."""
        return ControlText(self._control.values(), normalizes=self._backend.normalizer is not None)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` in which control tokens count, as transformers gives them with ``add_special_tokens=False``.

        Raises:
            UsageError: `text` has a lone surrogate.
        """
        check_encodable(text, "text")
        ids: list[int] = _guarded(lambda: self._backend.encode(text, add_special_tokens=False).ids)
        return ids

    def encode_pair(self, text: str, pair: str | None = None) -> Encoding:
        """Encodes a text, or two in a row, as transformers' pipelines do: control tokens count, special ones are added.

        Raises:
            UsageError: a text has a lone surrogate.
        """
        for part in (text, pair or ""):
            check_encodable(part, "text")
        return _guarded(lambda: encode_texts(self._backend, text, pair))

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` in which nothing is a control token.

        Raises:
            UsageError: `text` has a lone surrogate.
        """
        check_encodable(text, "text")
        return self._encode_plain([text])[0]

    def encode_disguised(self, text: str, disguise: Disguise) -> list[int]:
        """Ids of a rendered text: control tokens where the template wrote them, plain text elsewhere.

        Merges never cross a control token, so without disguised text the ids are those of `encode`.
        """
        check_encodable(text, "text")
        pieces = self._split_at_control(text)
        plain = iter(self._encode_plain([disguise.show(piece) for piece in pieces if isinstance(piece, str)]))
        ids: list[int] = []
        for piece in pieces:
            ids += next(plain) if isinstance(piece, str) else [piece]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        hidden = self.hidden_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in hidden).decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id as it is in the vocabulary, or None."""
        found: str | None = self._backend.id_to_token(token_id) if token_id >= 0 else None
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for ids without a token (a padded vocabulary has such rows)."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = _bytes_of(self.id_to_token(token_id) or "")
        return known

    def _encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = _guarded(lambda: self._plain.encode_batch(list(texts), add_special_tokens=False))
        found: list[list[int]] = [encoding.ids for encoding in encodings]
        for ids in found:
            if not self.control_ids.isdisjoint(ids):
                raise BundleError("cannot tokenize", "tokenizer.json", "its merges make control tokens", _REMEDY)
        return found

    def _split_at_control(self, text: str) -> list[int | str]:
        """Control ids and the texts between them, in order."""
        encoding = _guarded(lambda: self._splitter.encode(text, add_special_tokens=False))
        return [
            token_id if token_id in self.control_ids else text[start:end]
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    @cached_property
    def _raw(self) -> dict[str, Any]:
        raw: dict[str, Any] = json.loads(self._backend.to_str())
        return raw | {"post_processor": None, "truncation": None, "padding": None}

    @cached_property
    def _plain(self) -> Any:
        """The same tokenizer without its control tokens, not even as results of merges."""
        control, model = set(self._control.values()), dict(self._raw["model"])
        added = [token for token in self._raw["added_tokens"] if token["content"] not in control]
        if not control.isdisjoint(model["vocab"]):
            model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in control}
            model["merges"] = [pair for pair in model["merges"] if control.isdisjoint(_merge_parts(pair))]
            model["unk_token"] = None
        # Added tokens outside the vocabulary would be numbered anew.
        model["vocab"] |= {token["content"]: token["id"] for token in added}
        return _build(self._raw | {"added_tokens": added, "model": model})

    @cached_property
    def _splitter(self) -> Any:
        """Knows the control tokens alone; everything between two of them is one token."""
        rest = "rest"
        while rest in self._control.values():
            rest += "-"
        vocab = {content: i for i, content in self._control.items()} | {rest: max(self._added, default=0) + 1}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": rest}
        added = [token for token in self._raw["added_tokens"] if token["id"] in self.control_ids]
        return _build(self._raw | {"added_tokens": added, "model": model, "pre_tokenizer": None})


def check_encodable(text: str, where: str) -> None:
    """Refuses text with a lone surrogate, which no UTF-8 can hold.

    Raises:
        UsageError: names the position.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        why = f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}"
        raise UsageError("cannot use text", where, why, "Pass valid Unicode") from error


def load_tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` as a dict; empty where there is none.

    Raises:
        BundleError: it cannot be read or is not a JSON object.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise BundleError("cannot read bundle", path.name, "it is not JSON", _REMEDY) from error
    if not isinstance(config, dict):
        raise BundleError("cannot read bundle", path.name, "it is not a JSON object", _REMEDY)
    return config


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise BundleError("cannot read bundle", path.name, f"it is larger than {LARGEST_FILE} bytes", _REMEDY)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError("cannot read bundle", path.name, error.strerror or "unreadable", _REMEDY) from error
    except UnicodeDecodeError as error:
        raise BundleError("cannot read bundle", path.name, "it is not UTF-8", _REMEDY) from error


def _guarded(call: Callable[[], Result], why: str = "it cannot be used") -> Result:
    """Runs a call into `tokenizers`, whose faults are bare Exceptions, or panics that are not even that."""
    try:
        with stderr_held_back():
            return call()
    except (ExaoneError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BundleError("cannot use tokenizer", "tokenizer.json", f"{why}: {detail}", _REMEDY) from error


def _build(raw: dict[str, Any]) -> Any:
    return _guarded(lambda: _Backend.from_str(json.dumps(raw)))


def _check_kind(backend: Any) -> None:
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    kinds = [decoder.get("type"), *(step.get("type") for step in decoder.get("decoders", []))]
    if type(backend.model).__name__ != "BPE" or "ByteLevel" not in kinds:
        why = f"it is {type(backend.model).__name__} with decoder {decoder.get('type')}, not byte-level BPE"
        raise BundleError("cannot use tokenizer", "tokenizer.json", why, _REMEDY)
    if backend.get_vocab_size(with_added_tokens=False) == 0:
        raise BundleError("cannot use tokenizer", "tokenizer.json", "its vocabulary is empty", _REMEDY)


def _check_ids(backend: Any) -> None:
    highest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= LARGEST_ID:
        raise BundleError("cannot use tokenizer", "tokenizer.json", f"it has a token of the id {highest}", _REMEDY)


def _add_tokens(backend: Any, config: dict[str, Any], special: dict[str, str]) -> None:
    """Adds what only ``tokenizer_config.json`` names, as transformers does."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    for token_id, flags in sorted(listed.items(), key=lambda item: int(item[0])):
        if flags["content"] in known:
            continue
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        backend.add_tokens([AddedToken(flags["content"], **{n: bool(flags[n]) for n in names if n in flags})])
        known.add(flags["content"])
        if backend.token_to_id(flags["content"]) != int(token_id):
            why = f"{printable(flags['content'], 60)!r} cannot be id {printable(token_id, 20)}"
            raise BundleError("cannot use tokenizer", "tokenizer_config.json", why, _REMEDY)
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    named = [*special.values(), *map(_token_text, extra.values() if isinstance(extra, dict) else extra)]
    for text in named:
        if text and text not in known and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            known.add(text)


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _is_control(token: Any) -> bool:
    """Special tokens, and tags by their look: added tokens may also be ordinary words or runs of spaces."""
    text = token.content
    if not text:
        return False
    tag = text[0] in string.punctuation and text[-1] in string.punctuation and any(map(str.isalnum, text))
    return bool(token.special or tag)


def _merge_parts(pair: str | Sequence[str]) -> tuple[str, str, str]:
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return left, right, left + right


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of GPT-2's byte-level BPE: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES: Final = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    # An added token is literal text; like tokenizers, tell by a character outside the alphabet.
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode("utf-8")
