"""What config.json may not say: each is refused by its key."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.config import FULL, SLIDING, ExaoneConfig, load_config, parse_config
from model.errors import CheckpointError, ExaoneError, UsageError
from tests.published import EXAONE_4_1B, EXAONE_4_32B, EXAONE_45_33B, LLAMA3, Raw, with_text, with_vision, without

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
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        parse_config(raw)
    assert key in caught.value.where
    assert time.process_time() - started < 1


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
    "bitsandbytes": EXAONE_4_32B | {"quantization_config": {"quant_method": "bitsandbytes"}},
    "AWQ of another layout": EXAONE_4_32B | {"quantization_config": {"quant_method": "awq", "version": "gemv"}},
    "quantized by nobody": EXAONE_4_32B | {"compression_config": {"bits": 4}},
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
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("text", ["1e400", "-1e400", "NaN", "Infinity"])
def test_numbers_that_are_none(tmp_path: Path, text: str) -> None:
    raw = json.dumps(EXAONE_4_1B | {"rope_theta": 12345}).replace("12345", text)
    (tmp_path / "config.json").write_text(raw)
    with pytest.raises(CheckpointError, match="rope_theta"):
        load_config(tmp_path)


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
