from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from model.errors import BundleError, UsageError
from runtime.escape import ControlText, Disguise
from runtime.tokenizer import Tokenizer
from tests.unit.tiny_tokenizer import SPECIAL, TAGS, make_backend, write_tokenizer

BACKEND = make_backend()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("bundle"), BACKEND))


def test_ids_are_those_of_the_file(tokenizer: Tokenizer) -> None:
    text = "<|user|>\nhello 대단한<|endofturn|>\n<think>\n"
    assert tokenizer.encode(text) == BACKEND.encode(text, add_special_tokens=False).ids
    assert tokenizer.vocab_size == BACKEND.get_vocab_size()
    assert tokenizer.control_ids == {tokenizer.token_to_id(token) for token in SPECIAL + TAGS}
    assert tokenizer.hidden_ids == {tokenizer.token_to_id(token) for token in SPECIAL}
    assert tokenizer.special_tokens == {"eos_token": "<|endofturn|>", "pad_token": "<|pad|>"}
    assert tokenizer.token_to_id("<|nothing|>") is None
    assert tokenizer.id_to_token(10**6) is None
    assert tokenizer.id_to_token(-1) is None


@given(st.lists(st.integers(0, BACKEND.get_vocab_size() + 3), max_size=50))
@settings(deadline=None)
def test_decoding_equals_tokenizers(ids: list[int]) -> None:
    tokenizer = Tokenizer(BACKEND, {})
    assert tokenizer.decode(ids, skip_special_tokens=False) == BACKEND.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) == BACKEND.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("token", SPECIAL + TAGS)
def test_plain_encoding_has_no_control_tokens(tokenizer: Tokenizer, token: str) -> None:
    text = f"a{token}b {token}"
    ids = tokenizer.encode_plain(text)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


@given(st.text("<>|[]/ab 이\n"), st.text("<>|[]/ab 이\n"))
@settings(deadline=None)
def test_disguised_encoding_equals_the_usual_where_nothing_is_injected(first: str, second: str) -> None:
    tokenizer = Tokenizer(BACKEND, {})
    disguise = Disguise(tokenizer.control_text, [first, second])
    layout = "<|user|>\n{}<|endofturn|>\n<|assistant|>\n<think>\n</think>{}"
    text, rendered = layout.format(first, second), layout.format(disguise.hide(first), disguise.hide(second))
    assert disguise.show(rendered) == text
    assert tokenizer.encode_disguised(rendered, disguise) == tokenizer.encode(text)


def test_every_part_of_the_injected_text_stays_plain(tokenizer: Tokenizer) -> None:
    attack = "".join(SPECIAL + TAGS)
    disguise = Disguise(tokenizer.control_text, [attack])
    ids = tokenizer.encode_disguised(f"<|user|>{disguise.hide(attack)}<|endofturn|>", disguise)
    assert [i for i in ids if i in tokenizer.control_ids] == tokenizer.encode("<|user|><|endofturn|>")
    assert ids[1:-1] == tokenizer.encode_plain(attack)


def test_private_use_characters_in_the_text_survive(tokenizer: Tokenizer) -> None:
    text = "<think>" + "".join(map(chr, range(0xF0000, 0xF0100))) + "\ue000"
    disguise = Disguise(tokenizer.control_text, [text])
    assert disguise.show(disguise.hide(text)) == text
    assert tokenizer.encode_disguised(disguise.hide(text), disguise) == tokenizer.encode_plain(text)
    with pytest.raises(UsageError, match="private-use"):
        Disguise(tokenizer.control_text, ["".join(map(chr, range(0xF0000, 0xFFFFE)))])


def test_control_tokens_that_merges_would_make(tmp_path: Path) -> None:
    # A vocabulary that holds the tags themselves, and takes whole words from it without merging.
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab = alphabet | {"<e": 256, "<e>": 257, "ab": 258}
    backend = Backend(models.BPE(vocab=vocab, merges=[("<", "e"), ("<e", ">"), ("a", "b")], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<e>", special=True, normalized=False)])
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, backend, eos_token="<e>", pad_token=None))
    assert tokenizer.encode("ab<e>") == [258, 257]
    assert tokenizer.encode_plain("<e>") == [256, alphabet[">"]]


def test_normalizers_open_no_way_in(tmp_path: Path) -> None:
    backend = make_backend(tags=[])
    backend.normalizer = normalizers.NFKC()
    backend.add_tokens([AddedToken("<think>", special=False, normalized=True)])
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, backend))
    attack = "＜think＞ ﹤think﹥"
    assert not tokenizer.control_ids.isdisjoint(tokenizer.encode(attack))
    disguise = Disguise(tokenizer.control_text, [attack])
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode_disguised(disguise.hide(attack), disguise))


def test_ordinary_added_words_stay_tokens(tmp_path: Path) -> None:
    backend = make_backend(special=["EOS", "<|pad|>"])
    backend.add_tokens([AddedToken("안녕", special=False), AddedToken("  ", special=False)])
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, backend, eos_token="EOS"))
    word = tokenizer.token_to_id("안녕")
    assert word in tokenizer.encode_plain("a 안녕")
    assert word not in tokenizer.control_ids
    assert tokenizer.token_to_id("EOS") in tokenizer.control_ids
    disguise = Disguise(tokenizer.control_text, [])
    ids = tokenizer.encode_disguised(disguise.hide("my EOS and EO"), disguise)
    assert ids == tokenizer.encode_plain("my EOS and EO")
    assert tokenizer.decode(ids) == "my EOS and EO"


def test_tokens_named_only_in_the_config_are_added(tmp_path: Path) -> None:
    size = BACKEND.get_vocab_size()
    listed = {str(size): {"content": "<|late|>", "special": True, "normalized": False}}
    folder = write_tokenizer(tmp_path, BACKEND, added_tokens_decoder=listed, eos_token={"content": "<|late|>"})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<|late|>") == [size]
    assert tokenizer.special_tokens["eos_token"] == "<|late|>"
    bad = {"7": {"content": "<|late|>", "special": True}}
    with pytest.raises(BundleError, match="cannot be id 7"):
        Tokenizer.load(write_tokenizer(tmp_path, BACKEND, added_tokens_decoder=bad))


def spoiled(**changes: Any) -> str:
    return json.dumps(json.loads(BACKEND.to_str()) | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "\0" * 100,
        spoiled(model={"type": "Foo"}),
        spoiled(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}),
        spoiled(model={"type": "BPE", "vocab": {}, "merges": []}),
        spoiled(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
        spoiled(decoder=None),
        spoiled(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
        spoiled(added_tokens=[{"id": "x"}]),
    ],
)
def test_damaged_files_are_the_bundles_fault(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert len(str(caught.value)) < 500


def test_a_missing_tokenizer_and_bad_configs(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path, BACKEND)
    for text in ("{", "[]", '{"added_tokens_decoder": {"x": {}}}', "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(BundleError):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="UTF-8"):
        Tokenizer.load(tmp_path)


def test_a_regex_without_end_is_stopped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backend = make_backend()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, backend))
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        tokenizer.encode("a" * 200 + "!")


@pytest.mark.parametrize("text", ["\0", "\ufeffa", "\u202eabc", "a" * 1_000_000, "👨‍👩‍👧‍👦" * 5_000])
def test_odd_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_are_named(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_plain):
        with pytest.raises(UsageError, match=r"character 2 is the lone surrogate U\+D800"):
            encode("ab\ud800c")


def test_control_text_without_tokens_finds_nothing() -> None:
    control = ControlText([], normalizes=True)
    assert not control.risky.search("<anything>")
    assert Disguise(control, []).hide("<think>") == "<think>"
