from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter import export as export_room
from exporter import needs
from exporter.export import ExportOptions, export_checkpoint, rewrite_bundle
from exporter.needs import Need, Plan, check_need
from model.bundle import FLOAT_BYTES
from model.config import load_config
from model.errors import ResourceError
from model.weights import Checkpoint
from quantize.apply import Quantizer
from quantize.calibration.job import Calibration
from quantize.recipe import SHIPPED, Recipe, Rule, load_recipe
from quantize.scheme import Scheme
from tests import calibrating, tiny
from tests.declared import declare_readers

MIB = 1 << 20
# As benchmarks/export_memory.py measured them, in int4 with two threads: bytes of the bundle, peak RSS. The large model
# with four of its 64 text layers: its embedding is its largest weight.
SMALL, LARGE = (666_832_354, 512 * MIB), (3_711_537_892, 680 * MIB)
# Wide enough that graphs share what they have in common, and that weights outweigh the graphs' structure.
WIDE: dict[str, Any] = {
    "hidden_size": 256, "vocab_size": 4096, "num_attention_heads": 16, "vision": {"out_hidden_size": 256},
}  # fmt: skip
MIXED = Recipe(
    "mixed",
    (
        Rule("*.embed_tokens", None),
        Rule("*.mlp.*", Scheme(4, 128, symmetric=False)),
        Rule("mtp.lm_head", Scheme(4, 32)),
        Rule("*.lm_head", Scheme(8, 64)),
        Rule("vision_encoder.*", None),
        Rule("*", Scheme(8, 16)),
    ),
)
RECIPES = {"none": None, "mixed": MIXED} | {name: load_recipe(name) for name in SHIPPED}


def plan_of(source: Path, recipe: Recipe | None, dtype: str = "fp32", **more: Any) -> Plan:
    config = load_config(source)
    return Plan(config, Checkpoint.open(source).bind(config), Quantizer(recipe), FLOAT_BYTES[dtype], **more)


def transform_of(source: Path, name: str) -> Quantizer:
    """What applies a recipe, with prompts where it needs some."""
    recipe = RECIPES[name]
    if recipe is None or recipe.calibrated_rule is None:
        return Quantizer(recipe)
    return Quantizer(recipe, calibration=Calibration(calibrating.random_prompts(load_config(source))))


@pytest.fixture
def quick_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_room, "_trace", declare_readers)


@pytest.mark.usefixtures("quick_trace")
@pytest.mark.parametrize(("kind", "recipe"), list(itertools.product(tiny.KINDS, RECIPES)))
def test_data_files_are_as_large_as_reckoned(tmp_path: Path, kind: str, recipe: str) -> None:
    source = tiny.make_checkpoint(tmp_path / "source", kind, **WIDE)
    for dtype in ("fp32", "fp16") if recipe != "none" else ("fp32",):
        out = tmp_path / dtype
        export_checkpoint(source, out, ExportOptions(dtype=dtype), transform_of(source, recipe))
        plan = plan_of(source, RECIPES[recipe], dtype)
        expected = plan.data_bytes()
        actual = {path.name.partition(".")[0]: path.stat().st_size for path in out.glob("*.data")}
        assert actual.keys() == expected.keys()
        # The last tensor is not filled up to a page.
        assert all(0 <= expected[graph] - size < 4096 for graph, size in actual.items()), (expected, actual)


def test_a_bundle_is_at_most_as_large_as_reckoned(tmp_path: Path) -> None:
    source = tiny.make_checkpoint(tmp_path / "source", "dense", **WIDE)
    report = export_checkpoint(source, tmp_path / "out", transform=Quantizer(None))
    again = rewrite_bundle(tmp_path / "out", tmp_path / "int8", Quantizer(RECIPES["int8"]))
    for made in (report, again):
        assert made.bytes == sum(path.stat().st_size for path in made.folder.iterdir())
        # The structure, which is the part that is estimated, is a fifth of so small a bundle.
        assert made.bytes <= made.predicted_bytes <= 1.05 * made.bytes
    assert report.predicted_peak_bytes > 300 * MIB


def shaped(tmp_path: Path, model: str, layers: int | None = None) -> Path:
    from benchmarks.synthetic import config_of, write_checkpoint

    source = tmp_path / model
    write_checkpoint(source, config_of(model, layers), real=False)
    return source


