"""A checkpoint's weights in the eager model: for verification, calibration and parity tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model.config import load_config
from model.errors import NumericalError
from model.exaone import Exaone
from model.heads import EncoderModel
from model.source import WeightSource
from model.text import rope_tables
from model.weights import Checkpoint


def load_exaone(folder: Path) -> Exaone:
    """The model of a checkpoint folder in float32, ready to run; with its draft head where there is one.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
        UsageError: it is of another family, or quantized in a way that cannot be imported.
        NumericalError: a weight is NaN or infinite.
    """
    config = load_config(folder)
    checkpoint = Checkpoint.open(folder)
    bound = checkpoint.bind(config)
    with torch.device("meta"):
        model = Exaone(config, draft=checkpoint.has_draft_head)
    _assign(model, bound)
    model.tie_weights()
    tables = rope_tables(config.text)
    for part in filter(None, (model.decoder, model.mtp)):
        part.cos, part.sin = tables
    return model.eval().requires_grad_(False)


def load_encoder(folder: Path, task: str) -> EncoderModel:
    """What a checkpoint folder's model computes for a task other than generation, in float32. Raises as `load_exaone`.

    Args:
        folder: of the checkpoint.
        task: one that its architecture has weights for.
    """
    config = replace(load_config(folder), task=task)
    bound = Checkpoint.open(folder).bind(config)
    with torch.device("meta"):
        model = EncoderModel(config)
    _assign(model, bound)
    if model.decoder is not None:
        model.decoder.cos, model.decoder.sin = rope_tables(config.text)
    return model.eval().requires_grad_(False)


def load_part(module: nn.Module, bound: Mapping[str, WeightSource], prefix: str) -> None:
    """Gives a part of a model its weights in float32, and reads no others.

    Args:
        module: the part; its weights need no values yet.
        bound: canonical name → weight, as `Checkpoint.bind` gives them.
        prefix: canonical name of the part, e.g. "decoder.layers.3".

    Raises:
        CheckpointError: a file cannot be read any more.
        NumericalError: a weight is NaN or infinite.
    """
    state = module.state_dict()
    weights = {name: _read(bound[f"{prefix}.{name}"]).view(value.shape) for name, value in state.items()}
    module.load_state_dict(weights, assign=True)


def _assign(model: nn.Module, bound: Mapping[str, WeightSource]) -> None:
    state, loaded = model.state_dict(), dict[tuple[Path, int], torch.Tensor]()
    for name, ref in bound.items():
        place = (ref.file, ref.offset)
        if place not in loaded:  # a head that is the embedding, or the draft head's, is one tensor
            loaded[place] = _read(ref).view(state[name].shape)
    weights = {name: loaded[ref.file, ref.offset] for name, ref in bound.items() if name in state}
    model.load_state_dict(weights, assign=True)


def _read(ref: WeightSource) -> torch.Tensor:
    values = np.ascontiguousarray(ref.read().astype(np.float32, copy=False))
    if not np.isfinite(values).all():
        raise NumericalError("cannot load checkpoint", ref.name, "it holds NaN or infinite values", "Use a sound copy")
    return torch.from_numpy(values)
