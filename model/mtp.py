"""The multi-token-prediction draft head of EXAONE 4.5.

Wiring as in vLLM's ``exaone4_5_mtp`` and SGLang: the embedding of the next token and the target's hidden
state (after its final norm), each normalised, are joined (embedding first), projected, and passed through one
decoder layer with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.config import SLIDING, MtpConfig, TextConfig
from model.numerics import PLAIN, Numerics
from model.text import Cache, DecoderLayer, LayerStack, RMSNorm


class DraftHead(LayerStack):
    """Predicts the token after next; arguments as of `Decoder`."""

    def __init__(
        self, text: TextConfig, mtp: MtpConfig, window_cache: bool = False, numerics: Numerics = PLAIN
    ) -> None:
        super().__init__()
        self.numerics = numerics
        width, epsilon = text.hidden_size, text.rms_norm_eps
        sliding = mtp.layer_type == SLIDING
        window = text.sliding_window if sliding else None
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(width, epsilon)
        self.pre_fc_norm_hidden = RMSNorm(width, epsilon)
        rotary = sliding or text.sliding_window is None
        window_cache = window_cache and text.cached_window is not None
        self.layers = nn.ModuleList(
            DecoderLayer(text, window, rotary, window_cache, numerics) for _ in range(mtp.num_layers)
        )
        self.norm = RMSNorm(width, epsilon, fraction=numerics.fraction)
        self.lm_head = nn.Linear(width, text.vocab_size, bias=False)
        self.add_rope_tables(text)

    def forward(
        self,
        inputs_embeds: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor,
        past: Sequence[Cache],
        logits_to_keep: Tensor,
    ) -> tuple[Tensor, Tensor, list[Cache]]:
        """One pass.

        Args:
            inputs_embeds: [batch, sequence, hidden], embeddings of tokens t+1 (image features where they are images).
            hidden_states: [batch, sequence, hidden], the target's at t, or this head's own for further drafts.
            attention_mask: int64 [batch, past + sequence].
            past: this head's own cache, one pair per layer.
            logits_to_keep: int64 [1], as for the decoder.

        Returns:
            logits of tokens t+2 [batch, kept, vocab], hidden states [batch, sequence, hidden], the new cache.
        """
        joined = (self.pre_fc_norm_embedding(inputs_embeds), self.pre_fc_norm_hidden(hidden_states))
        x = self.fc(torch.cat(joined, dim=-1))
        return self.run(x, attention_mask, past, logits_to_keep)
