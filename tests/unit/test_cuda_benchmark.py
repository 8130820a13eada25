"""The benchmark for GPUs on the CPU, with small models: every part runs, and what it reckons is right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

import exaone_export as ee
from benchmarks import cuda, cuda_parts, synthetic
from benchmarks.cuda_bench import Bench, Goal, Result, cosines, in_turns, vision_flops
from benchmarks.cuda_models import Models, _nearest
from benchmarks.cuda_parts import PARTS
from benchmarks.cuda_worker import Ours
from model.bundle import read_manifest
from model.config import parse_config
from model.shards import TensorRef
from quantize.recipe import load_recipe


class Here:
    """What answers like a worker, in this process."""

    def __init__(self, subject: Any) -> None:
        self._subject = subject

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._subject, Ours):
            self._subject._engine.close()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        asked = json.loads(json.dumps(question))
        answer: dict[str, Any] = json.loads(json.dumps(getattr(self._subject, asked.pop("call"))(**asked)))
        return answer


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A small model of the larger shape, one prompt beyond the window; workers and exports stay in this process."""

    def process(bench: Bench, kind: str, model: Path, options: dict[str, Any]) -> Here:
        if kind == "ours":
            return Here(Ours(model, bench.device, **options))
        from benchmarks.cuda_torch import Torch

        return Here(Torch(model, bench.device, **options))

    def export(
        models: Models, source: Path, out: Path, dtype: str, recipe: str | None, *, synthetic: bool = True
    ) -> Path:
        if not out.exists():
            ee.export(source, out, dtype=dtype, target=models.device, quantize=recipe)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "_process", process)
        patch.setattr(Models, "_export", export)
        models = Models(tmp_path_factory.mktemp("cuda"), "cpu", tiny=True)
        with pytest.MonkeyPatch.context() as reader:  # what makes weights up must be gone before others are read
            reader.setattr(TensorRef, "_bytes", TensorRef._bytes)
            synthetic.install()
            models.bundle("33b", quantized=True)
        yield Bench(models, ("33b",), [40], 4, 1)


def test_parity(bench: Bench) -> None:
    (row,) = PARTS["parity"](bench).rows
    assert row["equal"] == row["images"] > 0
    assert row["ids"] > 3 * row["images"]


def test_shapes(bench: Bench) -> None:
    found = PARTS["shapes"](bench)
    assert [row["shape"] for row in found.rows] == ["33b"]
    assert all(row["least cosine with fp32"] > cuda_parts.COSINE for row in found.rows)
    assert all(row["same first choice"] == 1 for row in found.rows)
    assert {goal.met for goal in found.goals} == {None}  # nothing is claimed of the CPU


def test_speed_and_torch(bench: Bench) -> None:
    speed, torch = PARTS["speed"](bench), PARTS["torch"](bench)
    assert [row["shape"] for row in speed.rows] == ["33b", "device"]
    assert all(0 < row["of the roof"] < row["with keys and values"] for row in speed.rows[:1])
    assert [goal.what for goal in speed.goals] == [f"decoding of the roof, {shape} after 40" for shape in bench.shapes]
    # Of a few tokens here the difference of two times may be anything.
    assert all(math.isfinite(row["decode ratio"]) and row["prefill ratio"] > 0 for row in torch.rows)
    assert len(torch.goals) == 2


def test_image_memory_and_models(bench: Bench) -> None:
    image, memory, made = (PARTS[name](bench) for name in ("image", "memory", "models"))
    assert [row["encoder"] for row in image.rows] == ["ours", "PyTorch"]
    assert {row["patches"] for row in image.rows} == {256}
    assert all(row["planned, MB"] > 0 and row["in use, MB"] > 0 for row in memory.rows)
    assert [row["bundle"] for row in made.rows] == ["bundle-33b-quantized"]
    weights = read_manifest(bench.models.bundle("33b", quantized=True)).weights
    assert any(weight.bits == 4 for weight in weights.values())
    assert all(weight.method == "rtn" for weight in weights.values() if weight.bits)


def test_recipes_keep_all_but_their_methods() -> None:
    for rule in load_recipe("int4").rules:
        near = _nearest(rule)
        assert near.match == rule.match
        assert (near.scheme is None) == (rule.scheme is None)
        if near.scheme is not None and rule.scheme is not None:
            assert (near.scheme.method, near.scheme.bits) == ("rtn", rule.scheme.bits)
            assert near.scheme.block_size == rule.scheme.block_size


def test_real_shapes_are_the_published_ones(tmp_path: Path) -> None:
    config = parse_config(Models(tmp_path).config("33b"))
    assert (config.text.num_layers, config.text.hidden_size) == (64, 5120)
    assert [config.text.is_sliding(layer) for layer in range(4)] == [True, True, True, False]
    assert parse_config(Models(tmp_path).config("33b", 4)).text.num_layers == 4
    assert not any(map(parse_config(Models(tmp_path).config("1.2b")).text.is_sliding, range(30)))


def test_operations_of_the_encoder(tmp_path: Path) -> None:
    """Of one block that sees everything, counted by hand."""
    assert parse_config(Models(tmp_path, tiny=True).config("1.2b")).text.cached_window is None
    raw = Models(tmp_path, tiny=True).config("33b")
    raw["vision_config"] |= {"depth": 1, "fullatt_block_indexes": [0]}
    vision = parse_config(raw).vision
    assert vision is not None
    patches, hidden, inner, keys = 64, 64, 96, 32
    products = patches * (1176 * hidden + hidden * (hidden + 2 * keys) + hidden * hidden + 3 * hidden * inner)
    scores = 2 * patches * patches * hidden
    merged = patches // 4 * ((4 * hidden) ** 2 + 4 * hidden * 64)
    assert vision_flops(vision, patches) == 2 * (products + scores + merged)


def test_cosines_and_turns(bench: Bench) -> None:
    left = np.array([[1, 0], [1, 1]], np.float32)
    assert np.allclose(cosines(left, np.array([[2, 0], [1, -1]], np.float32)), [1, 0])
    order: list[str] = []

    def run(name: str) -> Callable[[], dict[str, Any]]:
        def once() -> dict[str, Any]:
            order.append(name)
            return {"n": len(order)}

        return once

    assert in_turns(bench, {"a": run("a"), "b": run("b")}) == {"a": [{"n": 3}], "b": [{"n": 4}]}
    assert order == ["a", "b", "a", "b"]


def test_results_are_kept_told_and_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def good(bench: Bench) -> Result:
        calls.append("good")
        return Result([{"a": 1, "b": 0.123456}, {"a": 2, "b": 1.0}, {"c": 3}], [Goal("speed", 0.5, ">= 0.7", False)])

    def bad(bench: Bench) -> Result:
        raise SystemExit("no GPU")

    monkeypatch.setattr(cuda, "PARTS", {"good": good, "bad": bad})
    command = ["cuda", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--device", "cpu", "--tiny"]
    monkeypatch.setattr("sys.argv", command)
    assert cuda.main() == 1
    captured = capsys.readouterr()
    assert "| 1 | 0.1235 |" in captured.out
    assert "- speed: 0.5 (wants >= 0.7): MISSED" in captured.out
    assert captured.out.endswith("not done: bad\n\nmissed: speed\n")
    assert "bad failed: SystemExit: no GPU" in captured.err
    assert cuda.main() == 1
    assert calls == ["good"]  # what is done is not done again
    assert json.loads((tmp_path / "out/good.json").read_text())["rows"][0] == {"a": 1, "b": 0.123456}
