"""--quantize auto: the bound holds to the byte, and the plan is a recipe like any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import exaone_export as ee
from exaone_export.calibration.encode import load_prompts
from exaone_export.cli import main
from exaone_export.planning import sensitivity
from exaone_export.planning.sensitivity import Evaluator, measure_losses
from model.bundle import read_manifest
from model.errors import UsageError
from model.load import load_exaone
from model.progress import NullProgress
from quantize.plan import CHOICES, find_groups
from quantize.recipe import load_recipe
from runtime.onnx_file import read_onnx
from tests.e2e.conftest import KINDS, Bundles

BITS = {"hybrid": 6.0, "dense": 6.0, "vlm": 11.0}  # the tiny vision encoder is float in part, and most of its model


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [{"text": "A short line of text."}, {"text": "그리고 한 줄 더."}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_bits_per_weight_are_kept_and_predicted(bundles: Bundles, tmp_path: Path, prompts: Path, kind: str) -> None:
    most = BITS[kind]
    report = ee.export(
        bundles.source(kind), tmp_path / "out", quantize="auto", bits_per_weight=most, calibration=prompts
    )
    assert report.plan is not None
    assert most - 0.3 < report.bits_per_weight <= most
    assert report.bits_per_weight == pytest.approx(report.plan["bits_per_weight"], rel=1e-12)
    assert report.bytes <= report.plan["bytes"]
    schemes = {(info.bits, info.block_size) for path, info in report.weights.items() if path.startswith("decoder.")}
    assert len(schemes) > 1
    recipe = load_recipe(tmp_path / "out.recipe.toml")
    again = ee.export(bundles.source(kind), tmp_path / "again", quantize=recipe, calibration=prompts)
    assert again.weights == report.weights
    for joined in ("qkv_proj", "gate_up_proj"):
        names = read_onnx(tmp_path / "out" / "decoder.onnx").initializers
        assert sum(joined in name and name.endswith("weight_q") for name in names) == 4
    if kind == "dense":  # the table and the head are one
        tables = [name for name in names if name.endswith("weight_q") and ("lm_head" in name or "embed" in name)]
        sizes = [names[name].nbytes for name in tables]
        assert report.weights["decoder.embed_tokens"] == report.weights["decoder.lm_head"]
        data = (tmp_path / "out" / "decoder.onnx.data").stat().st_size
        assert data < sum(value.nbytes for value in names.values()) - sizes[0] // 2 or len(tables) == 1


@pytest.mark.parametrize("kind", ["dense", "vlm"])
def test_the_size_of_the_bundle_is_kept(bundles: Bundles, tmp_path: Path, prompts: Path, kind: str) -> None:
    source = bundles.source(kind)
    with pytest.raises(UsageError, match="takes [0-9,]+ bytes") as refused:
        ee.export(source, tmp_path / "out", quantize="auto", max_bytes=1000, calibration=prompts)
    least = int(str(refused.value).split("takes ")[1].split(" ")[0].replace(",", ""))
    for size in (least, least + 3001):
        report = ee.export(source, tmp_path / "out", quantize="auto", max_bytes=size, calibration=prompts, force=True)
        total = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
        assert total <= size
        assert report.plan is not None
        assert report.plan["bytes"] <= size
    with pytest.raises(UsageError, match="takes"):
        ee.export(source, tmp_path / "new", quantize="auto", max_bytes=least - 1, calibration=prompts)
    assert not (tmp_path / "new.recipe.toml").exists()


def test_more_bits_diverge_less(bundles: Bundles, tmp_path: Path, prompts: Path) -> None:
    found = []
    for bits in (5.0, 6.5, 8.0):
        report = ee.export(
            bundles.source("hybrid"), tmp_path / f"{bits}", quantize="auto", bits_per_weight=bits, calibration=prompts
        )
        assert report.plan is not None
        found.append(report.plan["measured_kld"])
    assert found == sorted(found, reverse=True)
    assert found[0] > 2 * found[-1]


def test_what_is_reckoned_agrees_with_what_is_measured(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, prompts: Path
) -> None:
    source = bundles.source("hybrid")
    model = load_exaone(source)
    evaluator = Evaluator(model, load_prompts(source, prompts), np.dtype(np.float32))
    paths = [name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() > 1]
    groups = find_groups(model.config, paths)
    choices = [[(scheme, 0) for scheme in (CHOICES[1], CHOICES[3])] for _ in groups]
    exact, measured = measure_losses(evaluator, groups, choices, NullProgress())
    assert measured
    monkeypatch.setattr(sensitivity, "EXACT_OPERATIONS", 0)
    monkeypatch.setattr(sensitivity, "_LAYERS", 2)
    reckoned, measured = measure_losses(evaluator, groups, choices, NullProgress())
    assert not measured
    ratio = np.log(np.array(reckoned) / np.array(exact))
    assert np.abs(ratio).max() < np.log(10)
    assert np.corrcoef(np.log(np.ravel(reckoned)), np.log(np.ravel(exact)))[0, 1] > 0.8
    assert evaluator.divergence({}) < 1e-9, "the model's weights are put back"


def test_the_command_says_what_was_planned(
    bundles: Bundles, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", bundles.source("dense"), out, "--quantize", "auto", "--calibration", prompts]
    assert main([*map(str, arguments), "--bits-per-weight", "6.5"]) == 0
    shown = capsys.readouterr().out
    assert "bits per weight and at most" in shown
    assert "out.recipe.toml" in shown
    assert read_manifest(out).bits_per_weight <= 6.5
    assert main([*map(str, arguments), "--bits-per-weight", "6.5"]) == 2
    assert main([*map(str, arguments), "--force"]) == 2
