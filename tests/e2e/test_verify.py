"""verify: every damaged byte is found, and the figures against the source mean what they say."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exaone_export as ee
from exaone_export.cli import main
from exaone_export.samples import load_samples
from exaone_export.verifying.layers import measure_layers
from model.bundle import MANIFEST, FileInfo, Manifest, file_sha256, read_manifest
from model.config import load_config
from model.errors import BundleError, UsageError
from model.jsonfile import read_json_object
from model.progress import NullProgress
from model.weights import Checkpoint
from quantize.recipe import parse_recipe
from runtime.onnx_file import read_onnx
from tests.e2e.conftest import KINDS, Bundles
from tests.tiny import make_checkpoint

PARTS = {"hybrid": {"decoder"}, "dense": {"decoder"}, "vlm": {"vision_encoder", "embedding", "decoder", "mtp"}}


@pytest.fixture
def copy(bundles: Bundles, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles.bundle("hybrid"), folder)
    (folder / "verify.json").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_bundle_equals_its_source(bundles: Bundles, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles.bundle(kind), folder)
    found = ee.verify(folder, source=bundles.source(kind))
    assert found.ok, found.problems
    assert found.parity is not None
    assert found.quality is not None
    assert set(found.parity) == PARTS[kind]
    assert all(figures["max_abs_error"] < 1e-3 and figures["cosine"] > 0.999999 for figures in found.parity.values())
    assert found.quality.tokens > 500
    assert found.quality.max_kld < 1e-6
    assert found.quality.same_top > 0.995
    assert found.quality.ppl_ratio == pytest.approx(1, abs=1e-4)
    written = read_json_object(folder / "verify.json")
    assert written["ok"] is True
    assert written["quality"]["tokens"] == found.quality.tokens
    assert f"| positions scored | {found.quality.tokens:,} |" in (folder / "README.md").read_text()
    assert ee.verify(folder).ok, "verify.json is no part of what is hashed, and the manifest knows the new card"


def test_fewer_bits_are_further_away(bundles: Bundles, tmp_path: Path) -> None:
    divergences = []
    for recipe in ("int8", "int4"):
        folder = tmp_path / recipe
        shutil.copytree(bundles.bundle("hybrid", recipe), folder)
        found = ee.verify(folder, source=bundles.source("hybrid"))
        assert found.ok, "figures of a quantized bundle are reported, not judged"
        assert found.quality is not None
        assert math.isfinite(found.quality.ppl_ratio)
        assert 0 < found.quality.mean_kld <= found.quality.p99_kld <= found.quality.p999_kld <= found.quality.max_kld
        divergences.append(found.quality.mean_kld)
    assert divergences[0] < divergences[1]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_in_any_file_is_found(copy: Path) -> None:
    for name in read_manifest(copy).files:
        path = copy / name
        for at in (0, path.stat().st_size // 2, path.stat().st_size - 1):
            flip(path, at)
            found = ee.verify(copy)
            assert not found.ok
            assert [file for file, good in found.files.items() if not good] == [name]
            flip(path, at)
    assert ee.verify(copy).ok


@pytest.mark.parametrize("change", ["cut", "longer", "missing", "empty", "folder"])
def test_a_changed_data_file_is_found(copy: Path, change: str) -> None:
    path = copy / "decoder.onnx.data"
    content = path.read_bytes()
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change != "missing":
        path.write_bytes({"cut": content[:-1], "longer": content + b"x", "empty": b""}[change])
    found = ee.verify(copy)
    assert not found.ok
    assert found.files["decoder.onnx.data"] is False
    assert found.files["config.json"] is True


def test_an_extra_file_is_a_warning(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "notes.txt").write_text("mine")
    assert ee.verify(copy).ok
    assert "notes.txt" in caplog.text


def resigned(folder: Path, **files: bytes) -> None:
    """Replaces files and puts their true hashes into the manifest, as somebody hostile would."""
    raw = json.loads((folder / MANIFEST).read_text())
    for name, content in files.items():
        (folder / name).write_bytes(content)
        raw["files"][name] = {"size": len(content), "sha256": file_sha256(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"decoder.onnx.data", b"../../etc/passwdx"),
        (b"decoder.onnx.data", b"/etc/passwd.xdata"),
        (b"decoder.onnx.data", b"*/_ORT_MEM_ADDR_/"),
        (b"com.microsoft", b"com.microsofu"),
    ],
)
def test_a_hostile_graph_with_a_true_hash_is_found(copy: Path, old: bytes, new: bytes) -> None:
    content = (copy / "decoder.onnx").read_bytes()
    assert len(old) == len(new)
    assert old in content
    resigned(copy, **{"decoder.onnx": content.replace(old, new)})
    found = ee.verify(copy)
    assert found.files["decoder.onnx"] is False


def test_data_that_is_too_short_for_its_graph_is_found(copy: Path) -> None:
    resigned(copy, **{"decoder.onnx.data": (copy / "decoder.onnx.data").read_bytes()[:-5000]})
    assert ee.verify(copy).files["decoder.onnx"] is False


def test_cut_and_changed_graphs_never_escape_as_another_error(copy: Path, tmp_path: Path) -> None:
    content = (copy / "decoder.onnx").read_bytes()
    path, rng = tmp_path / "mutant.onnx", np.random.default_rng(0)
    for i in range(150):
        mutant = bytearray(content[: rng.integers(len(content))] if i < 50 else content)
        for at in rng.integers(len(mutant), size=rng.integers(1, 8)) if i >= 50 else ():
            mutant[at] = rng.integers(256)
        path.write_bytes(mutant)
        try:
            read_onnx(path)
        except BundleError as error:
            assert len(str(error)) < 300


def test_wrong_weights_are_not_ok(bundles: Bundles, copy: Path) -> None:
    """A sound bundle of other weights: only the comparison with the source can tell."""
    values = np.frombuffer((copy / "decoder.onnx.data").read_bytes(), np.float32).copy()
    values[: values.size // 2] *= 1.02
    resigned(copy, **{"decoder.onnx.data": values.tobytes()})
    found = ee.verify(copy, source=bundles.source("hybrid"))
    assert all(found.files.values())
    assert not found.ok
    assert any("decoder" in problem for problem in found.problems)


def test_not_a_number_is_not_ok(bundles: Bundles, copy: Path) -> None:
    values = np.frombuffer((copy / "decoder.onnx.data").read_bytes(), np.float32).copy()
    values[:] = np.nan
    resigned(copy, **{"decoder.onnx.data": values.tobytes()})
    found = ee.verify(copy, source=bundles.source("hybrid"))
    assert not found.ok
    assert found.files["decoder.onnx.data"] is False
    assert "holds NaN" in found.problems[0]


def test_another_source_is_refused(bundles: Bundles, copy: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "hybrid", seed=8, sharded=3)
    with pytest.raises(BundleError, match="not the one"):
        ee.verify(copy, source=other)
    assert not (copy / "verify.json").exists()


def jsonl(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


def test_prompts_of_ones_own(bundles: Bundles, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles.bundle("vlm"), folder)
    from PIL import Image

    Image.new("RGB", (60, 90), (200, 20, 20)).save(tmp_path / "red.png")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "무슨 색?"}]}
    talk = {"messages": [user, {"role": "assistant", "content": "빨강"}], "images": ["red.png"]}
    found = ee.verify(
        folder, source=bundles.source("vlm"), prompts=jsonl(tmp_path / "p.jsonl", {"text": "그냥 글"}, talk)
    )
    assert found.ok
    assert found.quality is not None
    assert 10 < found.quality.tokens < 200


BAD_PROMPTS: dict[str, tuple[object, ...] | str] = {
    "nothing": (),
    "neither": ({"prompt": "x"},),
    "one letter": ({"text": "x"},),
    "messages a text": ({"messages": "x"},),
    "a number in messages": ({"messages": [1]},),
    "no image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]},),
    "a list": ([],),
    "a language that is none": ({"text": "some text", "language": 7},),
    "not JSON": "{text}",
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_are_refused_before_the_source_is_read(copy: Path, tmp_path: Path, name: str) -> None:
    given = BAD_PROMPTS[name]
    path = jsonl(tmp_path / "p.jsonl", *given) if isinstance(given, tuple) else tmp_path / "p.jsonl"
    if isinstance(given, str):
        path.write_text(given)
    with pytest.raises(UsageError):
        ee.verify(copy, source=tmp_path / "no such folder", prompts=path)
    with pytest.raises(UsageError):
        ee.verify(copy, source=tmp_path / "no such folder", prompts=tmp_path / "no such file")


def run(arguments: Sequence[str | Path], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out.startswith("{") else None, captured.err


CASES: dict[str, tuple[Callable[[Path], object], int]] = {
    "sound": (lambda folder: None, 0),
    "a flipped bit": (lambda folder: flip(folder / "decoder.onnx.data", 5), 4),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), 4),
    "a manifest cut short": (lambda folder: os.truncate(folder / MANIFEST, 100), 4),
    "a newer manifest": (
        lambda folder: (folder / MANIFEST).write_text(
            (folder / MANIFEST).read_text().replace('"schema_version": 1', '"schema_version": 99')
        ),
        5,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_exit_codes(copy: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, expected = CASES[name]
    change(copy)
    code, report, errors = run(["verify", copy, "--json"], capsys)
    assert code == expected
    assert "Traceback" not in errors
    if report is not None:
        assert report["ok"] is (expected == 0)
        assert set(report) >= {"ok", "files"}
    else:
        assert len(errors.strip().splitlines()) <= 3


def test_a_manifest_of_old_libraries_is_still_read(copy: Path) -> None:
    manifest = read_manifest(copy)
    assert isinstance(manifest, Manifest)
    assert all(isinstance(info, FileInfo) for info in manifest.files.values())


@pytest.fixture
def int4(bundles: Bundles, tmp_path: Path) -> Path:
    folder = tmp_path / "int4"
    shutil.copytree(bundles.bundle("hybrid", "int4"), folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max-kld", "1e-6"], 7),
        (["--min-same-top", "0.9999"], 7),
        (["--max-ppl-ratio", "0.01"], 7),
        (["--max-kld", "20", "--min-same-top", "0.01", "--max-p999-kld", "99", "--max-rms-dp", "1"], 0),
        (["--min-same-top", "97"], 2),
        (["--max-kld", "-1"], 2),
    ],
)
def test_limits_given_decide(
    bundles: Bundles, int4: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: int
) -> None:
    short = jsonl(int4.parent / "p.jsonl", {"text": "one short text", "language": "en"})
    arguments: list[str | Path] = ["verify", int4, "--source", bundles.source("hybrid"), "--prompts", short, "--json"]
    code, report, errors = run([*arguments, *flags], capsys)
    assert code == expected, errors
    if expected == 2:
        assert (report["ok"], report["error"]["exit_code"], report["quality"]) == (False, 2, None)
        return
    assert report["ok"] is (expected == 0)
    assert len(report["limits"]) == len(flags) // 2
    assert report["quality"]["groups"]["language"]["en"]["tokens"] == report["quality"]["tokens"]


def test_limits_need_a_source(int4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(["verify", int4, "--max-kld", "1"], capsys)
    assert code == 2
    assert "--source" in errors


def test_a_recipe_holds_its_bundles_to_its_own_limits(
    bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parse_recipe(
        'name = "strict"\n[[rule]]\nmatch = "decoder.layers.*"\nbits = 4\n[verify]\nmean_kld = 1e-7\n', "strict"
    )
    ee.quantize(bundles.bundle("hybrid"), tmp_path / "out", recipe=recipe)
    assert read_manifest(tmp_path / "out").limits == {"mean_kld": 1e-7}
    prompts = jsonl(tmp_path / "p.jsonl", {"text": "one short text"})
    found = ee.verify(tmp_path / "out", source=bundles.source("hybrid"), prompts=prompts)
    assert not found.ok
    assert any("mean_kld" in problem for problem in found.problems)
    assert "must be" in (tmp_path / "out" / "README.md").read_text()
    milder = ee.verify(tmp_path / "out", source=bundles.source("hybrid"), prompts=prompts, limits={"mean_kld": 9.0})
    assert milder.ok
    code, _, _ = run(["verify", tmp_path / "out", "--source", bundles.source("hybrid"), "--prompts", prompts], capsys)
    assert code == 7


@pytest.mark.parametrize(("kind", "recipe"), [("hybrid", "int4"), ("vlm", "int8"), ("vlm", "int8-dynamic")])
def test_every_quantized_weight_has_its_noise_measured(
    bundles: Bundles, tmp_path: Path, kind: str, recipe: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles.bundle(kind, recipe), folder)
    manifest = read_manifest(folder)
    source = bundles.source(kind)
    weights = Checkpoint.open(source).bind(load_config(source))
    layers = measure_layers(folder, manifest, weights, {}, NullProgress())
    assert {noise.path for noise in layers} == {path for path, info in manifest.weights.items() if info.bits}
    assert layers == sorted(layers, key=lambda noise: noise.snr_db)
    for noise in layers:
        low, high = (12, 26) if manifest.weights[noise.path].bits == 4 else (36, 52)
        assert low < noise.snr_db < high, noise
        assert noise.snr_db == pytest.approx(noise.weight_snr_db)
        assert noise.parameters == manifest.weights[noise.path].parameters


def test_the_built_in_prompts_are_told_apart(bundles: Bundles) -> None:
    for kind, modalities in (("dense", {"text"}), ("vlm", {"text", "image"})):
        folder = bundles.bundle(kind)
        samples = load_samples(folder, load_config(folder), None)
        assert {sample.modality for sample in samples} == modalities
        assert {sample.language for sample in samples} == {"en", "ko", "code"}
        assert len(samples) >= 30


def test_a_table_for_people(bundles: Bundles, int4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(int4), "--source", str(bundles.source("hybrid"))]) == 0
    shown = capsys.readouterr().out
    for text in ("KL divergence, mean", "99.9 %", "same top token, %", "weights with the most noise", "ko", "int4"):
        assert text in shown
    assert "…" not in shown
    assert shown.rstrip().endswith("ok")
