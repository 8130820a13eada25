"""Every published spelling of config.json, and what is refused by name."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import FULL, SLIDING, ExaoneConfig, load_config, parse_config
from model.errors import CheckpointError, ExaoneError, UsageError
from model.exaone import Exaone

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXAONE_4_32B: dict[str, Any] = {
    "architectures": ["Exaone4ForCausalLM"],
    "model_type": "exaone4",
    "vocab_size": 102400,
    "hidden_size": 5120,
    "intermediate_size": 27392,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": LLAMA3,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "pad_token_id": 0,
}
EXAONE_4_1B: dict[str, Any] = EXAONE_4_32B | {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "sliding_window": None,
    "sliding_window_pattern": None,
    "layer_types": [FULL] * 30,
    "tie_word_embeddings": True,
}
TEXT_45: dict[str, Any] = {
    key: value
    for key, value in EXAONE_4_32B.items()
    if key not in ("architectures", "rope_theta", "rope_scaling", "tie_word_embeddings")
} | {
    "model_type": "exaone4_5_text",
    "vocab_size": 153600,
    "max_position_embeddings": 262144,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 16 + [SLIDING],
    "rope_parameters": LLAMA3 | {"rope_theta": 1e6},
}
EXAONE_45_33B: dict[str, Any] = {
    "architectures": ["Exaone4_5_ForConditionalGeneration"],
    "model_type": "exaone4_5",
    "text_config": TEXT_45,
    "vision_config": {
        "model_type": "exaone4_5_vision",
        "depth": 28,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "hidden_act": "silu",
        "num_heads": 32,
        "num_key_value_heads": 8,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [6, 13, 20, 27],
        "out_hidden_size": 5120,
        "in_channels": 3,
        "in_chans": 3,
    },
    "num_nextn_predict_layers": 1,
    "mtp_share_layers": False,
    "mtp_loss_scaling_factor": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 53,
    "pad_token_id": 0,
    "image_token_id": 67,
    "video_token_id": 68,
    "vision_token_id": 67,
    "vision_start_token_id": 73,
    "vision_end_token_id": 74,
}
Raw = dict[str, Any]


def with_text(**changes: Any) -> Raw:
    """The published 4.5 configuration with other values under text_config; `...` removes a key."""
    raw = copy.deepcopy(EXAONE_45_33B)
    raw["text_config"] = {k: v for k, v in (raw["text_config"] | changes).items() if v is not ...}
    return raw


def with_vision(**changes: Any) -> Raw:
    """Likewise under vision_config."""
    raw = copy.deepcopy(EXAONE_45_33B)
    raw["vision_config"] = {k: v for k, v in (raw["vision_config"] | changes).items() if v is not ...}
    return raw


def without(raw: Raw, *keys: str, **changes: Any) -> Raw:
    """A copy without some keys, then with others."""
    return {key: value for key, value in raw.items() if key not in keys} | changes


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


REFUSED: dict[str, tuple[Raw, str]] = {
    "no theta": (without(EXAONE_4_32B, "rope_theta"), "rope_theta"),
    "theta NaN": (EXAONE_4_32B | {"rope_theta": float("nan")}, "rope_theta"),
    "theta 0": (EXAONE_4_32B | {"rope_theta": 0}, "rope_theta"),
    "theta infinite": (EXAONE_4_32B | {"rope_theta": float("inf")}, "rope_theta"),
    "yarn": (EXAONE_4_32B | {"rope_scaling": LLAMA3 | {"rope_type": "yarn"}}, "rope_type"),
    "llama3 without factor": (EXAONE_4_32B | {"rope_scaling": without(LLAMA3, "factor")}, "factor"),
    "equal frequency factors": (EXAONE_4_32B | {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor"),
    "rope per layer type": (
        without(EXAONE_4_32B, "rope_scaling", rope_parameters={FULL: LLAMA3, SLIDING: LLAMA3}),
        "rope_parameters",
    ),
    "partial rotation": (
        EXAONE_4_32B | {"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "gelu": (EXAONE_4_32B | {"hidden_act": "gelu"}, "hidden_act"),
    "attention_bias": (EXAONE_4_32B | {"attention_bias": True}, "attention_bias"),
    "mlp_bias": (with_text(mlp_bias=True), "text_config.mlp_bias"),
    "text_config of another family": (with_text(model_type="llama"), "text_config.model_type"),
    "text_config missing": (without(EXAONE_45_33B, "text_config"), "text_config"),
    "text_config a list": (EXAONE_45_33B | {"text_config": []}, "text_config"),
    "vision_config missing": (without(EXAONE_45_33B, "vision_config"), "vision_config"),
    "vision gelu": (with_vision(hidden_act="gelu"), "vision_config.hidden_act"),
    "vision width": (with_vision(out_hidden_size=4096), "out_hidden_size"),
    "vision full blocks missing": (with_vision(fullatt_block_indexes=...), "fullatt_block_indexes"),
    "vision full block 28": (with_vision(fullatt_block_indexes=[28]), "fullatt_block_indexes"),
    "vision window below a unit": (with_vision(window_size=14), "window_size"),
    "image token beyond the vocabulary": (EXAONE_45_33B | {"image_token_id": 153600}, "image_token_id"),
    "63 layer types": (with_text(layer_types=[FULL] * 63), "layer_types"),
    "66 layer types": (with_text(layer_types=[FULL] * 66), "layer_types"),
    "65 layer types without a draft head": (EXAONE_4_32B | {"layer_types": [FULL] * 65}, "layer_types"),
    "unknown layer type": (with_text(layer_types=["chunked_attention"] * 64), "layer_types"),
    "unhashable layer type": (with_text(layer_types=[[]] * 64), "layer_types"),
    "window types without window": (
        EXAONE_4_32B | {"sliding_window": None, "layer_types": [SLIDING] * 64},
        "sliding_window",
    ),
    "pattern of other letters": (EXAONE_4_32B | {"sliding_window_pattern": "LLXG"}, "sliding_window_pattern"),
    "pattern 0": (EXAONE_4_32B | {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    "window 0": (EXAONE_4_32B | {"sliding_window": 0}, "sliding_window"),
    "window true": (EXAONE_4_32B | {"sliding_window": True}, "sliding_window"),
    "billion layers": (EXAONE_4_32B | {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "no heads": (EXAONE_4_32B | {"num_attention_heads": 0}, "num_attention_heads"),
    "heads that do not divide": (EXAONE_4_32B | {"num_attention_heads": 48}, "num_attention_heads"),
    "kv heads that do not divide": (EXAONE_4_32B | {"num_key_value_heads": 7}, "num_key_value_heads"),
    "odd head_dim": (EXAONE_4_32B | {"head_dim": 127}, "head_dim"),
    "head_dim that no kernel takes": (EXAONE_4_32B | {"head_dim": 20}, "head_dim"),
    "huge vocabulary": (EXAONE_4_32B | {"vocab_size": 10**12}, "vocab_size"),
    "huge context": (EXAONE_4_32B | {"max_position_embeddings": 10**8}, "max_position_embeddings"),
    "hidden as text": (EXAONE_4_32B | {"hidden_size": "5120"}, "hidden_size"),
    "hidden missing": (without(EXAONE_4_32B, "hidden_size"), "hidden_size"),
    "hidden fractional": (EXAONE_4_32B | {"hidden_size": 5120.5}, "hidden_size"),
    "epsilon 0": (EXAONE_4_32B | {"rms_norm_eps": 0}, "rms_norm_eps"),
    "tie as text": (EXAONE_4_32B | {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    "eos as text": (EXAONE_4_32B | {"eos_token_id": "361"}, "eos_token_id"),
    "negative eos": (EXAONE_4_32B | {"eos_token_id": [-1]}, "eos_token_id"),
    "own code": (EXAONE_4_32B | {"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_at_once(name: str) -> None:
    raw, key = REFUSED[name]
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        parse_config(raw)
    assert key in caught.value.where
    assert time.perf_counter() - started < 1


OTHER_MODELS: dict[str, Raw] = {
    "EXAONE 3.5": {"model_type": "exaone", "architectures": ["ExaoneForCausalLM"]},
    "EXAONE 3.5 with its code": {
        "model_type": "exaone",
        "auto_map": {"AutoConfig": "configuration_exaone.ExaoneConfig"},
    },
    "K-EXAONE": {"model_type": "exaone_moe"},
    "llama": {"model_type": "llama"},
    "only an architecture": {"architectures": ["LlamaForCausalLM"]},
    "nothing": {},
    "a number": {"model_type": 4},
    "a list": {"model_type": ["exaone4"]},
    "AWQ": EXAONE_4_32B | {"quantization_config": {"quant_method": "awq"}},
    "compressed": EXAONE_4_32B | {"compression_config": {"quant_method": "compressed-tensors"}},
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(OTHER_MODELS[name])
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1


def write_deep(path: Path) -> None:
    path.write_text('{"a":' * 5000 + "1" + "}" * 5000)


def write_too_large(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(200_000_000)


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_text(""),
    "blank": lambda path: path.write_text(" \n"),
    "not JSON": lambda path: path.write_text("{model_type: exaone4}"),
    "cut": lambda path: path.write_text(json.dumps(EXAONE_4_1B)[:-5]),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "not UTF-8": lambda path: path.write_bytes(b'{"model_type": "\xff\xfe"}'),
    "a key twice": lambda path: path.write_text('{"model_type": "exaone4", "model_type": "exaone4_5"}'),
    "5000 deep": write_deep,
    "200 MB": write_too_large,
    "number of 9999 digits": lambda path: path.write_text('{"model_type": ' + "9" * 9999 + "}"),
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_bad_checkpoint(tmp_path: Path, name: str) -> None:
    BAD_FILES[name](tmp_path / "config.json")
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("text", ["1e400", "-1e400", "NaN", "Infinity"])
def test_numbers_that_are_none(tmp_path: Path, text: str) -> None:
    raw = json.dumps(EXAONE_4_1B | {"rope_theta": 12345}).replace("12345", text)
    (tmp_path / "config.json").write_text(raw)
    with pytest.raises(CheckpointError, match="rope_theta"):
        load_config(tmp_path)


def test_a_byte_order_mark_and_unknown_keys_do_no_harm(tmp_path: Path) -> None:
    raw = EXAONE_4_1B | {"cache_implementation": "hybrid", "torch_dtype": "bfloat16", "_name_or_path": "x"}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8-sig")
    assert load_config(tmp_path) == parse_config(EXAONE_4_1B)


@pytest.mark.parametrize("published", [EXAONE_4_1B, EXAONE_4_32B, EXAONE_45_33B], ids=["1.2B", "32B", "4.5"])
def test_no_single_wrong_value_escapes_as_another_error(published: Raw) -> None:
    values: list[Any] = [None, -1, 0, 1.5, "x", "", [], {}, [None], True, 10**30, float("nan")]
    parts = [part for part in ("text_config", "vision_config") if part in published]
    places = [(None, key) for key in published] + [(part, key) for part in parts for key in published[part]]
    for part, key in places:
        for value in values:
            raw = copy.deepcopy(published)
            (raw[part] if part else raw)[key] = value
            try:
                config = parse_config(raw)
            except ExaoneError:
                continue
            assert isinstance(config, ExaoneConfig)
