"""`bench` on tiny bundles: what it reports and what it refuses; never how fast anything is."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import exaone_export as ee
from benchmarks import growth
from exaone_export import cli
from model.bundle import read_manifest
from tests.e2e.conftest import Bundles

SPREADS = ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "vision_s", "load_s")
NUMBERS = (
    "peak_rss_bytes",
    "bundle_bytes",
    "weight_bytes_per_token",
    "read_bandwidth_bytes_per_s",
    "roofline_fraction",
    "threads",
)
QUICK = ("--repeat", "1", "--prompt-tokens", "8", "--new-tokens", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the memory gives is not the matter here; half a gigabyte for every test would be.
    monkeypatch.setattr("exaone_export.benchmark.bandwidth.buffer_bytes", lambda: 1 << 22)


def test_json_has_what_the_contract_names(bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bundles.bundle("dense", "int4")
    assert cli.main(["bench", str(folder), *QUICK, "--repeat", "3", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    report: dict[str, Any] = json.loads(captured.out)
    for name in SPREADS:
        assert sorted(report[name]) == ["max", "median", "min"]
        assert report[name]["min"] <= report[name]["median"] <= report[name]["max"]
        assert report[name]["min"] > 0 or name == "vision_s"
    assert report["vision_s"]["max"] == 0
    assert all(report[name] > 0 for name in NUMBERS)
    manifest = read_manifest(folder)
    assert report["bundle_bytes"] == sum(info.size for info in manifest.files.values())
    # All that the manifest lists as a weight, but the table of a tied model, of which the output layer reads the codes.
    listed = [weight for path, weight in manifest.weights.items() if not path.endswith(".embed_tokens")]
    grid = [4 + (0 if weight.symmetric else weight.bits / 8) for weight in listed]
    stored = sum(
        w.parameters * (w.bits / 8 + per_block / w.block_size) for w, per_block in zip(listed, grid, strict=True)
    )
    assert stored < report["weight_bytes_per_token"] < 1.1 * stored  # norms, constants, and rows of tables
    roof = report["decode_tokens_per_s"]["median"] * report["weight_bytes_per_token"]
    assert report["roofline_fraction"] == pytest.approx(roof / report["read_bandwidth_bytes_per_s"])
    assert report["cache_bytes_per_token"] == (8 + 2 // 2) * 4 * 2 * (2 * 16 * 4)
    both = report["weight_bytes_per_token"] + report["cache_bytes_per_token"]
    ratio = both / report["weight_bytes_per_token"]
    assert report["traffic_fraction"] == pytest.approx(report["roofline_fraction"] * ratio)
    assert (report["ep"], report["threads"], report["depth"], report["prompt_tokens"]) == ("cpu", 1, 8, 8)
    assert (report["compared"], report["growth"], report["repeat"]) == (None, None, 3)


def test_images_batches_and_comparison(bundles: Bundles) -> None:
    report = ee.bench(
        bundles.bundle("vlm"), compare=bundles.bundle("vlm", "int8"), threads=1,
        prompt_tokens=16, new_tokens=2, depth=3, image=(112, 84), batch=2, repeat=2, growth=True,
    )  # fmt: skip
    other, growth = report.compared, report.growth
    assert isinstance(report, ee.Bench)
    assert other is not None
    assert growth is not None
    assert report.image_tokens == other.image_tokens == (112 // 28) * (84 // 28)
    assert (report.prompt_tokens, report.depth, report.batch) == (16 + report.image_tokens, 3, 2)
    assert report.time_to_first_token_s.median > report.vision_s.median > 0
    assert report.weight_bytes_per_token > other.weight_bytes_per_token
    assert set(report.ratios) == set(SPREADS) - {"load_s"}
    assert all(0 < ratio.min <= ratio.median <= ratio.max for ratio in report.ratios.values())
    assert growth.tokens == (2, 4, 8, 16)
    assert len(growth.prefill_s) == len(growth.decode_s) == 4
    assert growth.patches == tuple(sorted(growth.patches))
    assert growth.patches[-1] == 4 * report.image_tokens
    assert len(growth.vision_s) == len(growth.patches)
    assert other.growth is not None
    assert other.compared is None


def test_a_table_for_people(bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bundles.bundle("dense", "int4")
    assert cli.main(["bench", str(folder), *QUICK, "--depth", "0", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{folder.name}: 8 tokens, then 2 after 0; cpu, 1 threads, 1 rounds")
    wanted = ("prefill, tokens/s", "decode, tokens/s", "first token", "load", "memory bandwidth", "peak memory", "MB")
    assert [word for word in wanted if word not in text] == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--prompt-tokens", "0"),
        ("--prompt-tokens", "many"),
        ("--new-tokens", "-3"),
        ("--depth", "1.5"),
        ("--image", "wide"),
        ("--image", "0x20"),
        ("--image", "99999x99999"),
        ("--batch", "0"),
        ("--repeat", "0"),
        ("--threads", "0"),
        ("--ep", "abacus"),
        ("--prompt-tokens", "2048"),  # no room for an answer
        ("--depth", "2047"),
        ("--image", "56x56"),  # the model reads text only
        ("--plot", "figure.txt"),
        ("--plot", "nowhere/figure.png"),
    ],
)
def test_what_makes_no_sense_exits_with_2(
    flags: tuple[str, ...], bundles: Bundles, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(bundles.bundle("dense", "int4")), *QUICK, *flags, "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is False
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) <= 3


def test_no_bundle_exits_with_4(tmp_path: Path, bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(tmp_path / "missing"), *QUICK]) == 4
    folder = str(bundles.bundle("dense", "int4"))
    assert cli.main(["bench", folder, "--compare", str(tmp_path / "missing"), *QUICK]) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_a_plot_without_matplotlib_exits_with_5(
    tmp_path: Path, bundles: Bundles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("exaone_export.benchmark.plot.find_spec", lambda name: None)
    arguments = ["bench", str(bundles.bundle("dense", "int4")), *QUICK, "--plot", str(tmp_path / "a.png")]
    assert cli.main(arguments) == 5
    assert "matplotlib" in capsys.readouterr().err


def test_a_bundle_that_does_not_generate_exits_with_2(
    tmp_path: Path, bundles: Bundles, capsys: pytest.CaptureFixture[str]
) -> None:
    ee.export(bundles.source("dense"), tmp_path / "encoder", task="feature-extraction")
    generates = str(bundles.bundle("dense", "int4"))
    for arguments in ([str(tmp_path / "encoder")], [generates, "--compare", str(tmp_path / "encoder")]):
        assert cli.main(["bench", *arguments, *QUICK]) == 2
        said = capsys.readouterr().err
        assert "encoder: it was exported for feature-extraction" in said
        assert "Name a bundle that generates" in said


def test_growth_is_measured_at_every_size(bundles: Bundles) -> None:
    options = Namespace(threads=1, tokens=[1, 4, 12], rounds=2, once_above=4, new_tokens=2, sides=[56, 112])
    prefill, decode = growth.measure_text(bundles.bundle("vlm"), options)
    assert {size: len(times) for size, times in prefill.seconds.items()} == {1: 2, 4: 2, 12: 1}
    assert decode.sizes == [2, 5, 13]
    vision = growth.measure_vision(bundles.bundle("vlm"), options)
    assert {size: len(times) for size, times in vision.seconds.items()} == {16: 2, 64: 2}
    assert min(*prefill.medians, *decode.medians, *vision.medians) > 0
