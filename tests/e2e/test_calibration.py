"""`export --calibration` from the command line: a user's prompts with an image, scaled inputs in the graph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.numpy import load_file

from exaone_export import cli
from exaone_export.quality import measure_quality
from exaone_export.samples import load_samples
from model.bundle import read_manifest
from model.load import load_exaone
from model.progress import NullProgress
from runtime.graphs import Graphs
from tests import tiny

RECIPE = """name = "mine"
[[rule]]
match = "vision_encoder.*"
bits = 8
method = "search"
[[rule]]
match = "*.embed_tokens"
bits = 8
[[rule]]
match = "*.layers.1.*"
bits = 8
method = "gptq"
symmetric = false
[[rule]]
match = "*"
bits = 8
method = "awq"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Checkpoint, prompts and bundle."""
    folder = tmp_path_factory.mktemp("calibrated")
    noise = np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    look = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read it."}]}
    lines = [
        {"messages": [look, {"role": "assistant", "content": "I cannot."}], "images": ["noise.png"]},
        {"text": "Some words, and 낱말."},
        {"messages": [{"role": "user", "content": "What is the time?"}]},
    ]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    (folder / "mine.toml").write_text(RECIPE, "utf-8")
    source = tiny.make_checkpoint(folder / "source", "vlm")
    flags = ["--quantize", str(folder / "mine.toml"), "--calibration", str(folder / "mine.jsonl"), "--json"]
    assert cli.main(["export", str(source), str(folder / "out"), *flags]) == 0
    return source, folder / "mine.jsonl", folder / "out"


def test_the_bundle_answers_as_its_source(made: tuple[Path, Path, Path]) -> None:
    source, prompts, bundle = made
    graphs = Graphs(bundle, ep="cpu")
    quality = measure_quality(load_exaone(source), graphs, load_samples(bundle, graphs.config, prompts), NullProgress())
    graphs.close()
    assert quality.tokens > 50
    assert quality.mean_kld < 0.01  # inputs that are scaled on one side only give a hundred times that


def test_one_scale_for_products_of_the_same_activations(made: tuple[Path, Path, Path]) -> None:
    *_, bundle = made
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
    scaled = [node.name for node in graph.node if node.op_type == "Mul" and "input_scale" in node.name]
    assert sum("layers.0." in name for name in scaled) == 4  # q/k/v, o, gate/up, down
    assert not any("layers.1." in name for name in scaled)
    assert not any("scale" in node.name for node in onnx.load(bundle / "vision_encoder.onnx").graph.node)


def test_the_manifest_says_what_it_was_calibrated_on(made: tuple[Path, Path, Path]) -> None:
    *_, bundle = made
    manifest = read_manifest(bundle)
    entry = manifest.source["calibration"]
    assert (entry["name"], entry["prompts"], entry["image_tokens"]) == ("mine.jsonl", 3, 6)
    assert len(entry["sha256"]) == 64
    assert any(note.startswith("Calibrated on 3 prompts (mine.jsonl)") for note in manifest.notes)
    assert manifest.weights["decoder.layers.1.mlp.up_proj"].method == "gptq"
    assert manifest.weights["decoder.layers.0.mlp.up_proj"].method == "awq"


def test_resuming_nothing_and_bad_prompts_are_refused(
    made: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, prompts, _ = made
    recipe = str(prompts.with_suffix(".toml"))
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"texts": "not"}\n', "utf-8")
    flags = ["--quantize", recipe, "--calibration", str(tmp_path / "bad.jsonl")]
    assert cli.main(["export", str(source), str(tmp_path / "out"), *flags]) == 2
    assert "error: cannot calibrate: bad.jsonl:2: unknown key 'texts'" in capsys.readouterr().err
    flags = ["--quantize", recipe, "--calibration", str(prompts), "--resume"]
    assert cli.main(["export", str(source), str(tmp_path / "out"), *flags]) == 2
    assert "there is no interrupted export" in capsys.readouterr().err


def test_the_shipped_recipe_that_is_calibrated(
    made: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, prompts, bundle = made
    flags = ["--quantize", "int4-quality", "--calibration", str(prompts), "-q"]
    assert cli.main(["export", str(source), str(tmp_path / "out"), *flags]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.recipe == "int4-quality"
    found: dict[str, set[tuple[int, str]]] = {}
    for path, stored in manifest.weights.items():
        if not path.startswith("vision_encoder."):
            found.setdefault(path.rpartition(".")[2], set()).add((stored.bits, stored.method))
    eight = {"k_proj", "v_proj", "embed_tokens", "lm_head"}
    assert eight < found.keys()
    assert all(schemes == {(8, "rtn") if name in eight else (4, "gptq")} for name, schemes in found.items()), found
    # Weights that are quantized in a second step cannot be looked at from their inputs.
    capsys.readouterr()
    cases = {"quantize": (str(bundle), []), "export": (str(source), ["--low-disk"])}
    for command, (given, more) in cases.items():
        assert cli.main([command, given, str(tmp_path / "other"), "--quantize", "int4-quality", *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) <= 3
        assert "gptq" in " ".join(lines)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_weight_that_is_no_number_is_refused_before_anything_is_calibrated_on_it(
    made: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: float
) -> None:
    source, prompts, _ = made
    shutil.copytree(source, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = bad
    tiny.save_tensors(tmp_path / "source", tensors)
    flags = ["--quantize", "int4-quality", "--calibration", str(prompts), "-q"]
    assert cli.main(["export", str(tmp_path / "source"), str(tmp_path / "out"), *flags]) == 7
    assert "up_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