@pytest.mark.parametrize(("model", "measured"), [("4.0-1.2b", SMALL), ("4.5-33b", LARGE)])
def test_the_published_models(tmp_path: Path, model: str, measured: tuple[int, int]) -> None:
    source = shaped(tmp_path, model, 4 if measured is LARGE else None)
    need = plan_of(source, RECIPES["int4"], threads=2).need()
    size, peak = measured
    assert need.bundle == pytest.approx(size, rel=1e-3)
    assert peak < need.memory < 1.25 * peak
    # Safetensors maps a file to check its header, and a shard of the large model has 5 GB.
    assert (need.address_space > 5_000_000_000) == (model == "4.5-33b")


def test_memory_depends_on_the_largest_weight_not_on_their_number(tmp_path: Path) -> None:
    sizes = []
    for layers, width in ((4, 64), (16, 64), (4, 1024)):
        source = tiny.make_checkpoint(tmp_path / f"{layers}x{width}", "dense", num_hidden_layers=layers,
                                      layer_types=["full_attention"] * layers, vocab_size=width * 8)  # fmt: skip
        sizes.append(plan_of(source, None).need().memory)
    few, many, wide = sizes
    assert few < many < few + 12 * 2 * MIB
    assert wide > few


def test_threads_and_half_precision_count(tmp_path: Path) -> None:
    source = tiny.make_checkpoint(tmp_path / "source", "hybrid")
    one, eight = (plan_of(source, RECIPES["int4"], threads=threads).need() for threads in (1, 8))
    assert one.bundle == eight.bundle
    assert one.memory < eight.memory
    assert one.address_space + 7 * 80 * MIB <= eight.address_space
    assert plan_of(source, None, "fp16").need().bundle < 0.6 * plan_of(source, None).need().bundle


NEED = Need(bundle=2_000_000_000, largest_file=1_500_000_000, memory=700_000_000, address_space=1_300_000_000)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What there is, to be changed by a test; enough of everything at first."""
    there: dict[str, Any] = {"free": 10**12, "memory": 10**12, "space": None, "file": None}
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=there["free"]))
    monkeypatch.setattr(needs, "physical_bytes", lambda: there["memory"])
    monkeypatch.setattr(needs, "address_space_left", lambda: there["space"])
    monkeypatch.setattr(needs, "own_bytes", lambda: (200_000_000, 100_000_000))
    monkeypatch.setattr(needs, "_file_limit", lambda: there["file"])
    return there


@pytest.mark.parametrize(
    ("what", "least", "message"),
    [
        ("free", 2_000_000_000, "not enough disk space: out: 2.00 GB are needed, 2.00 GB are free"),
        ("memory", 600_000_000, "this process: the export takes about 700.00 MB, 700.00 MB can be had"),
        ("space", 1_100_000_000, "the export takes about 1.30 GB of address space, the limit is 1.30 GB"),
        ("file", 1_500_000_000, "its largest file takes 1.50 GB, a file may hold 1.50 GB"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, machine: dict[str, Any], what: str, least: int, message: str
) -> None:
    machine[what] = least
    check_need(NEED, tmp_path / "not" / "there" / "out")
    machine[what] = least - 1
    with pytest.raises(ResourceError, match=re.escape(message)) as refusal:
        check_need(NEED, tmp_path / "out")
    assert refusal.value.exit_code == 6
    assert refusal.value.remedy
    assert str(tmp_path) not in str(refusal.value)


def test_unknown_limits_are_none(tmp_path: Path, machine: dict[str, Any]) -> None:
    machine["memory"] = None
    check_need(replace(NEED, memory=10**15), tmp_path / "out")


def test_what_an_interrupted_export_has_written_counts_as_room(tmp_path: Path, machine: dict[str, Any]) -> None:
    machine["free"] = 500_000_000
    check_need(NEED, tmp_path / "out", present=1_500_000_000)
    with pytest.raises(ResourceError, match=r"600\.00 MB are needed, 500\.00 MB are free"):
        check_need(NEED, tmp_path / "out", present=1_400_000_000)


def test_refused_before_tracing_and_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_work(*_: object) -> None:
        raise AssertionError("work began")

    source = tiny.make_checkpoint(tmp_path / "source", "vlm")
    monkeypatch.setattr(export_room, "_trace", no_work)
    monkeypatch.setattr("exporter.job.SourceFiles", no_work)
    monkeypatch.setattr(needs, "physical_bytes", lambda: 1000)
    monkeypatch.setattr(needs, "own_bytes", lambda: (0, 0))  # what other tests hold counts as had already
    with pytest.raises(ResourceError, match="not enough memory"):
        export_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
