"""A whole model, eager: for parity checks, calibration and training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ExaoneConfig
from model.embedding import Embedding
from model.mtp import DraftHead
from model.text import Cache, Decoder
from model.vision import VisionEncoder


class Exaone(nn.Module):
    """The parts that become graphs, under the graphs' names; a part the model lacks is None."""

    def __init__(self, config: ExaoneConfig, draft: bool = False) -> None:
        super().__init__()
        self.config = config
        self.vision_encoder = VisionEncoder(config.vision) if config.vision else None
        self.embedding = Embedding(config) if config.vision else None
        self.decoder = Decoder(config.text, embeds=config.vision is None)
        self.mtp = DraftHead(config.text, config.mtp) if draft and config.mtp else None
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the heads share the table they are meant to share (again, after weights were assigned)."""
        if self.config.text.tie_word_embeddings:
            table = self.decoder if self.embedding is None else self.embedding
            self.decoder.lm_head.weight = table.embed_tokens.weight
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
