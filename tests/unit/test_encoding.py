"""Texts of encoders become the ids that transformers' tokenizers give by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from model.errors import UsageError
from runtime.encoder_inputs import batches, check_last_tokens, checked_mask
from runtime.tokenizer import Tokenizer
from tests.tiny import SPECIAL, tokenizer_json, write_assets

TEXTS = ("It rains.", "하늘은 왜 파란가요?", "<|endofturn|> in a text", "  two  spaces ", "<|pad|>")
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|bos|>", "type_id": 1}},
             {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [1], "tokens": ["<|bos|>"]}},
}  # fmt: skip
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LENGTHS = {
    "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<|pad|>"},
}  # fmt: skip


def folder_with(folder: Path, tokenizer: dict[str, Any], config: dict[str, Any]) -> Path:
    folder.mkdir()
    write_assets(folder, vision=False)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json() | tokenizer))
    known = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(known | config))
    return folder


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True, "add_eos_token": True, "padding_side": "right"}])
@pytest.mark.parametrize("after", [None, TEMPLATE, BYTES], ids=["plain", "template", "bytes"])
def test_as_transformers(after: dict[str, Any] | None, config: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "tokenizer", {"post_processor": after} | LENGTHS, config)
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.padding_side == theirs.padding_side
    for text in TEXTS:
        for pair in (None, TEXTS[1]):
            expected = theirs(text, pair, return_offsets_mapping=True)
            found = ours.encode_pair(text, pair)
            assert list(found.ids) == expected["input_ids"]
            assert list(found.parts) == expected.sequence_ids(0)
            of_text = [i for i, part in enumerate(found.parts) if part is not None]
            assert [found.offsets[i] for i in of_text] == [expected["offset_mapping"][i] for i in of_text]


def test_lengths_of_a_training_run_do_not_cut_prompts(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_with(tmp_path / "tokenizer", LENGTHS, {}))
    assert len(tokenizer.encode("ten letters")) == 11
    assert tokenizer.padding_side == "left"


def test_text_that_is_no_unicode(tmp_path: Path) -> None:
    plain = Tokenizer.load(folder_with(tmp_path / "plain", {}, {}))
    with pytest.raises(UsageError, match="lone surrogate"):
        plain.encode_pair("fine", "\ud800")


def test_batches_hold_so_many_tokens() -> None:
    rows = [[7] * length for length in (3, 5, 2, 9, 1)]
    found = list(batches(rows, pad_id=SPECIAL["<|pad|>"], most=10))
    assert [list(batch.rows) for batch in found] == [[0, 1], [2], [3], [4]]
    for batch in found:
        assert batch.mask.sum(1).tolist() == [len(rows[i]) for i in batch.rows]
        assert (batch.ids == 7 * batch.mask).all()
    assert [list(batch.rows) for batch in batches(rows, 0, most=0)] == [[0], [1], [2], [3], [4]]
    assert list(batches([], 0)) == []


def test_a_classifier_does_not_look_at_padding() -> None:
    ids, mask = np.array([[7, 8, 0], [7, 0, 9]]), np.array([[1, 1, 0], [1, 1, 1]], np.bool_)
    check_last_tokens(ids, mask, pad_id=0)
    with pytest.raises(UsageError, match="2 rows, and config.json names no pad_token_id"):
        check_last_tokens(ids, mask, pad_id=None)
    with pytest.raises(UsageError, match="row 0"):
        check_last_tokens(ids[:1], mask[:1], pad_id=None)  # the last column
    with pytest.raises(UsageError, match="row 1"):
        check_last_tokens(ids, np.array([[1, 1, 0], [1, 1, 0]], np.bool_), pad_id=0)


def test_masks() -> None:
    ids = np.ones((3, 4), np.int64)
    assert checked_mask(None, ids).all()
    sides = [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]
    assert checked_mask(np.array(sides, np.bool_), ids).astype(int).tolist() == sides
    for row in ([1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 2], [0, -1, 1, 1]):
        with pytest.raises(UsageError, match="row 2 is not ones side by side"):
            checked_mask([*sides[:2], row], ids)
