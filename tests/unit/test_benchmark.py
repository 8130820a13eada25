"""The parts of `bench` that need no bundle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from exaone_export.benchmark import bandwidth, plot
from exaone_export.benchmark.bandwidth import ReadBandwidth, buffer_bytes, last_cache_bytes
from exaone_export.benchmark.process import Worker
from exaone_export.benchmark.report import Bench, Growth, Settings, Spread
from exaone_export.benchmark.table import print_table
from exaone_export.benchmark.traffic import weight_bytes_per_token
from model.bundle import Manifest, WeightInfo
from model.config import parse_config
from model.errors import BundleError, EnvironmentFault, ResourceError, UsageError
from tests.tiny import make_config

ONE = Spread(1.0, 2.0, 4.0)
REPORT = Bench(
    bundle="a", prefill_tokens_per_s=ONE, decode_tokens_per_s=ONE, time_to_first_token_s=ONE, vision_s=ONE, load_s=ONE,
    peak_rss_bytes=10**9, bundle_bytes=10**8, weight_bytes_per_token=5 * 10**7, read_bandwidth_bytes_per_s=3e10,
    roofline_fraction=0.5, ep="cpu", threads=2, prompt_tokens=20, image_tokens=4, new_tokens=8, depth=20, batch=2,
    repeat=3, read_bandwidth=ONE, roofline=ONE,
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


def test_bytes_of_a_token_count_what_is_read() -> None:
    config = parse_config(make_config("dense"))
    vocabulary = config.text.vocab_size
    weights = {
        "decoder.embed_tokens": WeightInfo(8, 32, True, "rtn", 64 * vocabulary),
        "decoder.lm_head": WeightInfo(8, 32, True, "rtn", 64 * vocabulary),
        "decoder.layers.0.mlp.up_proj": WeightInfo(4, 32, False, "rtn", 3200),
        "decoder.layers.0.mlp.down_proj": WeightInfo(0, 0, True, "", 100),
        "vision_encoder.merger": WeightInfo(0, 0, True, "", 10**6),
        "mtp.lm_head": WeightInfo(0, 0, True, "", 10**6),
    }
    manifest = Manifest("0", {}, {}, "exaone4", "text-generation", "fp16", "cpu", "r", (), weights, {})
    head = 64 * vocabulary + 2 * vocabulary * 2  # codes, and a scale of two bytes for each of two blocks a row
    layers = (1600 + 2 * 100 + 50) + 2 * 100  # codes, scales, zero points of half a byte; halves
    assert weight_bytes_per_token(manifest, config) == head + layers + (64 + 2 * 2)


def test_the_peak_grows_with_what_is_held() -> None:
    # A process of its own: an earlier peak would hide this one.
    code = (
        "import numpy as np; from exaone_export.benchmark import worker; before = worker.peak_bytes();"
        "held = np.ones(1 << 23, np.int64); assert worker.peak_bytes() - before > held.nbytes // 2"
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
    assert [word for word in ("prefill", "image", "load", "bandwidth", "50 %") if word not in text] == []


def test_another_device_has_no_roof() -> None:
    stream = StringIO()
    print_table(replace(REPORT, ep="cuda", roofline=None, roofline_fraction=None), stream)
    assert "of what it allows" not in stream.getvalue()


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
