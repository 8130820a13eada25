"""quantization_config as the writers of quantized checkpoints put it down, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.config import load_config, parse_config
from model.errors import CheckpointError, ExaoneError, UsageError
from model.quantization import Quantization, WeightScheme
from tests import tiny

GPTQ: dict[str, Any] = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "damp_percent": 0.005,
    "checkpoint_format": "gptq", "lm_head": False, "true_sequential": True, "static_groups": False,
    "meta": {"quantizer": ["gptqmodel:2.0.0"]},
}  # fmt: skip
AWQ: dict[str, Any] = {
    "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": ["visual"],
}  # fmt: skip
FP8: dict[str, Any] = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3",
}  # fmt: skip


def compressed(form: str = "pack-quantized", weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    arguments = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
        "actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax",
    } | (weights or {})  # fmt: skip
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["re:.*visual.*", "lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    } | more


def parse(raw: object, key: str = "quantization_config") -> Quantization | None:
    return parse_config(tiny.make_config("hybrid") | {key: raw}).quantization


def test_an_ordinary_checkpoint_has_none() -> None:
    assert parse_config(tiny.make_config("hybrid")).quantization is None
    assert parse(None) is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (GPTQ, Quantization("gptq", (WeightScheme(4, group_size=128),), zero_points_less_one=True)),
        (
            GPTQ | {"checkpoint_format": "gptq_v2", "bits": 8, "group_size": -1, "sym": False, "desc_act": True},
            Quantization("gptq", (WeightScheme(8, symmetric=False, act_order=True),)),
        ),
        (
            {key: GPTQ[key] for key in ("quant_method", "bits", "group_size", "desc_act", "sym")},
            Quantization("gptq", (WeightScheme(4, group_size=128),), zero_points_less_one=True),
        ),
        (
            GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}},
            Quantization("gptq", (WeightScheme(4, group_size=128),), zero_points_less_one=True, overrides=True),
        ),
        (AWQ, Quantization("awq", (WeightScheme(4, group_size=128, symmetric=False),))),
        (AWQ | {"version": "GEMM", "zero_point": False}, Quantization("awq", (WeightScheme(4, group_size=128),))),
        (FP8, Quantization("fp8", (WeightScheme(8, "float", block=(128, 128)),), activations=True)),
        (
            {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
            Quantization("fbgemm_fp8", (WeightScheme(8, "float"),), activations=True),
        ),
        (compressed(), Quantization("compressed-tensors", (WeightScheme(4, group_size=128),))),
        (
            compressed(weights={"symmetric": False, "group_size": 32, "actorder": "group"}),
            Quantization("compressed-tensors", (WeightScheme(4, "int", 32, symmetric=False, act_order=True),)),
        ),
        (
            compressed(weights={"actorder": "static", "strategy": None}),
            Quantization("compressed-tensors", (WeightScheme(4, group_size=128),)),
        ),
        (
            compressed("int-quantized", {"num_bits": 8, "strategy": "channel", "group_size": None}),
            Quantization("compressed-tensors", (WeightScheme(8),)),
        ),
        (
            compressed(
                "float-quantized",
                {"num_bits": 8, "type": "float", "strategy": "block", "group_size": None, "block_structure": "64x32"},
                kv_cache_scheme={"num_bits": 8},
            ),
            Quantization("compressed-tensors", (WeightScheme(8, "float", block=(64, 32)),), activations=True),
        ),
    ],
)
def test_every_writer_s_spelling(raw: dict[str, Any], expected: Quantization) -> None:
    assert parse(raw) == expected


def test_several_groups_of_compressed_tensors() -> None:
    raw = compressed()
    raw["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "dynamic": True},
        "format": "int-quantized",
    }
    found = parse(raw | {"format": "mixed-precision"})
    assert found is not None
    assert found.schemes == (WeightScheme(4, group_size=128), WeightScheme(8))
    assert found.activations


def test_where_it_may_stand(tmp_path: Path) -> None:
    expected = Quantization("gptq", (WeightScheme(4, group_size=128),), zero_points_less_one=True)
    assert parse(GPTQ, "compression_config") == expected
    nested = tiny.make_config("vlm")
    nested["text_config"]["quantization_config"] = GPTQ
    assert parse_config(nested).quantization == expected
    # AutoGPTQ's and AutoAWQ's own files, from before transformers knew of them.
    (tmp_path / "config.json").write_text(json.dumps(tiny.make_config("hybrid")))
    assert load_config(tmp_path).quantization is None
    awq = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(awq))
    assert load_config(tmp_path).quantization == Quantization("awq", (WeightScheme(4, "int", 64, symmetric=False),))
    old = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True, "model_name_or_path": ""}
    (tmp_path / "quantize_config.json").write_text(json.dumps(old))
    assert load_config(tmp_path).quantization == expected


@pytest.mark.parametrize(
    ("raw", "key", "shown"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method", "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "quant_method", "mxfp4"),
        ({"quant_method": "gguf"}, "quant_method", "gguf"),
        ({"quant_method": "hqq", "quant_config": {}}, "quant_method", "hqq"),
        ({"quant_method": ["gptq"]}, "quant_method", "['gptq']"),
        ({}, "quant_method", "None"),
        (GPTQ | {"bits": 3}, "bits", "3 bits"),
        (GPTQ | {"bits": 2}, "bits", "2 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format", "marlin"),
        (GPTQ | {"is_marlin_format": True}, "checkpoint_format", "marlin"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype", "int64"),
        (AWQ | {"bits": 8}, "bits", "8 bits"),
        (AWQ | {"version": "gemv"}, "version", "gemv"),
        (AWQ | {"version": "GEMV_fast"}, "version", "gemv_fast"),
        (AWQ | {"version": "exllama"}, "version", "exllama"),
        (AWQ | {"version": "marlin"}, "version", "marlin"),
        (compressed("nvfp4-pack-quantized"), "format", "nvfp4-pack-quantized"),
        (compressed("marlin-24"), "format", "marlin-24"),
        (compressed(weights={"num_bits": 3}), "config_groups.group_0.weights.num_bits", "3-bit int"),
        (compressed(weights={"num_bits": 4, "type": "float"}), "config_groups.group_0.weights.num_bits", "4-bit float"),
        (compressed(weights={"strategy": "tensor_group"}), "config_groups.group_0.weights.strategy", "tensor_group"),
        (compressed(weights={"strategy": "block"}), "config_groups.group_0.weights.strategy", "block"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config", "sparse-24-bitmask"),
        (
            compressed(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}),
            "transform_config",
            "weights that need transformed inputs",
        ),
    ],
)
def test_what_cannot_be_imported_is_named(raw: dict[str, Any], key: str, shown: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(raw)
    assert caught.value.exit_code == 2
    assert caught.value.where == f"config.json: quantization_config.{key}"
    assert caught.value.why == f"quantization {shown!r} cannot be imported"
    assert "Supported are compressed-tensors (int4, int8, FP8), GPTQ and AWQ (gemm) of 4 or 8 bits, and FP8" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "raw",
    [
        GPTQ | {"bits": "four"},
        GPTQ | {"group_size": 0},
        GPTQ | {"group_size": -2},
        GPTQ | {"sym": "yes"},
        FP8 | {"weight_block_size": [128]},
        FP8 | {"weight_block_size": "128"},
        FP8 | {"weight_block_size": [0, 128]},
        FP8 | {"weight_block_size": [128, -1]},
        compressed(weights={"group_size": None}),
        compressed(config_groups=[1]),
        compressed(config_groups={"group_0": 1}),
        "gptq",
        7,
    ],
)
def test_a_damaged_configuration_is_refused(raw: object) -> None:
    with pytest.raises(ExaoneError) as caught:
        parse(raw)
    assert isinstance(caught.value, CheckpointError)
    assert "quantization_config" in caught.value.where
