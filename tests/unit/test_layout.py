"""Names and places of files: ours, and those that transformers.js looks for."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from exporter import disk
from exporter.layout import CONFIG_KEY, OWN, adapt, check_layout, config_with, naming
from model.bundle import BUNDLE_LAYOUT, TRANSFORMERS_JS, GraphInfo, Manifest, TensorInfo, WeightInfo
from model.errors import UsageError

SEEING = ("vision_encoder", "embedding", "decoder")


def weight(bits: int, parameters: int = 100, activations: str = "float") -> WeightInfo:
    return WeightInfo(bits, 32 if bits else 0, True, "rtn", parameters, activations=activations)


def test_our_own_names() -> None:
    own = naming(BUNDLE_LAYOUT, SEEING, "fp32", {})
    assert own == OWN
    assert (own.file("decoder"), own.data_file("mtp")) == ("decoder.onnx", "mtp.onnx.data")
    assert own.shared
    assert own.folders == ()


def test_names_of_transformers_js() -> None:
    text = naming(TRANSFORMERS_JS, ["decoder"], "fp32", {})
    assert (text.file("decoder"), text.data_file("decoder")) == ("onnx/model.onnx", "onnx/model.onnx_data")
    assert text.folders == ("onnx",)
    assert not text.shared
    seeing = naming(TRANSFORMERS_JS, SEEING, "fp32", {})
    assert [seeing.file(graph) for graph in SEEING] == [
        "onnx/vision_encoder.onnx", "onnx/embed_tokens.onnx", "onnx/decoder_model_merged.onnx",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "bits", "activations", "suffix"),
    [
        ("fp32", 0, "float", ""), ("fp16", 0, "float", "_fp16"), ("fp32", 8, "float", "_int8"),
        ("fp16", 8, "float", "_int8"), ("fp32", 8, "int8", "_quantized"), ("fp32", 4, "float", "_q4"),
        ("fp16", 4, "float", "_q4f16"), ("fp32", 2, "float", "_q2"), ("fp16", 2, "float", "_q2f16"),
    ],
)  # fmt: skip
def test_suffixes(dtype: str, bits: int, activations: str, suffix: str) -> None:
    weights = {
        "decoder.layers.0.mlp.up_proj": weight(bits, activations=activations),
        "vision_encoder.x": weight(4, 900),
    }
    assert naming(TRANSFORMERS_JS, ["decoder"], dtype, weights).file("decoder") == f"onnx/model{suffix}.onnx"


def test_a_graph_is_called_after_most_of_its_weights() -> None:
    mixed = {"decoder.a": weight(4, 60), "decoder.b": weight(8, 50), "decoder.c": weight(0, 10)}
    assert naming(TRANSFORMERS_JS, SEEING, "fp32", mixed).types == {
        "vision_encoder": "fp32", "embedding": "fp32", "decoder": "q4",
    }  # fmt: skip


def test_config_says_which_files_there_are() -> None:
    files = naming(TRANSFORMERS_JS, ["embedding", "decoder"], "fp32", {"decoder.a": weight(4)})
    graphs = [
        GraphInfo("embedding", files.file("embedding"), (), (), ()),
        GraphInfo("decoder", files.file("decoder"), (files.data_file("decoder"),), (), ()),
    ]
    told = json.loads(config_with({"model_type": "한"}, graphs, files))
    assert told == {
        "model_type": "한",
        CONFIG_KEY: {
            "dtype": {"embed_tokens": "fp32", "decoder_model_merged": "q4"},
            "use_external_data_format": {"decoder_model_merged_q4.onnx": 1},
        },
    }


def test_an_embedding_without_images_has_none_to_merge() -> None:
    features = ir.Value(
        name="image_features", shape=ir.Shape(["image_tokens", 6]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    model = ir.Model(ir.Graph([features], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    adapt(BUNDLE_LAYOUT, {"embedding": model})
    assert not model.graph.initializers
    adapt(TRANSFORMERS_JS, {"embedding": model})
    default = model.graph.initializers["image_features"].const_value
    assert default is not None
    assert tuple(default.shape.numpy()) == (0, 6)


@pytest.mark.parametrize(
    ("options", "named"), [({"target": "cuda"}, "cuda"), ({"dtype": "bf16"}, "bf16"), ({"kv_cache": "int8"}, "int8")]
)
def test_what_transformers_js_cannot_have(options: dict[str, str], named: str) -> None:
    given = {"dtype": "fp32", "target": "cpu", "kv_cache": "full"} | options
    check_layout(BUNDLE_LAYOUT, **given)
    with pytest.raises(UsageError, match=f"not {named}"):
        check_layout(TRANSFORMERS_JS, **given)


def test_strays_go_from_every_folder_of_the_bundle(tmp_path: Path) -> None:
    for name in ("a", "b", "onnx/c", "onnx/d", "other/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    disk.remove_strays(tmp_path, {"a", "onnx/c"})
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["a", "onnx", "onnx/c"]


def test_a_manifest_says_its_layout() -> None:
    tensors = (TensorInfo("x", "float32", (1,)),)
    manifest = Manifest(
        "0", {}, {"id": "x"}, "exaone4", "text-generation", "fp32", "cpu", "none",
        (GraphInfo("decoder", "decoder.onnx", (), tensors, tensors),), {}, {},
    )  # fmt: skip
    assert b"layout" not in manifest.to_bytes()
    assert manifest.layout == BUNDLE_LAYOUT
