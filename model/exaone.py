"""A whole model, eager: for parity checks, calibration and training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model.config import ExaoneConfig, load_config
from model.embedding import Embedding
from model.errors import CheckpointError
from model.mtp import DraftHead
from model.shards import TensorRef
from model.text import Cache, Decoder
from model.vision import VisionEncoder
from model.weights import Checkpoint


class Exaone(nn.Module):
    """The parts that become graphs, under the graphs' names; a part the model lacks is None."""

    def __init__(self, config: ExaoneConfig, draft: bool = False) -> None:
        super().__init__()
        self.config = config
        self.vision_encoder = VisionEncoder(config.vision) if config.vision else None
        self.embedding = Embedding(config) if config.vision else None
        self.decoder = Decoder(config.text, embeds=config.vision is None)
        self.mtp = DraftHead(config.text, config.mtp) if draft and config.mtp else None
        if self.embedding is not None and config.text.tie_word_embeddings:
            self.decoder.lm_head.weight = self.embedding.embed_tokens.weight
        if self.mtp is not None:
            self.mtp.lm_head.weight = self.decoder.lm_head.weight

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None, grid_thw: Tensor | None = None) -> Tensor:
        """What the decoder takes: ids for a text-only model, else embeddings with images merged in."""
        if self.embedding is None or self.vision_encoder is None:
            return input_ids
        if pixel_values is None or grid_thw is None:
            features = self.decoder.norm.weight.new_zeros((0, self.config.text.hidden_size))
        else:
            features = self.vision_encoder(pixel_values, grid_thw)
        return self.embedding(input_ids, features)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, grid_thw: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Cache]]:
        """Logits of every position [batch, sequence, vocab], hidden states and cache, for prompts without padding."""
        mask = torch.ones_like(input_ids)
        keep = torch.zeros(1, dtype=torch.int64, device=input_ids.device)
        past = self.decoder.empty_cache(input_ids.shape[0])
        return self.decoder(self.embed(input_ids, pixel_values, grid_thw), mask, past, keep)


def load_exaone(folder: Path, dtype: torch.dtype = torch.float32, draft: bool | None = None) -> Exaone:
    """The model of a checkpoint folder, with its weights, for inference.

    Args:
        folder: config.json and safetensors files.
        dtype: to convert the weights to.
        draft: whether to load the draft head; None loads it where there is one.

    Raises:
        UsageError, CheckpointError, BundleError: as `load_config` and `Checkpoint.bind`; a draft head is asked for
            and missing (CheckpointError).
    """
    config, checkpoint = load_config(folder), Checkpoint.open(folder)
    refs = checkpoint.bind(config)
    model = Exaone(config, checkpoint.has_draft_head if draft is None else draft).to(dtype).eval()
    missing = [name for name, _ in model.named_parameters() if name not in refs]
    if missing:
        raise CheckpointError("cannot load checkpoint", folder.name, f"it has no {missing[0]}", "Load it without draft")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_tensor(refs[name]).view(parameter.shape))
    return model.requires_grad_(False)


def _tensor(ref: TensorRef) -> Tensor:
    array = ref.read()
    if ref.dtype == "BF16":  # which numpy has only as an extension type that torch does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
