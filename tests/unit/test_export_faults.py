"""What goes wrong while exporting, and what is left behind: nothing. Only the last test really traces."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter import export as export_room
from exporter.export import ExportOptions, export_checkpoint, rewrite_bundle
from model.bundle import MANIFEST, WeightInfo, check_sizes, file_sha256, read_manifest
from model.errors import BundleError, CheckpointError, ExaoneError, NumericalError, UsageError
from model.progress import NullProgress
from tests import tiny
from tests.declared import declare_graphs

TRACE = export_room._trace


@pytest.fixture(autouse=True)
def quick_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_room, "_trace", declare_graphs)


@pytest.fixture
def real_trace(quick_trace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_room, "_trace", TRACE)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.make_checkpoint(tmp_path / "source", "hybrid")


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(error: type[BaseException], match: str, source: Path, out: Path, *args: Any, **kwargs: Any) -> None:
    """The export fails as said, and everything beside it stays as it was."""
    before = tree(out.parent)
    with pytest.raises(error, match=match):
        export_checkpoint(source, out, *args, **kwargs)
    assert tree(out.parent) == before
    assert not [path for path in out.parent.iterdir() if ".partial" in path.name or ".old" in path.name]


# What comes out


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_bundle_is_complete_and_described(
    tmp_path: Path, kind: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny.make_checkpoint(tmp_path / "source", kind, sharded=2)
    out = tmp_path / "deep" / "er" / "한국어 이름 -x"
    report = export_checkpoint(source, out, ExportOptions(dtype=dtype))
    assert ("no bf16 kernels" in caplog.text) == (dtype == "bf16")
    manifest = read_manifest(out)
    check_sizes(out, manifest)
    assert set(manifest.files) | {MANIFEST} == {path.name for path in out.iterdir()}
    assert all(file_sha256(out / name) == info.sha256 for name, info in manifest.files.items())
    assert (manifest.recipe, manifest.dtype) == ("none", dtype)
    assert re.fullmatch(rf"{manifest.model_type}-[0-9a-f]{{12}}", manifest.source["id"])
    assert set(manifest.source["files"]) >= {"config.json", "model-00001-of-00002.safetensors"}
    assert report.folder == out
    assert report.bytes == sum(path.stat().st_size for path in out.iterdir())
    # The tied text model keeps its table in both orientations while it is float.
    bits = 32 if dtype == "fp32" else 16
    assert report.bits_per_weight == bits * (1 + (512 * 64 / report.parameters if kind == "dense" else 0))
    assert manifest.weights["decoder.layers.0.mlp.up_proj"].parameters == 64 * 128
    json.dumps(report.to_json())
    if kind == "vlm":
        mtp = manifest.graph("mtp")
        assert mtp is not None
        assert set(mtp.data) == {"mtp.onnx.data"} | ({"decoder.onnx.data"})


def test_the_same_checkpoint_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_checkpoint(source, tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


# Options and configuration (S34 to S38)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (ExportOptions(dtype="int7"), "--dtype: 'int7' is none of"),
        (ExportOptions(target="abacus"), "--target"),
        (ExportOptions(task="translation"), "--task"),
    ],
)
def test_unknown_options(source: Path, tmp_path: Path, options: ExportOptions, why: str) -> None:
    refused(UsageError, why, source, tmp_path / "out", options)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model_type": "exaone"}, UsageError),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, UsageError),
        ({"num_hidden_layers": 10**9}, CheckpointError),
        ({"num_attention_heads": 0}, CheckpointError),
        ({"auto_map": {"AutoModel": "code.Model"}}, CheckpointError),
        ({"quantization_config": {"quant_method": "hqq"}}, UsageError),
        ({"layer_types": ["full_attention"]}, CheckpointError),
        ({"hidden_size": 128}, CheckpointError),
    ],
)
def test_configurations_that_do_not_fit(
    source: Path, tmp_path: Path, change: dict[str, Any], error: type[ExaoneError]
) -> None:
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | change))
    refused(error, "config.json", source, tmp_path / "out")


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}'])
def test_config_json_that_cannot_be_read(source: Path, tmp_path: Path, content: bytes | None) -> None:
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_bytes(content)
    refused(CheckpointError, "config.json", source, tmp_path / "out")


# Weights (S26, S27, S40)


def test_nan_in_a_weight_leaves_nothing(source: Path, tmp_path: Path) -> None:
    tensors = tiny.make_tensors(tiny.make_config("hybrid"))
    tensors["model.layers.3.mlp.down_proj.weight"][5, 7] = np.nan
    tiny.save_tensors(source, tensors)
    refused(
        NumericalError, r"layers\.3\.mlp\.down_proj\.weight: 1 value is NaN or infinite, the first at \[5, 7\]",
        source, tmp_path / "out",
    )  # fmt: skip


def test_too_large_for_float16_leaves_nothing(source: Path, tmp_path: Path) -> None:
    tensors = tiny.make_tensors(tiny.make_config("hybrid"))
    tensors["lm_head.weight"][5, 7] = 1e5
    tiny.save_tensors(source, tensors)
    refused(NumericalError, "lm_head.weight: it holds 100000", source, tmp_path / "out", ExportOptions(dtype="fp16"))
    export_checkpoint(source, tmp_path / "fine")


class Acting(NullProgress):
    """Does something when half of the bytes of a step are written."""

    def __init__(self, label: str, action: Any) -> None:
        self.wanted, self.action, self.left = label, action, 0.0
        self.active = False

    def start(self, label: str, total: float, unit: str) -> None:
        self.active, self.left = label == self.wanted, total / 2

    def advance(self, amount: float) -> None:
        self.left -= amount
        if self.active and self.left <= 0:
            self.active = False
            self.action()


def test_a_source_that_changes_meanwhile(source: Path, tmp_path: Path) -> None:
    def change() -> None:
        with (source / "model.safetensors").open("r+b") as stream:
            last = stream.seek(-1, os.SEEK_END)
            flipped = bytes([stream.read(1)[0] ^ 1])
            stream.seek(last)
            stream.write(flipped)

    with pytest.raises(CheckpointError, match="model.safetensors: the file changed during the export"):
        export_checkpoint(source, tmp_path / "out", progress=Acting("writing decoder", change))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_source_that_is_only_touched_meanwhile(source: Path, tmp_path: Path) -> None:
    def touch() -> None:
        os.utime(source / "model.safetensors", ns=(1, 1))

    export_checkpoint(source, tmp_path / "out", progress=Acting("writing decoder", touch))
    check_sizes(tmp_path / "out", read_manifest(tmp_path / "out"))


# Changing the graphs on the way


@dataclass(frozen=True)
class Halved:
    recipe: str = "halved"

    def manifest_weights(self) -> Mapping[str, WeightInfo]:
        return {"decoder.layers.0.mlp.up_proj": WeightInfo(8, 32, True, "rtn", 8192)}


def halve(models: dict[str, ir.Model]) -> Halved:
    value = models["decoder"].graph.initializers["layers.0.mlp.up_proj.weight"]
    tensor = value.const_value
    assert tensor is not None
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy() / 2, name=value.name),
        tensor.dtype,
        ir.Shape(tensor.shape.numpy()),
        name=value.name,
    )
    return Halved()


def test_transform_while_exporting_equals_transform_of_the_float_bundle(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "direct", transform=halve)
    export_checkpoint(source, tmp_path / "float")
    report = rewrite_bundle(tmp_path / "float", tmp_path / "rewritten", halve)
    assert tree(tmp_path / "direct") == tree(tmp_path / "rewritten")
    manifest = read_manifest(tmp_path / "rewritten")
    assert (manifest.recipe, report.recipe) == ("halved", "halved")
    assert manifest.weights["decoder.layers.0.mlp.up_proj"].bits == 8
    assert manifest.weights["decoder.layers.1.mlp.up_proj"].bits == 0


def test_a_quantized_bundle_is_not_quantized_again(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "done", transform=halve)
    with pytest.raises(UsageError, match=r"it is already quantized \(halved\)"):
        rewrite_bundle(tmp_path / "done", tmp_path / "out", halve)


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "config.json", MANIFEST])
def test_a_damaged_bundle_is_not_rewritten(source: Path, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle"
    export_checkpoint(source, bundle)
    content = bytearray((bundle / name).read_bytes())
    content[0] ^= 0x40
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError):
        rewrite_bundle(bundle, tmp_path / "out", halve)
    (bundle / name).unlink()
    with pytest.raises(BundleError):
        rewrite_bundle(bundle, tmp_path / "out", halve)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "bundle"}


# With real tracing


def test_exported_decoder_computes_what_torch_does(tmp_path: Path, real_trace: None) -> None:
    torch = pytest.importorskip("torch")
    ort = pytest.importorskip("onnxruntime")
    from model.load import load_exaone

    source = tiny.make_checkpoint(tmp_path / "source", "dense", dtype="bf16", num_hidden_layers=2, layer_types=None)
    report = export_checkpoint(source, tmp_path / "out")
    assert report.graphs.keys() == {"decoder"}
    ids = np.random.default_rng(0).integers(100, 355, (1, 13))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(tmp_path / "out" / "decoder.onnx", options, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "logits_to_keep": np.zeros(1, np.int64),
    }
    feeds |= {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    logits = session.run(["logits"], feeds)[0]
    with torch.no_grad():
        wanted = load_exaone(source)(torch.from_numpy(ids))[0].numpy()
    assert np.abs(logits - wanted).max() < 1e-4
