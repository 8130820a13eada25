"""The checkpoints that the memory benchmark makes, which it would be worthless without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import synthetic
from model.config import load_config
from model.shards import TensorRef
from model.weights import Checkpoint

PLAIN = TensorRef._bytes


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> synthetic.Values:
    monkeypatch.setattr(TensorRef, "_bytes", TensorRef._bytes)  # put back afterwards
    return synthetic.install()


def test_the_large_model_takes_no_room_and_is_complete(tmp_path: Path, reader: synthetic.Values) -> None:
    folder = tmp_path / "checkpoint"
    tensors = synthetic.write_checkpoint(folder, synthetic.config_of("4.5-33b", None), real=False)
    assert sum(int(np.prod(shape)) for shape in tensors.values()) == 34_350_097_664
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 2_000_000
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.bind(load_config(folder))) == len(tensors) + 1  # the draft head's output matrix is shared
    first, second = (checkpoint.tensors[f"model.language_model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    rows = first.rows(100, 102).astype(np.float32)
    assert rows.shape == (2, 5120)
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows, second.rows(100, 102).astype(np.float32))
    assert np.array_equal(rows, first.rows(99, 103)[1:3].astype(np.float32))
    assert 0.018 < rows.std() < 0.022
    assert reader.bytes == 2 * 5120 * (2 + 2 + 4)


def test_real_files_hold_what_the_reader_gives(tmp_path: Path, reader: synthetic.Values) -> None:
    config = synthetic.config_of("4.0-1.2b", 1) | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64}
    synthetic.write_checkpoint(tmp_path / "sparse", config, real=False)
    generated = {name: ref.read() for name, ref in Checkpoint.open(tmp_path / "sparse").tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorRef, "_bytes", PLAIN)
        synthetic.write_checkpoint(tmp_path / "real", config, real=True)
        stored = {name: ref.read() for name, ref in Checkpoint.open(tmp_path / "real").tensors.items()}
    assert stored.keys() == generated.keys()
    assert all(np.array_equal(stored[name], generated[name]) for name in stored)
    assert reader.seconds >= 0
