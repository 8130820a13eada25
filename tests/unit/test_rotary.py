from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from transformers import Exaone4Config
from transformers.models.exaone4.modeling_exaone4 import Exaone4RotaryEmbedding

from model import rotary
from model.config import RopeConfig, TextConfig

LLAMA3 = RopeConfig(1e6, "llama3", 16.0, 1.0, 4.0, 8192)
TEXT = TextConfig(
    vocab_size=16, hidden_size=512, intermediate_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128,
    rms_norm_eps=1e-5, max_position_embeddings=1 << 18, tie_word_embeddings=False, sliding_window=None,
    layer_types=("full_attention",), rope=LLAMA3,
)  # fmt: skip


def test_the_published_frequencies() -> None:
    frequencies = rotary.inverse_frequencies(LLAMA3, 128)
    known = [1, 0.0316228, 0.0133352, 0.00562341, 0.00169834, 1.574367e-4, 1.111425e-5, 7.75586e-8]
    assert frequencies[[0, 16, 20, 24, 28, 32, 40, 63]] == pytest.approx(known, rel=1e-5)


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("rope", [RopeConfig(1e6), LLAMA3, RopeConfig(1e4), dataclasses.replace(LLAMA3, theta=1e4)])
def test_equal_to_transformers(rope: RopeConfig, head_dim: int) -> None:
    raw = {"rope_type": rope.rope_type, "rope_theta": rope.theta}
    if rope.rope_type == "llama3":
        raw |= {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        raw |= {"original_max_position_embeddings": 8192}
    config = Exaone4Config(
        hidden_size=2 * head_dim, num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim,
        max_position_embeddings=4096, num_hidden_layers=1, sliding_window=None, layer_types=["full_attention"],
        rope_parameters=raw,
    )  # fmt: skip
    module = Exaone4RotaryEmbedding(config)
    cos, sin = module(torch.zeros(1, 1), torch.arange(4096)[None])
    text = dataclasses.replace(TEXT, head_dim=head_dim, max_position_embeddings=4096, rope=rope)
    half = head_dim // 2
    for ours, theirs in zip(rotary.rope_tables(text), (cos, sin), strict=True):
        # torch's power may be a unit of the last place off, which grows with the position.
        np.testing.assert_allclose(ours, theirs[0, :, :half].numpy(), rtol=0, atol=1e-3 if rope.theta < 1e6 else 3e-4)
        assert np.array_equal(theirs[0, :, :half], theirs[0, :, half:])


def test_every_value_is_rounded_correctly() -> None:
    cos, sin = rotary.rope_tables(TEXT)
    angles = np.arange(1 << 18).astype(np.float32)[:, None] * rotary.inverse_frequencies(LLAMA3, 128)
    wide = angles.astype(np.float64)
    assert (cos != np.cos(wide).astype(np.float32)).sum() <= 2
    assert (sin != np.sin(wide).astype(np.float32)).sum() <= 2


def test_the_same_bits_whatever_the_processor_can() -> None:
    code = (
        "import hashlib; from tests.unit.test_rotary import TEXT; from model.rotary import rope_tables;"
        "print(hashlib.sha256(b''.join(t.tobytes() for t in rope_tables(TEXT))).hexdigest())"
    )
    # What numpy would otherwise choose at run time; its own float32 cos differs between the two.
    dispatched = " ".join(import_module("numpy._core._multiarray_umath").__cpu_dispatch__)
    plain = os.environ | {"NPY_DISABLE_CPU_FEATURES": dispatched}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = b"".join(table.tobytes() for table in rotary.rope_tables(TEXT))
    assert done.stdout.strip() == hashlib.sha256(tables).hexdigest()
