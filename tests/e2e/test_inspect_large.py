"""inspect on what is not here: models of the published sizes, quantized ones, other tasks, and the hub."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import exaone_export as ee
from exaone_export.cli import main
from model.config import parse_config
from model.errors import UsageError
from model.weights import expected_tensors, published
from tests.hub_server import point_at, serve
from tests.published import EXAONE_4_1B, EXAONE_4_32B, EXAONE_45_33B
from tests.quantized_writers import FORMATS, make_quantized
from tests.tiny import make_checkpoint, make_config, make_task_checkpoint, make_tensors, save_tensors

MOST = 262144
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}


def write_headers(folder: Path, raw: dict[str, Any]) -> Path:
    """A checkpoint of one sparse file: true names, shapes and size, and no weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    config = parse_config(raw)
    header, offset = {}, 0
    for name, shape in expected_tensors(config, draft=config.vision is not None).items():
        size = 2 * math.prod(shape)
        name = published(name, config.vision is None, config.architecture)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_headers(tmp_path_factory.mktemp("published") / "EXAONE-4.5-33B", EXAONE_45_33B)


def test_the_published_model(large: Path) -> None:
    """Windows count as windows: at the full context the cache is 18 GB in half precision, not 69."""
    found = ee.inspect(large)
    assert found.parameters == 34_350_097_664
    assert found.bits_per_weight == 16
    assert set(found.memory_bytes) == {4096, 32768, MOST}
    half = found.outlooks["cuda"]["int4"]
    assert half.memory[MOST].kv == MOST * (64 << 10) + 48 * 4096 * (4 << 10)
    assert round(half.memory[MOST].kv / 1e9, 1) == 18.0
    assert found.kv_bytes_per_token == 128 << 10  # in float32
    assert found.kv_bytes[MOST] == MOST * (128 << 10) + 48 * (4096 + 64) * (8 << 10)
    assert [round(found.outlooks["cuda"][recipe].bytes / 1e9, 1) for recipe in ("none", "int8", "int4")] == [
        68.8,
        36.6,
        20.0,
    ]
    for recipes in found.outlooks.values():
        for outlook in recipes.values():
            totals = [need.total for need in outlook.memory.values()]
            assert totals == sorted(totals)
            assert all(total > outlook.bytes * 0.8 for total in totals)


def test_no_weight_is_read(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.shards import TensorRef

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    for method in ("read", "rows"):
        monkeypatch.setattr(TensorRef, method, refuse)
    ee.inspect(large)


def test_a_redundant_tied_head_is_not_read(tmp_path: Path) -> None:
    """1.2B re-saved with its head: nothing of 840 MB is compared."""
    folder = write_headers(tmp_path / "one", EXAONE_4_1B)
    with (folder / "model.safetensors").open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    end = max(entry["data_offsets"][1] for entry in header.values())
    table = header["model.embed_tokens.weight"]
    count = table["data_offsets"][1] - table["data_offsets"][0]
    header["lm_head.weight"] = table | {"data_offsets": [end, end + count]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end + count)
        stream.seek(8 + len(text) + end)
        stream.write(b"\1")  # unlike the embedding, which export would refuse
    found = ee.inspect(folder)
    assert found.kv_bytes_per_token == 30 * 2 * 8 * 64 * 4
    assert found.kv_window_bytes == 0


def test_the_table_for_people(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(large)]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = next(line for line in lines if line.startswith("memory"))
    assert "262,144 tokens" in heads
    table = lines[lines.index(heads) :]
    everywhere = ("none", "int8", "int4", "int4-edge", "int4-quality")
    recipes = {"cpu": (*everywhere, "int8-dynamic"), "cuda": everywhere}
    assert [line.split()[:2] for line in table[1:12]] == [[where, name] for where in recipes for name in recipes[where]]
    assert next(line for line in table if line.startswith("cuda    cache fp16")).endswith("18 GB")
    assert max(map(len, table)) < 100


def test_a_text_model_without_windows_of_its_own(tmp_path: Path) -> None:
    found = ee.inspect(write_headers(tmp_path / "text", EXAONE_4_32B | {"sliding_window": None}), context=131072)
    assert found.kv_bytes == {131072: 131072 * (512 << 10)}


@pytest.mark.parametrize(
    ("name", "method", "bits"),
    [
        ("compressed-int4-g128", "compressed-tensors", 4),
        ("awq-g32", "awq", 4),
        ("gptq-int4-g128", "gptq", 4),
        ("gptq-int4-g128-actorder", "gptq", 4),
        ("fp8-block", "fp8", 8),
    ],
)
def test_quantized_checkpoints_are_described_as_they_are(tmp_path: Path, name: str, method: str, bits: int) -> None:
    checkpoint = make_quantized(tmp_path / name, FORMATS[name], "dense", **WIDE)
    found, plain = ee.inspect(checkpoint.folder), ee.inspect(checkpoint.plain)
    assert (found.quantization, plain.quantization) == (method, "none")
    assert found.parameters == plain.parameters
    quantized = sum(count for label, count in found.quantized.items() if str(bits) in label and "bf16" not in label)
    assert quantized > 0.5 * found.parameters
    assert found.bits_per_weight < 16 < plain.bits_per_weight
    taken_over = found.outlooks["cpu"]["none"].bytes < 0.6 * plain.outlooks["cpu"]["none"].bytes
    assert taken_over == (bits == 4)  # 8-bit floats become float


@pytest.mark.parametrize("architecture", ["Exaone4ForSequenceClassification", "Exaone4ForQuestionAnswering"])
def test_other_tasks_have_no_cache(tmp_path: Path, architecture: str) -> None:
    folder = make_task_checkpoint(tmp_path / "checkpoint", "hybrid", architecture)
    found = ee.inspect(folder)
    assert found.kv_bytes_per_token == found.kv_bytes[2048] == 0
    assert found.memory_bytes[2048] > found.predicted_bytes["none"]
    ee.export(folder, tmp_path / "bundle")
    made = ee.inspect(tmp_path / "bundle")
    assert (made.task, made.graphs[0].outputs) == (found.task, found.graphs[0].outputs)
    assert made.kv_bytes == {2048: 0}
    assert made.memory_bytes[2048] == pytest.approx(found.memory_bytes[2048], rel=0.01)


def test_tensors_beyond_the_model_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", "dense")
    tensors = make_tensors(make_config("dense"))
    save_tensors(folder, tensors | {"model.extra.weight": tensors["model.norm.weight"]})
    found = ee.inspect(folder)
    assert found.left_out == {"extra": ("model.extra.weight",)}
    assert main(["inspect", str(folder)]) == 0
    assert "1 tensors (extra)" in capsys.readouterr().out


def test_revisions_are_the_hubs(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", "dense")
    with pytest.raises(UsageError, match="--revision"):
        ee.inspect(folder, revision="main")


def test_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is described as its folder is, and no weight file is fetched."""
    folder = make_checkpoint(tmp_path / "checkpoint", "vlm", sharded=3)
    name = "LGAI-EXAONE/EXAONE-Tiny"
    with serve() as hub:
        hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})
        point_at(hub, monkeypatch, tmp_path / "cache")
        assert ee.inspect(name, revision="main") == ee.inspect(folder)
        with pytest.raises(UsageError):
            ee.inspect(name, revision="nowhere")
