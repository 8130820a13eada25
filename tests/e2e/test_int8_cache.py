"""Bundles that keep keys and values in 8 bits: beside float ones, over windows, rows, pieces and growing buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import exaone_export as ee
from exaone_export.cli import main
from model.bundle import DECODER, int8_cache, window_layers
from model.errors import UsageError
from runtime import decode, graphs
from runtime.engine import Engine
from runtime.options import GenerationOptions
from runtime.providers import CUDA
from runtime.rows import RowPasses
from tests.e2e.conftest import Bundles

WINDOW, SLACK = 8, 64
GREEDY = GenerationOptions(do_sample=False)
FLOAT_ROW = 2 * 2 * 16 * 4  # keys and values of a token and layer: 2 heads of 16
INT8_ROW = 2 * 2 * (16 + 4)

Logits = npt.NDArray[np.float32]


def words(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(100, 500, length).tolist()


def divergence(found: Logits, wanted: Logits) -> float:
    """Mean KL divergence over positions."""
    p, q = (
        x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True) for x in (wanted, found)
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def fed(run: RowPasses, ids: list[int], pieces: list[int]) -> Logits:
    """Logits [tokens, vocab] of ids that are given in pieces, the last size over and over."""
    done, logits = 0, []
    while done < len(ids):
        size = pieces.pop(0) if len(pieces) > 1 else pieces[0]
        part = np.array([ids[done : done + size]])
        done += part.shape[1]
        logits.append(run(part, np.array([done]), keep=0)[0].copy())
    return np.concatenate(logits)


@pytest.fixture(scope="module")
def folders(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("int8")
    for kind in ("hybrid", "dense", "vlm"):
        ee.export(bundles.source(kind), root / kind, kv_cache="int8")
    return {kind: root / kind for kind in ("hybrid", "dense", "vlm")}


@pytest.mark.parametrize("kind", ["hybrid", "dense", "vlm"])
@pytest.mark.parametrize("pieces", [[1], [300, 1], [7, 256, 1], [1, 90]])
def test_near_to_floats(bundles: Bundles, folders: dict[str, Path], kind: str, pieces: list[int]) -> None:
    """Windows, layers without rotation, buffers that grow; prompts in pieces and single tokens."""
    ids = words(700)
    with Engine.load(folders[kind]) as engine, Engine.load(bundles.bundle(kind)) as other:
        found, wanted = (fed(runner.graphs.forward(1), ids, list(pieces)) for runner in (engine, other))
    assert divergence(found, wanted) < 1e-3
    cosines = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert cosines.min() > 0.999


def test_layout_and_size(folders: dict[str, Path]) -> None:
    with Engine.load(folders["hybrid"]) as engine:
        graph = engine.graphs.manifest.graph(DECODER)
        assert int8_cache(graph)
        assert window_layers(graph) == (0, 1, 2)
        run = engine.graphs.forward(2)
        run(np.array([words(500), words(500, 1)]), np.array([500, 500]))
        held = sum(array.nbytes for array in run.cache._arrays)
        assert held == 2 * run.cache.layout.size(run.cache.buffer).of(run.cache.capacity)
        assert held == 2 * INT8_ROW * (run.cache.capacity + 3 * (WINDOW + SLACK))
    found = ee.inspect(folders["hybrid"])
    assert found.kv_bytes_per_token == INT8_ROW
    assert found.kv_bytes == {2048: 2048 * INT8_ROW + 3 * INT8_ROW * (WINDOW + SLACK)}


def test_rows_of_different_lengths(folders: dict[str, Path]) -> None:
    """Rows that end at different times are as near to each alone as passes of another size are."""
    with Engine.load(folders["hybrid"]) as engine:
        rows = [words(length, length) for length in (3, 40, 1, 300)]
        run = engine.graphs.forward(4)
        first = decode.prefill(run, [np.array(row) for row in rows])
        lengths = np.array([len(row) for row in rows])
        steps = [first[:, -1].copy()]
        for token in words(100, 9):
            lengths = lengths + 1
            steps.append(run(np.full((4, 1), token), lengths)[:, -1].copy())
        for index, row in enumerate(rows):
            alone = fed(engine.graphs.forward(1), row + words(100, 9), [len(row), 1])[len(row) - 1 :]
            assert divergence(np.stack([step[index] for step in steps]), alone) < 1e-3


def test_going_back(folders: dict[str, Path], bundles: Bundles) -> None:
    """A ring forgets what was written over, and says so."""
    ids = words(400)
    with Engine.load(folders["hybrid"]) as engine, Engine.load(bundles.bundle("hybrid")) as other:
        wanted = other.logits(ids)
        run = engine.graphs.forward(1)
        done = 0
        while done < 300:
            fed_now = np.array([ids[done : done + 10]])
            done += 10
            run(fed_now, np.array([done]))
            back = 4 if done % 20 else SLACK - 1
            if done < back:
                continue
            assert run.cache.can_rewind([done - back])
            run.cache.rewind([done - back])
            logits = run(np.array([ids[done - back : done]]), np.array([done]), keep=0)
            assert divergence(logits[0], wanted[done - back : done]) < 1e-3
        assert not run.cache.can_rewind([done - SLACK - 2])
        with pytest.raises(ValueError, match="windows before are gone"):
            run.cache.rewind([done - SLACK - 2])
        run.cache.rewind([0])


def test_quantized_weights_over_it(folders: dict[str, Path], bundles: Bundles, tmp_path: Path) -> None:
    ee.quantize(folders["dense"], tmp_path / "int4", recipe="int4")
    with Engine.load(tmp_path / "int4") as engine, Engine.load(bundles.bundle("dense", "int4")) as other:
        assert int8_cache(engine.graphs.manifest.graph(DECODER))
        found, wanted = (fed(runner.graphs.forward(1), words(200), [1]) for runner in (engine, other))
        assert divergence(found, wanted) < 1e-2  # products with activations in 8 bits make small differences larger
        answers = engine.generate_ids([words(30), words(70)], options=GREEDY, max_new_tokens=40)
        assert [len(answer.token_ids) for answer in answers] == [40, 40]


def test_what_is_said_of_it(folders: dict[str, Path], bundles: Bundles) -> None:
    card = (folders["vlm"] / "README.md").read_text()
    assert "--kv-cache int8" in card
    assert "onnxruntime-genai does not know" in card
    assert not (folders["vlm"] / "genai_config.json").exists()
    report = ee.verify(folders["vlm"], source=bundles.source("vlm"))
    assert report.ok
    assert report.limits["mean_kld"] == 0.002


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"target": "cuda"}, "--target cpu and --dtype fp32, not cuda"),
        ({"dtype": "fp16"}, "not cpu and fp16"),
        ({"task": "feature-extraction"}, "keeps no keys and values"),
    ],
)
def test_refused(
    bundles: Bundles, tmp_path: Path, options: dict[str, str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words_of = [word for name, value in options.items() for word in (f"--{name}", value)]
    code = main(["export", str(bundles.source("hybrid")), str(tmp_path / "x"), "--kv-cache", "int8", *words_of])
    assert code == UsageError.exit_code
    error = capsys.readouterr().err
    assert why in error
    assert not (tmp_path / "x").exists()


def test_other_devices_are_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "choose_provider", lambda ep: CUDA)
    with pytest.raises(UsageError, match="the CPU alone has kernels"):
        Engine.load(folders["dense"], ep="cuda")


def test_nothing_is_drafted(folders: dict[str, Path]) -> None:
    """One token attends in integers, several attend in floats: a draft's answer would be another one."""
    with Engine.load(folders["vlm"]) as engine:
        for speculate in ("mtp", "lookup", "auto"):
            result = engine.generate("Say it.", max_new_tokens=9, do_sample=False, speculate=speculate)
            assert result.timings.speculation is None
