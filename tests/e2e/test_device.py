"""The passes that stay on a device, run on the CPU: fixed buffers, a growing cache, recorded steps, ids instead of
logits. What they answer is what the usual passes answer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import exaone_export as ee
from model import bundle
from model.errors import BundleError, EnvironmentFault, NumericalError, ResourceError, UsageError
from runtime.device import Tensor
from runtime.device_forward import DeviceForward
from runtime.engine import Engine
from runtime.execution import Execution
from runtime.session import GraphSession
from tests.e2e.conftest import KINDS, Bundles

FIXED = Execution(fixed_buffers=True)
PROMPT = list(range(100, 112))
DRAWN: dict[str, Any] = {"do_sample": True, "seed": 5}
PICTURE = np.random.default_rng(3).integers(0, 255, (120, 90, 3), dtype=np.uint8)


def both(folder: Path) -> tuple[Engine, Engine]:
    return Engine.load(folder, "cpu", 1), Engine.load(folder, "cpu", 1, execution=FIXED)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """As CUDA's provider: the first run with a number, in a thread, is done several times, later ones once."""
    real, seen, counts = GraphSession.run_bound, set(), Counter[str]()

    def run_bound(self: GraphSession, binding: Any, lean: bool = False, record: int | None = None) -> None:
        known = (record, threading.get_ident()) in seen
        kind = "plain" if record is None else "replayed" if known else "recorded"
        counts[kind] += self.graph.name == bundle.DECODER
        seen.add((record, threading.get_ident()))
        for _ in range(3 if kind == "recorded" else 1):
            real(self, binding, lean)

    monkeypatch.setattr(GraphSession, "run_bound", run_bound)
    return counts


def record(engine: Engine) -> Engine:
    engine.open()
    engine.graphs.session(bundle.DECODER).captures = True
    return engine


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_buffers_answer_the_same(bundles: Bundles, kind: str) -> None:
    plain, fixed = both(bundles.bundle(kind))
    with plain, fixed:
        assert isinstance(fixed.graphs.forward(1), DeviceForward)
        images = [PICTURE, PICTURE[:60]] if kind == "vlm" else []
        plainly: dict[str, Any] = {"do_sample": False}
        for options in (plainly, DRAWN):
            answers = [e.generate("hello", images, max_new_tokens=50, **options).token_ids for e in (plain, fixed)]
            assert answers[0] == answers[1]
        ids = PROMPT * 25
        assert np.allclose(plain.logits(ids), fixed.logits(ids), atol=1e-4)
        # A prompt of one token, and rows of several lengths, some of which end before others.
        rows = [[100], PROMPT, PROMPT * 6]
        batches = [e.generate_ids(rows, max_new_tokens=30, **DRAWN) for e in (plain, fixed)]
        assert [r.token_ids for r in batches[0]] == [r.token_ids for r in batches[1]]


@pytest.mark.parametrize(("kind", "slack"), [("hybrid", 0), ("hybrid", 64), ("dense", 64), ("vlm", 0)])
def test_recorded_steps_answer_the_same(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, recordings: Counter[str], kind: str, slack: int
) -> None:
    monkeypatch.setitem(bundle.WINDOW_SLACK, "cpu", slack)
    plain, fixed = both(bundles.bundle(kind))
    with plain, record(fixed):
        for tokens in (30, 700, 30):  # 700 need more room than is made at first
            expected = plain.generate_ids(PROMPT, max_new_tokens=tokens, **DRAWN).token_ids
            recordings.clear()
            assert fixed.generate_ids(PROMPT, max_new_tokens=tokens, **DRAWN).token_ids == expected
            assert recordings["recorded"] + recordings["replayed"] >= len(expected) - 1
        # The last request found the buffers of the one before, and what was recorded on them.
        assert recordings["recorded"] == 0
        facts = fixed.graphs.residence.facts() if fixed.graphs.residence else {}
        assert facts["recorded"]
        assert facts["cache"] > 0


def test_another_thread_records_anew(bundles: Bundles, recordings: Counter[str]) -> None:
    plain, fixed = both(bundles.bundle("hybrid"))
    with plain, record(fixed):
        expected = plain.generate_ids(PROMPT, max_new_tokens=20, **DRAWN).token_ids
        answers = [fixed.generate_ids(PROMPT, max_new_tokens=20, **DRAWN).token_ids]
        run = threading.Thread(
            target=lambda: answers.append(fixed.generate_ids(PROMPT, max_new_tokens=20, **DRAWN).token_ids)
        )
        run.start()
        run.join()
        assert answers == [expected, expected]
        assert recordings["recorded"] == 2


def test_without_room_for_copies_nothing_is_recorded(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, recordings: Counter[str]
) -> None:
    monkeypatch.setitem(bundle.WINDOW_SLACK, "cpu", 0)
    plain, fixed = both(bundles.bundle("hybrid"))

    def full(self: object) -> None:
        raise ResourceError("cannot hold tensor", "cuda", "not enough memory")

    monkeypatch.setattr("runtime.device_cache.DeviceCache.saved_windows", full)
    with plain, record(fixed):
        answers = [e.generate_ids(PROMPT, max_new_tokens=20, **DRAWN).token_ids for e in (plain, fixed)]
        assert answers[0] == answers[1]
        assert not recordings["recorded"]


