"""inspect: what it says of bundles and checkpoints is what is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import exaone_export as ee
from exaone_export.cli import main
from model.bundle import MANIFEST, read_manifest
from model.errors import BundleError, CheckpointError, UsageError
from runtime.onnx_file import read_onnx
from tests.e2e.conftest import KINDS, Bundles

KEYS = {"model_type", "task", "graphs", "bits_per_weight", "quantized", "bytes", "kv_bytes_per_token", "memory_bytes"}
GRAPH_KEYS = {"name", "file", "bytes", "inputs", "outputs", "ops"}
LAYER = 2 * 2 * 16 * 4  # keys and values of a token: 2 heads of 16, float32
KV_BYTES = {"dense": 4 * LAYER, "hybrid": LAYER, "vlm": LAYER}  # 4 layers, but the 3 with windows
WINDOWS = {"dense": 0, "hybrid": 3 * LAYER * (8 + 64), "vlm": 3 * LAYER * (8 + 64)}


@pytest.mark.parametrize("recipe", ["none", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle(bundles: Bundles, kind: str, recipe: str) -> None:
    folder = bundles.bundle(kind, recipe)
    manifest, found = read_manifest(folder), ee.inspect(folder)
    assert found.bytes == sum(info.size for info in manifest.files.values())
    assert [graph.name for graph in found.graphs] == [graph.name for graph in manifest.graphs]
    data = {name for graph in manifest.graphs for name in (graph.file, *graph.data)}
    assert sum(graph.bytes for graph in found.graphs) == sum(manifest.files[name].size for name in data)
    assert found.kv_bytes_per_token == KV_BYTES[kind]
    assert found.kv_bytes == {2048: 2048 * KV_BYTES[kind] + WINDOWS[kind]}
    assert set(found.memory_bytes) == {2048}
    assert found.memory == {"cpu": {recipe: found.memory_bytes}}
    assert sum(found.quantized.values()) >= 0.98 * found.parameters  # norms and biases have no scheme
    assert ("int4 g128 asym search" in found.quantized) == (recipe == "int4")


@pytest.mark.parametrize("kind", KINDS)
def test_operators_are_those_that_onnx_counts(bundles: Bundles, kind: str) -> None:
    import onnx

    for graph in ee.inspect(bundles.bundle(kind, "int4")).graphs:
        proto = onnx.load(bundles.bundle(kind, "int4") / graph.file, load_external_data=False)
        expected: dict[str, int] = {}
        pending = [proto.graph]
        while pending:
            for node in pending.pop().node:
                name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
                expected[name] = expected.get(name, 0) + 1
                pending += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        assert graph.ops == expected
        external = [tensor for tensor in proto.graph.initializer if tensor.external_data]
        assert len(read_onnx(bundles.bundle(kind, "int4") / graph.file).external) == len(external)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_per_weight_are_the_exports(bundles: Bundles, tmp_path: Path, kind: str) -> None:
    report = ee.quantize(bundles.bundle(kind), tmp_path / "out", recipe="int4")
    found = ee.inspect(tmp_path / "out")
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert found.parameters == report.parameters


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_described_as_what_it_becomes(bundles: Bundles, kind: str) -> None:
    found = ee.inspect(bundles.source(kind))
    for graph in read_manifest(bundles.bundle(kind)).graphs:
        predicted = next(summary for summary in found.graphs if summary.name == graph.name)
        assert set(predicted.inputs) == {tensor.name for tensor in graph.inputs}
        assert set(predicted.outputs) == {tensor.name for tensor in graph.outputs}
    assert len(found.graphs) == len(read_manifest(bundles.bundle(kind)).graphs)
    for recipe in ("none", "int8", "int4"):
        folder = bundles.bundle(kind, recipe)
        actual = sum(path.stat().st_size for path in folder.glob("*.data"))
        # Every tensor starts on a page of its own, which shows in models this small only.
        paging = 4096 * sum(len(read_onnx(path).external) for path in folder.glob("*.onnx"))
        assert actual - paging <= found.predicted_bytes[recipe] <= actual * 1.1 + 8192
        outlook = found.outlooks["cpu"][recipe]
        assert outlook.bytes == found.predicted_bytes[recipe]
        report = ee.inspect(folder)
        assert outlook.bits_per_weight == pytest.approx(report.bits_per_weight, rel=0.03)
        assert outlook.memory[2048].total == pytest.approx(report.memory_bytes[2048], rel=0.01)
        assert outlook.memory[2048].weights == pytest.approx(
            report.outlooks["cpu"][recipe].memory[2048].weights, rel=0.1
        )
    assert found.kv_bytes_per_token == KV_BYTES[kind]
    assert found.kv_window_bytes == WINDOWS[kind]
    assert found.bits_per_weight == 32
    assert (found.quantization, found.left_out) == ("none", {})


def test_the_context_is_what_was_asked_for(bundles: Bundles) -> None:
    one, hundred = (ee.inspect(bundles.bundle("dense"), context=n) for n in (1, 100))
    assert hundred.kv_bytes[100] - one.kv_bytes[1] == 99 * KV_BYTES["dense"]
    assert hundred.memory_bytes[100] > one.memory_bytes[1]
    hybrid = ee.inspect(bundles.bundle("hybrid"), context=20)
    assert hybrid.kv_bytes == {20: 20 * 4 * LAYER}
    with pytest.raises(UsageError, match="2048"):
        ee.inspect(bundles.bundle("dense"), context=2049)


@pytest.mark.parametrize("what", ["bundle", "source"])
def test_json_and_text(bundles: Bundles, capsys: pytest.CaptureFixture[str], what: str) -> None:
    folder = str(bundles.bundle("vlm") if what == "bundle" else bundles.source("vlm"))
    assert main(["inspect", folder, "--json", "--context", "128"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) >= KEYS
    assert all(set(graph) >= GRAPH_KEYS for graph in report["graphs"])
    assert set(report["memory_bytes"]) == set(report["kv_bytes"]) == {"128"}
    recipes = {"none", "int8", "int4", "int4-edge", "int4-quality"}
    targets = {"cpu": {"none"}} if what == "bundle" else {"cpu": recipes | {"int8-dynamic"}, "cuda": recipes}
    assert {target: set(recipes) for target, recipes in report["memory"].items()} == targets
    assert report["memory"]["cpu"]["none"] == report["memory_bytes"]
    assert main(["inspect", folder]) == 0
    text = capsys.readouterr().out
    assert "per token" in text
    for target, names in targets.items():
        assert all(f"\n{target.ljust(6)}  {recipe} " in text for recipe in names)


def test_neither_torch_nor_onnx_is_needed(bundles: Bundles) -> None:
    program = (
        "import sys, exaone_export as ee\n"
        f"ee.inspect({str(bundles.bundle('vlm', 'int4'))!r}); ee.inspect({str(bundles.source('vlm'))!r})\n"
        f"assert ee.verify({str(bundles.bundle('vlm', 'int4'))!r}).ok\n"
        "print([name for name in ('torch', 'onnx', 'onnx_ir', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_folders_that_are_neither(tmp_path: Path, bundles: Bundles) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        ee.inspect(tmp_path / "nothing")
    with pytest.raises(UsageError, match="neither"):
        ee.inspect(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(bundles.bundle("dense"), damaged)
    (damaged / "decoder.onnx").write_bytes(b"x" * (damaged / "decoder.onnx").stat().st_size)
    with pytest.raises(BundleError, match=r"decoder\.onnx"):
        ee.inspect(damaged)
    (damaged / MANIFEST).unlink()
    with pytest.raises(BundleError, match=MANIFEST):
        ee.inspect(damaged)
    cut = tmp_path / "cut"
    shutil.copytree(bundles.source("dense"), cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ee.inspect(cut)
