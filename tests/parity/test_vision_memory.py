"""What encoding a large image takes, in a process of its own, against what is predicted before it is tried."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from runtime.memory import vision_bytes
from tests.parity.onnx_graphs import multimodal_config, session_of, vision_config

RESET = Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(not RESET.exists(), reason="the system does not tell a process's largest size")
SIDE = 72  # patches: 5,184 together

CHILD = """
import sys
from pathlib import Path
import numpy as np
from model.bundle import GraphInfo, TensorInfo
from runtime.session import GraphSession

folder, side, width = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
inputs = TensorInfo("pixel_values", "float32", ("p", width)), TensorInfo("image_grid_thw", "int64", ("n", 3))
outputs = (TensorInfo("image_features", "float32", ("t", 48)),)
graph = GraphInfo("vision_encoder", "vision_encoder.onnx", (), inputs, outputs)
session = GraphSession(folder, graph, "CPUExecutionProvider", 1)

def encode(side):
    values = np.random.default_rng(0).standard_normal((side * side, width), np.float32)
    feeds = {"pixel_values": values, "image_grid_thw": np.array([[1, side, side]], np.int64)}
    features = session.run(feeds, ["image_features"])[0]
    assert features.shape == (side * side // 4, 48) and np.isfinite(features).all()

def kilobytes(key):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(key + ":"))

encode(8)
Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size so far
before = kilobytes("VmRSS")
encode(side)
print(kilobytes("VmHWM") - before)
"""


def test_memory_grows_with_the_patches_and_not_with_their_square(tmp_path: Path) -> None:
    vision = vision_config(num_heads=16, num_kv_heads=4, hidden_size=256, intermediate_size=640)
    session = session_of(dataclasses.replace(multimodal_config(), vision=vision), "vision_encoder")
    ir.save(session.model, tmp_path / "vision_encoder.onnx")
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(SIDE), str(vision.patch_dim)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = int(child.stdout) * 1024
    predicted = vision_bytes(vision, SIDE * SIDE)
    assert predicted / 2.5 < measured < predicted
    assert predicted < 4 * vision.num_heads * SIDE**4 / 10
