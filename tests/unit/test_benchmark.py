"""The parts of `bench` that need no bundle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from exaone_export.benchmark import bandwidth, plot
from exaone_export.benchmark.bandwidth import ReadBandwidth, buffer_bytes, last_cache_bytes
from exaone_export.benchmark.process import Worker
from exaone_export.benchmark.report import Bench, Growth, Settings, Spread
from exaone_export.benchmark.table import print_table
from exaone_export.benchmark.traffic import cache_bytes_per_token, weight_bytes_per_token
from model.bundle import WINDOW_CACHE, GraphInfo, Manifest, TensorInfo, past_key, past_value
from model.errors import BundleError, EnvironmentFault, ResourceError, UsageError

ONE = Spread(1.0, 2.0, 4.0)
REPORT = Bench(
    bundle="a", prefill_tokens_per_s=ONE, decode_tokens_per_s=ONE, time_to_first_token_s=ONE, vision_s=ONE, load_s=ONE,
    peak_rss_bytes=10**9, bundle_bytes=10**8, weight_bytes_per_token=5 * 10**7, read_bandwidth_bytes_per_s=3e10,
    roofline_fraction=0.005, ep="cpu", threads=2, prompt_tokens=20, image_tokens=4, new_tokens=8, depth=20, batch=2,
    repeat=3, read_bandwidth=ONE, roofline=ONE, cache_bytes_per_token=10**6, traffic_fraction=0.75, traffic=ONE,
)  # fmt: skip
GROWTH = Growth((1, 2), (ONE, ONE), (ONE, ONE), (16, 64), (ONE, ONE))


def test_a_spread_orders_its_values() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(1.0, 2.0, 3.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.0, 1.5, 2.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_tokens", 0),
        ("new_tokens", True),
        ("depth", -1),
        ("batch", 5000),
        ("repeat", 2.5),
        ("image", (0, 5)),
        ("image", (5,)),
        ("image", (5, 10**6)),
    ],
)
def test_settings_refuse_what_makes_no_sense(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        replace(Settings(), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_whole_buffer_is_read(threads: int) -> None:
    with ReadBandwidth(threads, 1 << 22) as memory:
        assert memory.measure(2) > 0
        memory._words[-1] = 4  # one word of the last thread's share
        with pytest.raises(RuntimeError, match="what was written"):
            memory.measure(1)


def test_the_buffer_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_cache_bytes() > 0
    monkeypatch.setattr(bandwidth, "available_bytes", lambda: None)
    assert buffer_bytes() == min(2 << 30, 16 * last_cache_bytes())
    monkeypatch.setattr(bandwidth, "available_bytes", lambda: 1 << 20)
    assert buffer_bytes() == 32 << 20


def test_cache_sizes_have_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_CACHES", tmp_path)
    assert last_cache_bytes() == 64 << 20
    for i, text in enumerate(["32K\n", "3M\n", "nonsense\n"]):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(text)
    assert last_cache_bytes() == 3 << 20


def test_bytes_of_a_token_count_what_its_nodes_read(tmp_path: Path) -> None:
    rows, width = 100, 64
    stored = {
        "codes": np.zeros((rows, 2, 16), np.uint8),  # int4 in blocks of 32, and a table shared with the embedding
        "scales": np.zeros((rows, 2), np.float16),
        "table": np.zeros((rows, width // 2), np.uint8),
        "bytes": np.zeros((width, 50), np.int8),
        "column scales": np.zeros(50, np.float32),
        "cosines": np.zeros((2048, 8), np.float32),
        "epsilon": np.float32(1e-6),
        "unused": np.zeros(10**6, np.float32),
    }
    nodes = [
        helper.make_node("GatherBlockQuantized", ["table", "ids", "scales"], ["x"], domain="com.microsoft"),
        helper.make_node("MatMulInteger", ["x", "bytes"], ["sums"]),
        helper.make_node("Mul", ["sums", "column scales"], ["y"]),
        helper.make_node("Add", ["y", "epsilon"], ["z"]),
        helper.make_node("GroupQueryAttention", ["z", *[""] * 6, "cosines", "cosines"], ["a"], domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["a", "codes", "scales"], ["logits"], domain="com.microsoft"),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, None])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]
    save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, tensors)), tmp_path / "decoder.onnx")
    cache = tuple(TensorInfo(name, "float16", ("b", 2, "n", 16)) for name in (past_key(0), past_value(0)))
    graph = GraphInfo("decoder", "decoder.onnx", (), cache, ())
    manifest = Manifest("0", {}, {}, "exaone4", "text-generation", "fp16", "cpu", "r", (graph,), {}, {})
    row = width // 2 + 2 * 2 + 2 * 8 * 4
    assert weight_bytes_per_token(tmp_path, manifest) == row + width * 50 + 50 * 4 + 4 + rows * (width // 2 + 2 * 2)
    assert cache_bytes_per_token(manifest, None, 10) == 10 * 2 * (2 * 16 * 2)


def test_a_window_layer_reads_no_more_than_its_window(tmp_path: Path) -> None:
    names = [name(layer) for layer in range(2) for name in (past_key, past_value)]
    lengths = (WINDOW_CACHE, WINDOW_CACHE, "n", "n")
    cache = tuple(TensorInfo(name, "float32", ("b", 2, n, 16)) for name, n in zip(names, lengths, strict=True))
    graph = GraphInfo("decoder", "decoder.onnx", (), cache, ())
    manifest = Manifest("0", {}, {}, "exaone4", "text-generation", "fp32", "cpu", "r", (graph,), {}, {})
    for depth, tokens in ((5, 5 + 5), (100, 8 + 100)):
        assert cache_bytes_per_token(manifest, 8, depth) == tokens * 2 * (2 * 16 * 4)


def test_the_peak_grows_with_what_is_held() -> None:
    # A process of its own: an earlier peak would hide this one.
    code = (
        "import numpy as np; from exaone_export.benchmark import worker; before = worker.peak_bytes();"
        "held = np.ones(1 << 23, np.int64); assert worker.peak_bytes() - before > held.nbytes // 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says a program's name beside its memory")
def test_a_program_may_have_any_name() -> None:
    """That of a script in Korean, which the system cuts in the middle of a character."""
    code = (
        "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xeb\\x82\\xb4\\xeb', 0, 0, 0);"
        "from exaone_export.benchmark import worker; from exporter import report;"
        "assert worker.peak_bytes() > 1 << 20 and report.peak_rss_bytes() > 1 << 20"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_tells_errors_as_they_are(tmp_path: Path) -> None:
    with Worker() as one, pytest.raises(BundleError, match="not a folder"):
        one.call("load", folder=str(tmp_path / "missing"), ep="cpu", threads=1, images=False)


def test_a_killed_worker_is_a_matter_of_memory() -> None:
    with Worker() as one:
        assert one.call("peak") > 0
        os.kill(one._process.pid, signal.SIGKILL)
        with pytest.raises(ResourceError, match="signal 9"):
            one.call("peak")
    assert one._process.returncode == -signal.SIGKILL


def test_a_worker_outlives_ctrl_c_and_ends_with_its_input() -> None:
    with Worker() as one:
        assert one.call("peak") > 0
        os.kill(one._process.pid, signal.SIGINT)
        assert one.call("peak") > 0
    assert one._process.returncode == 0


def test_two_tables_and_their_ratios() -> None:
    stream = StringIO()
    print_table(replace(REPORT, compared=replace(REPORT, bundle="b"), ratios={"decode_tokens_per_s": ONE}), stream)
    text = stream.getvalue()
    assert "a: 20 tokens, 4 of them an image's, 2 rows, then 8 after 20; cpu, 2 threads, 3 rounds" in text
    assert text.count("peak memory") == 2
    assert "a over b" in text
    assert "× 2.000" in text
    assert [
        word for word in ("prefill", "image", "load", "bandwidth", "0.5 %", "75.0 %", "1 MB") if word not in text
    ] == []


def test_another_device_has_no_roof() -> None:
    stream = StringIO()
    print_table(replace(REPORT, ep="cuda", roofline=None, roofline_fraction=None, traffic=None), stream)
    assert "%" not in stream.getvalue()


def test_a_plot_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"matplotlib.*exaone-export\[plot\]"):
        plot.check_plot(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.jpeg.exe", "nowhere/a.png", "."])
def test_a_plot_needs_a_file_it_can_write(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot draw"):
        plot.check_plot(tmp_path / name)


@pytest.mark.parametrize("compared", [False, True])
def test_growth_is_drawn(compared: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = replace(REPORT, growth=GROWTH)
    path = tmp_path / "growth.svg"
    plot.draw(replace(report, compared=replace(report, bundle="b")) if compared else report, path)
    assert "</svg>" in path.read_text()
    with pytest.raises(UsageError, match="growth"):
        plot.draw(REPORT, path)