@pytest.fixture(scope="module")
def telling(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose decoder tells the likeliest ids, as those for CUDA do, and also gives NaN when told to."""
    folder = tmp_path_factory.mktemp("telling") / "bundle"
    shutil.copytree(bundles.bundle("hybrid"), folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("ArgMax", ["logits"], ["next_ids"], axis=-1, keepdims=0))
    shape = ["batch_size", "kept_length"]
    model.graph.output.append(onnx.helper.make_tensor_value_info("next_ids", onnx.TensorProto.INT64, shape))
    content = model.SerializeToString()
    (folder / "decoder.onnx").write_bytes(content)
    manifest = json.loads((folder / "exaone_export.json").read_bytes())
    output = {"name": "next_ids", "dtype": "int64", "shape": shape, "optional": False}
    next(graph for graph in manifest["graphs"] if graph["name"] == "decoder")["outputs"].append(output)
    manifest["files"]["decoder.onnx"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "exaone_export.json").write_text(json.dumps(manifest))
    return folder


def test_greedy_answers_take_ids_and_few_logits(telling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fixed = both(telling)
    with plain, fixed:
        expected = plain.generate_ids(PROMPT, max_new_tokens=80, do_sample=False).token_ids
        taken: list[str] = []
        residence = fixed.graphs.residence
        assert residence is not None
        read = residence.device.read

        def watched(tensor: Tensor) -> Any:
            taken.append(tensor.dtype)
            return read(tensor)

        monkeypatch.setattr(residence.device, "read", watched)
        assert fixed.generate_ids(PROMPT, max_new_tokens=80, do_sample=False).token_ids == expected
        assert taken.count("int64") == len(expected)
        assert 1 <= taken.count("float32") <= 2 + len(expected) // 32
        rows = [PROMPT, PROMPT * 5]
        batches = [e.generate_ids(rows, max_new_tokens=40, do_sample=False) for e in (plain, fixed)]
        assert [r.token_ids for r in batches[0]] == [r.token_ids for r in batches[1]]
        # With a penalty all logits count, and so they do where they are to be told.
        others: list[dict[str, Any]] = [{"presence_penalty": 1.0}, {"logprobs": 2}]
        for more in others:
            answers = [e.generate_ids(PROMPT, max_new_tokens=30, do_sample=False, **more) for e in (plain, fixed)]
            assert answers[0].token_ids == answers[1].token_ids


def test_nan_is_noticed_though_only_ids_are_taken(telling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.load(telling, "cpu", 1, execution=FIXED) as engine:
        residence = engine.graphs.residence
        assert residence is not None
        read = residence.device.read
        broken = lambda tensor: read(tensor) * (np.nan if tensor.dtype == "float32" else 1)  # noqa: E731
        monkeypatch.setattr(residence.device, "read", broken)
        with pytest.raises(NumericalError, match="NaN"):
            engine.generate_ids(PROMPT, max_new_tokens=4, do_sample=False)


def test_features_that_are_not_finite_are_refused(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.load(bundles.bundle("vlm"), "cpu", 1, execution=FIXED) as engine:
        monkeypatch.setattr("runtime.device.Device.is_finite", lambda self, tensor: False)
        with pytest.raises(NumericalError, match="image_features: NaN or Inf"):
            engine.generate("hello", [PICTURE], max_new_tokens=4)


def test_memory_bounds_the_cache(bundles: Bundles) -> None:
    folder = bundles.bundle("dense")
    weights = Engine.load(folder, "cpu", 1, execution=FIXED).graphs.residence
    assert weights is not None
    size = weights.plan.weights + (1 << 29) + 1100 * 1024  # 1100 tokens of 4 layers, 2 · 2 · 16 · 4 bytes each
    bounded = Execution(fixed_buffers=True, gpu_memory=size)
    with Engine.load(folder, "cpu", 1, execution=bounded) as engine:
        with pytest.raises(ResourceError, match=r"tokens take .* of cache, .* are there.*At most \d+ tokens fit"):
            engine.generate_ids(PROMPT * 100, max_new_tokens=2)
        assert engine.generate_ids(PROMPT * 80, max_new_tokens=20).token_ids


def test_layers_on_the_cpu_still_run(bundles: Bundles, caplog: pytest.LogCaptureFixture) -> None:
    plain = Engine.load(bundles.bundle("hybrid"), "cpu", 1)
    two = Execution(fixed_buffers=True, gpu_layers=2)
    with plain, Engine.load(bundles.bundle("hybrid"), "cpu", 1, execution=two) as split:
        answers = [e.generate_ids(PROMPT, max_new_tokens=30, **DRAWN).token_ids for e in (plain, split)]
        assert answers[0] == answers[1]
        assert split.graphs.residence is not None
        assert split.graphs.residence.facts()["host_layers"] == [0, 1]
    assert "layers 0 to 1 run on the CPU" in caplog.text


def test_layers_that_the_cpu_has_no_kernels_for_are_refused(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(bundles.bundle("hybrid"), "cpu", 1, execution=Execution(fixed_buffers=True, gpu_layers=1))

    def fails(self: GraphSession, binding: Any, lean: bool = False, record: int | None = None) -> None:
        raise BundleError("cannot run graph", "decoder.onnx", "onnxruntime fails: GroupQueryAttention (CPU)")

    monkeypatch.setattr(GraphSession, "run_bound", fails)
    with pytest.raises(EnvironmentFault, match="layers cannot run on the CPU.*Leave out gpu_layers"):
        engine.open()


def test_the_cpu_takes_no_options_of_a_gpu(bundles: Bundles) -> None:
    folder = bundles.bundle("dense")
    refused: list[dict[str, Any]] = [
        {"gpu_layers": 1}, {"gpu_memory": "20GB"}, {"cuda_graph": "on"}, {"ep_options": {"a": "1"}},
    ]  # fmt: skip
    for options in refused:
        with pytest.raises(UsageError, match="bad option"):
            ee.load(folder, ep="cpu", **options)
