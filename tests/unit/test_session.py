from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from model.bundle import GraphInfo, Manifest, TensorInfo
from model.errors import BundleError, EnvironmentFault, ResourceError, UsageError
from runtime import providers, session
from runtime.graphs import _provider_for
from runtime.providers import CPU, available_providers, choose_provider, choose_threads, provider_loads
from runtime.session import GraphSession

IDENTITY = providers._PROBE  # y = x, float32 [1]
ROOT = Path(__file__).parents[2]


def info(inputs: str = "x", outputs: str = "y", rank: int = 1) -> GraphInfo:
    shape = (1,) * rank
    ends = [(TensorInfo(name, "float32", shape),) for name in (inputs, outputs)]
    return GraphInfo("decoder", "decoder.onnx", (), *ends)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "decoder.onnx").write_bytes(IDENTITY)
    return tmp_path


def test_a_graph_runs(folder: Path) -> None:
    opened = GraphSession(folder, info(), CPU, 1)
    assert opened.run({"x": np.array([3], np.float32)}, ["y"])[0].tolist() == [3]
    binding, result = opened.binding(), np.zeros(1, np.float32)
    binding.bind_cpu_input("x", np.array([4], np.float32))
    binding.bind_ortvalue_output("y", opened.tensor(result))
    opened.run_bound(binding)
    assert result.tolist() == [4]


def test_failing_runs_are_short_errors(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    opened = GraphSession(folder, info(), CPU, 1)
    for feeds in ({"x": np.zeros((2, 2), np.float32)}, {"z": np.zeros(1, np.float32)}, {"x": np.zeros(1, np.int64)}):
        with pytest.raises(BundleError, match=r"decoder\.onnx: onnxruntime fails") as caught:
            opened.run(feeds, ["y"])
        assert len(str(caught.value)) < 400
        assert str(folder) not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"garbage", IDENTITY[:-5], IDENTITY[:40] + b"\xff" * 20, b"\x08\x08\x3a\x80"])
def test_damaged_graphs(folder: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "decoder.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"damaged bundle: decoder\.onnx") as caught:
        GraphSession(folder, info(), CPU, 1)
    assert str(folder) not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_missing_graph(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        GraphSession(tmp_path, info(), CPU, 1)


def test_newer_opset_is_the_environments_fault(folder: Path) -> None:
    # The opset's version is the last byte.
    (folder / "decoder.onnx").write_bytes(IDENTITY[:-1] + b"\x7f")
    with pytest.raises(EnvironmentFault, match="too old"):
        GraphSession(folder, info(), CPU, 1)


@pytest.mark.parametrize(
    ("inputs", "attributes", "why"), [(1, {"newer": 1}, "newer for operator QuickGelu"), (3, {}, "input size 3 not")]
)
def test_newer_parts_of_an_operator_too(folder: Path, inputs: int, attributes: dict[str, Any], why: str) -> None:
    node = onnx.helper.make_node("QuickGelu", ["x"] * inputs, ["y"], domain="com.microsoft", **attributes)
    ends = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = onnx.helper.make_graph([node], "newer", [next(ends)], [next(ends)])
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (folder / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EnvironmentFault, match=f"too old.*{why}.*Upgrade onnxruntime"):
        GraphSession(folder, info(), CPU, 1)


@pytest.mark.parametrize("graph", [info("z"), info(outputs="z"), info(rank=2)])
def test_other_interface_than_the_manifests(folder: Path, graph: GraphInfo) -> None:
    with pytest.raises(BundleError, match="not those of the manifest"):
        GraphSession(folder, graph, CPU, 1)


def test_out_of_memory_is_a_resource_error(folder: Path) -> None:
    opened = GraphSession(folder, info(), CPU, 1)
    for reason in (MemoryError(), RuntimeError("Failed to allocate memory for requested buffer of size 10")):
        with pytest.raises(ResourceError, match="not enough memory"), session._guard(opened.graph):
            raise reason


def test_cpu_is_always_there() -> None:
    assert choose_provider("cpu") == choose_provider("CPUExecutionProvider") == CPU
    assert "cpu" in available_providers()
    assert choose_provider("AUTO") in (CPU, providers.CUDA)


@pytest.mark.skipif("cuda" in available_providers(), reason="needs an onnxruntime without CUDA")
def test_cuda_without_cuda_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EnvironmentFault, match="cuda: this onnxruntime has only: cpu"):
        choose_provider("cuda")
    assert not provider_loads(providers.CUDA)
    assert capfd.readouterr() == ("", "")


def test_unknown_provider_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"'cdua'.*auto or one of: .*cpu"):
        choose_provider("cdua")


def test_a_listed_provider_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = providers.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [providers.CUDA, CPU])
    monkeypatch.setattr(providers, "provider_loads", lambda name: name == CPU)
    with pytest.raises(EnvironmentFault, match="do not load; available: cpu"):
        choose_provider("cuda")
    assert choose_provider("auto") == CPU


def test_auto_is_what_the_bundle_was_made_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(providers.onnxruntime(), "get_available_providers", lambda: [providers.CUDA, CPU])
    monkeypatch.setattr(providers, "provider_loads", lambda name: True)
    for target, ep, expected, warned in (
        ("cpu", "auto", CPU, False),
        ("cuda", "auto", providers.CUDA, False),
        ("cpu", "cuda", providers.CUDA, True),
        ("cuda", "cpu", CPU, False),
    ):
        made_for = Manifest("1", {}, {}, "exaone4", "text-generation", "fp32", target, "none", (), {}, {})
        caplog.clear()
        assert _provider_for(made_for, ep) == expected
        assert ("exported for the CPU" in caplog.text) == warned


def test_a_session_that_falls_back_is_refused(folder: Path) -> None:
    # onnxruntime only warns of a provider it does not have, and takes the CPU.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(EnvironmentFault, match="asked for xnnpack, onnxruntime took cpu"):
            GraphSession(folder, info(), "XnnpackExecutionProvider", 1)


@pytest.mark.parametrize("threads", [0, -1, 10_000, True, 2.0])
def test_absurd_threads(threads: object) -> None:
    with pytest.raises(UsageError, match="threads"):
        choose_threads(threads)  # type: ignore[arg-type]


def test_default_threads_fit_this_process() -> None:
    assert 1 <= choose_threads(None) <= len(os.sched_getaffinity(0))
    assert choose_threads(3) == 3


def test_old_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers.onnxruntime(), "__version__", "1.22.1")
    with pytest.raises(EnvironmentFault, match=r"1\.22\.1 is older than 1\.24"):
        providers.onnxruntime()


def test_onnxruntime_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EnvironmentFault, match="Install onnxruntime"):
        providers.onnxruntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))  # what uninstalling may leave
    with pytest.raises(EnvironmentFault, match="__version__.*Install onnxruntime"):
        providers.onnxruntime()


def test_import_is_light_and_telemetry_is_off() -> None:
    code = """
import os, sys, time
start = time.process_time()
import runtime.engine
seconds = time.process_time() - start
heavy = {"torch", "transformers", "onnx", "onnxruntime", "optimum"} & set(sys.modules)
from runtime.providers import onnxruntime
onnxruntime()
print(seconds, sorted(heavy), os.environ["ORT_DISABLE_TELEMETRY"])
"""
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    seconds, rest = run.stdout.split(" ", 1)
    assert rest.strip() == "[] 1"
    # Of the processor; about a quarter of one.
    assert float(seconds) < 3
