"""What the comparison with llama.cpp's quantizers rests on: its model of 64 layers is the decoder of eight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.quality_llama import LAYERS, PLACES, write_twin
from exaone_export.demo import checkpoint_folder
from model.load import load_exaone
from tests import tiny


def test_the_twin_computes_what_the_decoder_does(tmp_path: Path) -> None:
    source = checkpoint_folder()
    model = load_exaone(source)
    write_twin(source, model, tmp_path / "twin")
    twin = load_exaone(tmp_path / "twin")
    assert len(twin.decoder.layers) == LAYERS
    ids = torch.arange(80, 160)[None]  # more than a window
    with torch.inference_mode():
        expected, found = model(ids)[0], twin(ids)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    kinds = json.loads((tmp_path / "twin" / "config.json").read_text())["layer_types"]
    assert [kinds[place] for place in PLACES] == json.loads((source / "config.json").read_text())["text_config"][
        "layer_types"
    ]


def test_other_shapes_have_no_twin(tmp_path: Path) -> None:
    source = tiny.make_checkpoint(tmp_path / "source", "vlm", layer_types=["full_attention"] * 4)
    with pytest.raises(SystemExit, match="eight layers"):
        write_twin(source, load_exaone(source), tmp_path / "twin")
