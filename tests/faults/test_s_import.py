"""S39 and S17: checkpoints that are quantized already are imported; what is wrong with them is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.shards import open_shards
from tests.faults.harness import Case, accepted, bad, refuses
from tests.faults.spoil import Spoil, Tensors, both, config
from tests.quantized_writers import FORMATS, make_quantized

LAYER = "model.layers.1.mlp.up_proj"
PACKED, AWQ, GPTQ = "compressed-int4-g32-asym", "awq-g32", "gptq-int4-g32-asym-actorder"
BYTES, FLOAT8, BLOCKS = "compressed-int8-bytes", "compressed-fp8-channel", "fp8-block"


def quantized(form: str) -> Spoil:
    """The checkpoint in another format."""

    def spoil(folder: Path) -> None:
        made = make_quantized(folder.parent / "made", FORMATS[form], "hybrid")
        shutil.rmtree(folder)
        made.folder.rename(folder)
        shutil.rmtree(folder.parent / "made")

    return spoil


def parts(change: Callable[[Tensors], object]) -> Spoil:
    """Other tensors in one file."""

    def spoil(folder: Path) -> None:
        tensors: Tensors = {name: ref.read() for name, ref in open_shards(folder)[0].items()}
        change(tensors)
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")

    return spoil


def setting(part: str, value: Any, at: tuple[int, ...] | None = None) -> Callable[[Tensors], object]:
    """One part of the layer, or one of its numbers, is another."""

    def change(tensors: Tensors) -> None:
        name = f"{LAYER}.{part}"
        if at is None:
            tensors[name] = value
        else:
            tensors[name][at] = value

    return change


def dropping(part: str) -> Callable[[Tensors], object]:
    """The layer lacks a part."""
    return lambda tensors: tensors.pop(f"{LAYER}.{part}")


def case(name: str, form: str, change: Callable[[Tensors], object], part: str, *words: str, **more: Any) -> Case:
    """A layer one of whose parts is wrong."""
    spoil = both(quantized(form), parts(change))
    return bad(
        f"s39 {name}", spoil, f"{LAYER}.{part}", *words, traces=more.get("code", 3) == 7 or "read" in name, **more
    )


def of_the_configuration(**changes: Any) -> Spoil:
    """Another quantization_config."""
    return both(quantized(GPTQ), config("quantization_config", **changes))


test_s39_another_kind_of_quantization = refuses(
    *(
        bad(
            f"s39 {method}",
            of_the_configuration(quant_method=method),
            "quantization_config.quant_method",
            method,
            "Supported are compressed-tensors",
            code=2,
        )
        for method in ("bitsandbytes", "mxfp4", "nvfp4", "gguf", "hqq", "quark")
    ),
    bad("s39 3 bits", of_the_configuration(bits=3), "quantization_config.bits", "3 bits", code=2),
    bad("s39 gemv", of_the_configuration(quant_method="awq", version="gemv"), "'gemv'", code=2),
    bad("s39 marlin", of_the_configuration(checkpoint_format="marlin"), "'marlin'", code=2),
    bad("s39 no method", of_the_configuration(quant_method=...), "quant_method", code=2),
    bad("s39 bits in words", of_the_configuration(bits="four"), "quantization_config.bits", "'four'"),
    bad("s39 no config", both(quantized(GPTQ), config(quantization_config=...)), "no quantization_config"),
)

test_s39_parts_that_do_not_fit = refuses(
    case("no scales", GPTQ, dropping("scales"), "scales", "missing"),
    case("no zero points", AWQ, dropping("qzeros"), "qzeros", "missing"),
    case("no codes", PACKED, dropping("weight_packed"), "weight_", "the weight that it belongs to is missing"),
    case("codes cut", AWQ, setting("qweight", np.zeros((64, 8), np.int32)), "qweight", "[64, 8]", "[64, 16]"),
    case("other groups", GPTQ, setting("scales", np.ones((1, 128), np.float16)), "scales", "1 groups", "2 groups"),
    case("groups of fewer columns", GPTQ, setting("g_idx", np.zeros(32, np.int32)), "g_idx", "[32]", "[64]"),
    case("codes of another type", GPTQ, setting("qweight", np.zeros((8, 128), np.int64)), "qweight", "I64"),
    case("a part too much", PACKED, setting("qzeros", np.zeros(1, np.int32)), "qzeros", "no part of a weight"),
    case("other blocks", BLOCKS, setting("weight_scale_inv", np.ones((2, 2), np.float32)), "weight_scale_inv"),
)  # fmt: skip

test_s17_8_bit_floats_without_a_scale = refuses(
    bad(
        "s17 F8 without scale",
        both(quantized(FLOAT8), parts(dropping("weight_scale"))),
        f"{LAYER}.weight",
        "values of type F8_E4M3 without a scale",
    ),
    bad(
        "s17 F8 in an ordinary checkpoint",
        both(quantized(FLOAT8), config(quantization_config=...)),
        "weight_scale",
        "no quantization_config",
    ),
)

test_s39_numbers_that_do_not_fit = refuses(
    case("NaN scale of gptq", GPTQ, setting("scales", np.nan, (1, 5)), "scales", "[1, 5]", code=7),
    case("infinite scale of awq", AWQ, setting("scales", np.inf, (0, 0)), "scales", "1 of its scales", code=7),
    case("NaN scale of packed", PACKED, setting("weight_scale", np.nan, (2, 1)), "weight_scale", "[2, 1]", code=7),
    case("infinite scale of float8", FLOAT8, setting("weight_scale", np.inf, (3, 0)), "weight_scale", code=7),
    case("NaN among 8-bit floats", FLOAT8, setting("weight", np.nan, (3, 4)), "weight", "[3, 4]", code=7),
    case("read group that is none", GPTQ, setting("g_idx", 7, (9,)), "g_idx", "column 9 belongs to group 7", "2"),
    case("read other shape", PACKED, setting("weight_shape", 63, (1,)), "weight_shape", "[128, 63]", "[128, 64]"),
)


@pytest.mark.parametrize(
    ("form", "method", "scheme"),
    [
        (PACKED, "imported:compressed-tensors", (4, 32, False)),
        (AWQ, "imported:awq", (4, 32, False)),
        (GPTQ, "imported:gptq", (4, 32, False)),
        (BYTES, "imported:compressed-tensors", (8, 64, True)),
    ],
)
def test_s39_what_is_quantized_already_is_imported(
    tmp_path: Path, form: str, method: str, scheme: tuple[int, int, bool]
) -> None:
    manifest, said = accepted(tmp_path, quantized(form))
    weight = manifest.weights["decoder.layers.1.mlp.up_proj"]
    assert (weight.bits, weight.block_size, weight.symmetric) == scheme
    assert weight.method == method
    assert weight.reason.startswith("repacked exactly")
    assert manifest.weights["decoder.lm_head"].bits == 0
    assert manifest.recipe == "imported"
    assert sum(manifest.source["quantization"]["weights"].values()) == 28
    assert "The checkpoint is quantized: of its weights, 28 as" in said
    copied = json.loads((tmp_path / "out" / "config.json").read_text())
    assert copied["quantization_config"]["quant_method"] == method.removeprefix("imported:")


@pytest.mark.parametrize("form", [FLOAT8, BLOCKS, "compressed-fp8-tensor"])
def test_s39_8_bit_floats_are_dequantized_and_the_manifest_says_so(tmp_path: Path, form: str) -> None:
    manifest, _ = accepted(tmp_path, quantized(form))
    weight = manifest.weights["decoder.layers.1.mlp.up_proj"]
    assert weight.bits == 0
    assert weight.reason.startswith("dequantized: ")
    assert manifest.recipe == "none"
    left_out = manifest.source.get("left_out", {})
    assert ("activation_scales" in left_out) == (form == "compressed-fp8-tensor")
