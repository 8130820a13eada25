"""A checkpoint's weights in the eager model: for verification, calibration and parity tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from model.config import load_config
from model.errors import NumericalError
from model.exaone import Exaone
from model.shards import TensorRef
from model.text import rope_tables
from model.weights import Checkpoint


def load_exaone(folder: Path) -> Exaone:
    """The model of a checkpoint folder in float32, ready to run; with its draft head where there is one.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
        UsageError: it is of another family, or quantized.
        NumericalError: a weight is NaN or infinite.
    """
    config = load_config(folder)
    checkpoint = Checkpoint.open(folder)
    bound = checkpoint.bind(config)
    with torch.device("meta"):
        model = Exaone(config, draft=checkpoint.has_draft_head)
    state, loaded = model.state_dict(), dict[tuple[Path, int], torch.Tensor]()
    for name, ref in bound.items():
        place = (ref.file, ref.offset)
        if place not in loaded:  # a head that is the embedding, or the draft head's, is one tensor
            loaded[place] = _read(ref).view(state[name].shape)
    weights = {name: loaded[ref.file, ref.offset] for name, ref in bound.items() if name in state}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    for part in filter(None, (model.decoder, model.mtp)):
        part.cos, part.sin = rope_tables(config.text)
    return model.eval().requires_grad_(False)


def _read(ref: TensorRef) -> torch.Tensor:
    values = np.ascontiguousarray(ref.read().astype(np.float32))
    if not np.isfinite(values).all():
        raise NumericalError("cannot load checkpoint", ref.name, "it holds NaN or infinite values", "Use a sound copy")
    return torch.from_numpy(values)
