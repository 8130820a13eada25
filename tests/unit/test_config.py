"""Every published spelling of config.json means the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.config import FULL, SLIDING, load_config, parse_config
from model.exaone import Exaone
from tests.published import EXAONE_4_1B, EXAONE_4_32B, EXAONE_45_33B, LLAMA3, Raw, with_text, with_vision, without


def parameters(module: torch.nn.Module | None) -> int:
    assert module is not None
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(raw: Raw, draft: bool = False) -> Exaone:
    with torch.device("meta"):
        return Exaone(parse_config(raw), draft=draft)


def test_published_45_has_the_published_number_of_parameters() -> None:
    model = on_meta(EXAONE_45_33B, draft=True)
    head = parameters(model.decoder.lm_head)
    assert parameters(model.embedding) + parameters(model.decoder) - head == 31_741_072_384
    assert parameters(model.vision_encoder) == 1_286_482_944
    assert parameters(model.mtp) - head == 536_110_336
    assert parameters(model) == 34_350_097_664


@pytest.mark.parametrize(("raw", "count"), [(EXAONE_4_32B, 32_003_216_384), (EXAONE_4_1B, 1_279_391_488)])
def test_published_40_has_the_published_number_of_parameters(raw: Raw, count: int) -> None:
    assert parameters(on_meta(raw)) == count


def test_published_45() -> None:
    config = parse_config(EXAONE_45_33B)
    assert config.model_type == "exaone4_5"
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (53,), 0)
    assert (config.image_token_id, config.video_token_id) == (67, 68)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (73, 74)
    text, vision = config.text, config.vision
    assert vision is not None
    assert (text.head_dim, text.sliding_window, text.tie_word_embeddings) == (128, 4096, False)
    assert text.layer_types == (SLIDING, SLIDING, SLIDING, FULL) * 16
    assert config.mtp is not None
    assert (config.mtp.num_layers, config.mtp.layer_type) == (1, SLIDING)
    assert (vision.head_dim, vision.patch_dim, vision.window_side) == (64, 1176, 8)
    assert vision.fullatt_block_indexes == (6, 13, 20, 27)
    assert (text.rope.theta, text.rope.rope_type, text.rope.factor) == (1e6, "llama3", 16.0)


def test_layers_of_a_hybrid_model() -> None:
    text = parse_config(EXAONE_4_32B).text
    assert [text.is_sliding(i) for i in range(4)] == [True, True, True, False]
    assert [text.uses_rope(i) for i in range(4)] == [True, True, True, False]
    assert [text.window(i) for i in range(4)] == [4096, 4096, 4096, None]


def test_layers_of_a_dense_model() -> None:
    text = parse_config(EXAONE_4_1B).text
    assert all(text.uses_rope(i) and text.window(i) is None for i in range(30))
    assert text.tie_word_embeddings


EQUAL_45: dict[str, Raw] = {
    "text type of transformers": with_text(model_type="exaone4"),
    "text type of the beta": with_text(model_type="exaone4_vl_text"),
    "text type missing": with_text(model_type=...),
    "64 layer types": with_text(layer_types=[SLIDING, SLIDING, SLIDING, FULL] * 16),
    "pattern only": with_text(layer_types=...),
    "int pattern": with_text(layer_types=..., sliding_window_pattern=4),
    "head_dim given": with_text(head_dim=128),
    "head_dim null": with_text(head_dim=None),
    "theta beside rope_parameters": with_text(rope_parameters=LLAMA3, rope_theta=1e6),
    "theta beside rope_scaling": with_text(rope_parameters=..., rope_scaling=LLAMA3, rope_theta=1e6),
    "theta inside rope_scaling": with_text(rope_parameters=..., rope_scaling=LLAMA3 | {"rope_theta": 1e6}),
    "rope_scaling before rope_parameters": with_text(
        rope_parameters=LLAMA3 | {"rope_theta": 5.0, "factor": 2.0}, rope_scaling=LLAMA3 | {"rope_theta": 1e6}
    ),
    "empty rope_scaling": with_text(rope_scaling={}),
    "theta both inside and beside": with_text(rope_theta=1e6),
    "type for rope_type": with_text(
        rope_parameters={k: v for k, v in LLAMA3.items() if k != "rope_type"} | {"type": "llama3", "rope_theta": 1e6}
    ),
    "draft keys in text_config": without(with_text(num_nextn_predict_layers=1), "num_nextn_predict_layers"),
    "no draft keys": without(EXAONE_45_33B, "num_nextn_predict_layers", "mtp_share_layers"),
    "tie in text_config": without(with_text(tie_word_embeddings=False), "tie_word_embeddings"),
    "image id as vision_token_id": without(EXAONE_45_33B, "image_token_id"),
    "list of eos": without(EXAONE_45_33B, eos_token_id=[53]),
    "ids in text_config": without(EXAONE_45_33B, "bos_token_id", "pad_token_id"),
    "in_chans": with_vision(in_channels=...),
    "vision theta given": with_vision(rope_parameters={"rope_type": "axial", "rope_theta": 10000.0}),
    "contradicting copies at the top": EXAONE_45_33B
    | {"sliding_window": None, "hidden_size": 64, "num_hidden_layers": 2, "rope_theta": 5.0, "layer_types": [FULL]},
}


@pytest.mark.parametrize("name", EQUAL_45)
def test_spellings_of_45_mean_the_same(name: str) -> None:
    assert parse_config(EQUAL_45[name]) == parse_config(EXAONE_45_33B)


EQUAL_4: dict[str, tuple[Raw, Raw]] = {
    "layer types for the pattern": (
        EXAONE_4_32B,
        without(EXAONE_4_32B, "sliding_window_pattern", layer_types=[SLIDING, SLIDING, SLIDING, FULL] * 16),
    ),
    "default pattern": (EXAONE_4_32B, without(EXAONE_4_32B, "sliding_window_pattern")),
    "null window without layer types": (EXAONE_4_1B, without(EXAONE_4_1B, "layer_types")),
    "no window key": (EXAONE_4_1B, without(EXAONE_4_1B, "sliding_window", "sliding_window_pattern")),
    "null window with a pattern": (
        EXAONE_4_1B,
        without(EXAONE_4_1B, "layer_types", sliding_window_pattern="LLLG"),
    ),
    "null layer types": (EXAONE_4_32B, without(EXAONE_4_32B, layer_types=None)),
    "theta moved inside": (
        EXAONE_4_32B,
        without(EXAONE_4_32B, "rope_theta", "rope_scaling", rope_parameters=LLAMA3 | {"rope_theta": 1e6}),
    ),
}


@pytest.mark.parametrize("name", EQUAL_4)
def test_spellings_of_4_mean_the_same(name: str) -> None:
    first, second = EQUAL_4[name]
    assert parse_config(first) == parse_config(second)


def test_an_int_pattern_leaves_the_last_layers_sliding() -> None:
    raw = without(EXAONE_4_32B, num_hidden_layers=6, sliding_window_pattern=4)
    assert parse_config(raw).text.layer_types == (SLIDING, SLIDING, SLIDING, FULL, SLIDING, SLIDING)


def test_a_pattern_word_repeats() -> None:
    raw = without(EXAONE_4_32B, num_hidden_layers=5, sliding_window_pattern="LG")
    assert parse_config(raw).text.layer_types == (SLIDING, FULL, SLIDING, FULL, SLIDING)


def test_the_extra_layer_type_is_the_draft_heads() -> None:
    config = parse_config(with_text(layer_types=[SLIDING, SLIDING, SLIDING, FULL] * 16 + [FULL]))
    assert config.mtp is not None
    assert config.mtp.layer_type == FULL


def test_plain_rope_without_scaling() -> None:
    rope = parse_config(without(EXAONE_4_32B, "rope_scaling")).text.rope
    assert (rope.theta, rope.rope_type) == (1e6, "default")


def test_a_byte_order_mark_and_unknown_keys_do_no_harm(tmp_path: Path) -> None:
    raw = EXAONE_4_1B | {"cache_implementation": "hybrid", "torch_dtype": "bfloat16", "_name_or_path": "x"}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8-sig")
    assert load_config(tmp_path) == parse_config(EXAONE_4_1B)
