"""What the comparison of vision encoders rests on: the same pictures and weights for all, and ratios of one round."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import exaone_export as ee
from benchmarks import mtmd_gguf, peers_gguf, vision, vision_worker
from tests.tiny import make_checkpoint

RUN = vision.Run("28x28", 4, "none", 4.0, 10**9, 10**6, 2 * 10**9, 1.0, 1.0)


def test_images_are_whole_tokens() -> None:
    one, many = vision.Images.parse("1024"), vision.Images.parse("8x224")
    assert (str(one), one.patches) == ("1036x1036", 5476)
    assert (str(many), many.patches) == ("8 of 224x224", 8 * 256)


def test_ratios_are_of_one_round() -> None:
    fast = dataclasses.replace(RUN, encoder="fast", seconds=1.0, grown=3 * 10**6, least=0.5, mean=0.75)
    # The machine is half as fast in the second round: the ratio stays.
    slow = dataclasses.replace(RUN, seconds=8.0), dataclasses.replace(fast, seconds=2.0, mean=0.25)
    rows = vision.table([RUN, fast, *slow], ["none", "absent"]).splitlines()
    assert rows[0].split(" | ")[4:6] == ["times as fast as none", "times as fast as absent"]
    assert rows[2].startswith("| 28x28 | 4 | none | 6.00 (4.00–8.00) | 1.00 (1.00–1.00) | – | 1000 | 1 | 2000 |")
    assert rows[3] == (
        "| 28x28 | 4 | fast | 1.50 (1.00–2.00) | 4.00 (4.00–4.00) | – | 1000 | 3 | 2000 | 0.50000 / 0.50000 |"
    )


def test_rounds_add_up_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs"
    vision.report(iter([RUN]), ["none"], file)
    vision.report(iter([dataclasses.replace(RUN, seconds=6.0)]), ["none"], file)
    assert vision.kept(file) == [RUN, dataclasses.replace(RUN, seconds=6.0)]
    assert capsys.readouterr().out.count("5.00 (4.00–6.00)") == 1


def test_a_bundle_takes_its_turn(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "vlm", draft=False)
    bundle = ee.export(source, tmp_path / "bundle", task=vision.TASK).folder
    images = [vision.Images(1, 8), vision.Images(2, 4)]
    with vision.Worker("ours", bundle, 1) as worker:
        features = worker.run(images[0])["features"]
        runs = list(vision.measure({"a": worker, "b": worker}, images, 1))
    image = vision_worker.pictures(1, 8 * vision.PATCH)[0]
    with ee.load(bundle) as model:
        np.testing.assert_array_equal(features, model.image_features(image))
    labels = ["112x112", "2 of 56x56, together", "2 of 56x56, one by one"]
    assert [(run.images, run.encoder) for run in runs] == [(label, name) for label in labels for name in "ab"]
    assert all(run.seconds > 0 and run.most > 10**7 and run.weights > 0 for run in runs)
    assert min(run.least for run in runs) == pytest.approx(1)


def test_every_tensor_of_the_encoder_has_a_name_in_gguf(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "vlm", dtype="bf16", assets=False)
    names = [name for name, _ in peers_gguf.tensors(source) if name.startswith(mtmd_gguf.PREFIX)]
    short = {name.removeprefix(mtmd_gguf.PREFIX) for name in names} - {mtmd_gguf.PATCHES}
    found = {mtmd_gguf.gguf_name(name) for name in short}
    depth = json.loads((source / "config.json").read_text())["vision_config"]["depth"]
    assert len(found) == len(short) == 12 * depth + 5
    assert {"v.blk.0.attn_qkv.bias", "v.blk.3.ln2.weight", "mm.2.weight", "v.post_ln.weight"} <= found


def test_floats_are_those_of_the_patterns() -> None:
    values = np.array([1.5, -2.0, 0.0], np.float32)
    np.testing.assert_array_equal(mtmd_gguf.floats((values.view(np.uint32) >> 16).astype(np.uint16)), values)


@pytest.mark.parametrize(
    ("full", "depth", "every"), [([6, 13, 20, 27], 28, 7), ([], 2, 3), ([0, 1], 2, 0), ([3], 5, 4)]
)
def test_full_blocks_come_at_equal_distances(full: list[int], depth: int, every: int) -> None:
    assert mtmd_gguf.pattern(full, depth) == every


@pytest.mark.parametrize(("full", "depth"), [([0, 5], 6), ([1], 6), ([2, 3], 6)])
def test_other_rules_are_refused(full: list[int], depth: int) -> None:
    with pytest.raises(SystemExit, match="no rule"):
        mtmd_gguf.pattern(full, depth)
