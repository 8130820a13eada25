"""Prompts of many megabytes: refused by their beginning, and never one that would fit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import normalizers

from exaone_export.demo import checkpoint_folder
from model.errors import UsageError
from runtime.encoder_inputs import RowBuilder
from runtime.messages import build_messages
from runtime.prompt import far_too_long, render_prompt
from runtime.template import TemplateRenderer
from runtime.tokenizer import Tokenizer
from tests.unit.chat_templates import STYLE_45
from tests.unit.tiny_tokenizer import make_backend, write_tokenizer

MEGABYTES = 5_000_000
KINDS: dict[str, Callable[[random.Random], str]] = {
    "words": lambda noise: noise.choice(["hello ", "the tool; ", "think again. ", "x", "\n"]),
    "korean": lambda noise: noise.choice(["이 이미지를 ", "설명해 줘. ", "대단한지"]),
    "one letter": lambda noise: "a" * noise.randint(1, 40),
    "one word": lambda noise: noise.choice(["hello", "think", "이미지"]),
    "space": lambda noise: noise.choice([" ", "\n", "\t"]) * noise.randint(1, 40),
    "marks": lambda noise: noise.choice(["<think>", "<|image_pad|>", "<", "|>", "<|user|>", "."]),
    "composed": lambda noise: noise.choice(["e\u0301", "\u1112\u1161\u11ab", "q\u0307\u0323", "\u212b"]),
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    with TemplateRenderer(STYLE_45) as opened:
        yield opened


@pytest.fixture(scope="module", params=["tiny", "normalizes", "words of several words"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "words of several words":
        return Tokenizer.load(checkpoint_folder())
    backend = make_backend()
    if request.param == "normalizes":
        backend.normalizer = normalizers.NFC()
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("bundle"), backend))


def watched(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the texts that are tokenized from here on."""
    seen: list[int] = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, text: str) -> list[int]:
        seen.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    for name in ("encode_pair", "encode_plain", "encode_disguised"):
        monkeypatch.setattr(Tokenizer, name, None)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_does_not_fit_is_too_long(kind: str, tokenizer: Tokenizer) -> None:
    noise = random.Random(kind)
    text = "".join(KINDS[kind](noise) for _ in range(12_000))
    tokens = len(tokenizer.encode(text))
    for most in (1, 10, 100, tokens // 8, tokens // 4, tokens // 2, tokens - 1):
        if far_too_long(tokenizer, text, most):
            assert tokens > most
    assert not far_too_long(tokenizer, text, tokens)
    assert far_too_long(tokenizer, text, 10) or tokens < 10_000


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"marks"}))
def test_megabytes_are_refused_by_their_beginning(
    kind: str, tokenizer: Tokenizer, renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = random.Random(kind)
    piece = "".join(KINDS[kind](noise) for _ in range(3000))
    messages = build_messages("x" + (piece * (MEGABYTES // len(piece) + 1))[:MEGABYTES])
    seen = watched(tokenizer, monkeypatch)
    with pytest.raises(UsageError, match=r"prompt too long: .* more than 2560 tokens and the context holds 2048"):
        render_prompt(renderer, tokenizer, messages, context=2048)
    assert sum(seen) < MEGABYTES / 50


def test_marks_in_the_text_are_refused_likewise(
    renderer: TemplateRenderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    seen = watched(tokenizer, monkeypatch)
    with pytest.raises(UsageError, match="prompt too long"):
        render_prompt(renderer, tokenizer, build_messages("<think> again. " * 10_000), context=2048)
    assert sum(seen) < 30_000


def test_without_a_limit_everything_is_tokenized(renderer: TemplateRenderer, tokenizer: Tokenizer) -> None:
    messages = build_messages("hello, think again. " * 2000)
    prompt = render_prompt(renderer, tokenizer, messages)
    assert len(prompt.token_ids) > 4000
    assert render_prompt(renderer, tokenizer, messages, context=len(prompt.token_ids)) == prompt


def test_texts_for_encoders(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    context: Any = SimpleNamespace(text=SimpleNamespace(max_position_embeddings=2048))
    requests: Any = SimpleNamespace(tokenizer=tokenizer)
    rows = RowBuilder(requests, context)
    assert rows.encoding("texts[0]", "hello").ids
    seen = watched(tokenizer, monkeypatch)
    for text, pair in (("hello " * 1_000_000, None), ("hello", "hello " * 1_000_000)):
        with pytest.raises(UsageError, match=r"text too long: texts\[0\]: .* 2048"):
            rows.encoding("texts[0]", text, pair)
    assert sum(seen) < 100_000
