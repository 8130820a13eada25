"""Token embedding with the image features merged in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ExaoneConfig


class Embedding(nn.Module):
    """Looks tokens up, and puts feature rows, in order, where the placeholder tokens stand."""

    def __init__(self, config: ExaoneConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.text.vocab_size, config.text.hidden_size)
        ids = (config.image_token_id, config.video_token_id)
        self.media_token_ids = tuple(token for token in ids if token is not None)

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Embeds a prompt.

        Args:
            input_ids: int64 [batch, sequence].
            image_features: float [image tokens, hidden]; no rows where there are no images.

        Returns:
            inputs_embeds [batch, sequence, hidden].
        """
        text = self.embed_tokens(input_ids)
        media = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in self.media_token_ids:
            media = media | (input_ids == token)
        # The n-th placeholder takes the n-th row; text takes the row of zeros put behind them. A placeholder that
        # the model itself wrote has no row and stays text, as in transformers.
        order = media.flatten().long().cumsum(0).view_as(input_ids) - 1
        media = media & (order < image_features.shape[0])
        rows = torch.cat((image_features, image_features.new_zeros((1, image_features.shape[1]))))
        index = torch.where(media, order, image_features.shape[0])
        return torch.where(media[..., None], rows[index], text)
