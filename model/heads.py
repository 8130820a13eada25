"""The decoder's layers over whole texts, and the heads that transformers puts on them: for every task but generation.

Exaone4Model, Exaone4ForSequenceClassification, Exaone4ForTokenClassification and Exaone4ForQuestionAnswering in
transformers are the reference implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ExaoneConfig
from model.embedding import Embedding
from model.numerics import PLAIN, Numerics
from model.tasks import (
    FEATURE_EXTRACTION,
    QUESTION_ANSWERING,
    TEXT_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    graphs_of,
)
from model.text import DecoderLayer, LayerStack, RMSNorm, cache_lengths
from model.vision import VisionEncoder


class TextEncoder(LayerStack):
    """Ids (or, with vision, embeddings) and a mask in, hidden states out; nothing is cached.

    Padding may stand on either side. transformers numbers positions from the first column on, padding or not; as
    rotation and window see distances alone, each row here starts at its own first token, which is the same.
    """

    def __init__(self, config: ExaoneConfig, numerics: Numerics = PLAIN) -> None:
        super().__init__()
        text, self.numerics = config.text, numerics
        self.kv_shape = (text.num_kv_heads, 0, text.head_dim)
        if config.vision is None:
            self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(text, text.window(i), text.uses_rope(i), numerics=numerics) for i in range(text.num_layers)
        )
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, fraction=numerics.fraction)
        self.add_rope_tables(text)

    def encode(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of rows that are shifted to begin in the first column.

        Args:
            inputs: input_ids int64 [batch, sequence], or inputs_embeds float [batch, sequence, hidden].
            attention_mask: int64 [batch, sequence]: in every row ones without a gap, zeros where there is padding.

        Returns:
            hidden states after the final norm [batch, sequence, hidden], of which only the first ones of each row
            have a meaning, as many as its mask has ones; int64 [batch], the column where each row's mask begins.
        """
        start = (attention_mask.cumsum(1) == 0).sum(1)
        columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        shifted = take_columns(inputs, columns + start.unsqueeze(1))
        x = self.embed_tokens(shifted) if inputs.dim() == 2 else shifted
        lengths, total = cache_lengths(attention_mask)
        nothing, x = x.new_zeros((x.shape[0], *self.kv_shape)), self.widen(x)
        for layer in self.layers:
            x, _ = layer(x, (nothing, nothing), lengths, total, (self.cos, self.sin))
        return self.norm(x), start

    def columns_of(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [batch, sequence, hidden] in the columns of the inputs."""
        hidden, start = self.encode(inputs, attention_mask)
        columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        return take_columns(hidden, columns - start.unsqueeze(1))


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, sequence, ...] at int64 index [batch, columns] of the second axis, clamped to the sequence."""
    batch, sequence = x.shape[0], x.shape[1]
    # Rows of the flattened batch, so that no index tensor of the size of x is made.
    first = torch.arange(batch, device=x.device).unsqueeze(1) * sequence
    return x.flatten(0, 1)[first + torch.clamp(index, 0, sequence - 1)]


class FeatureExtractor(TextEncoder):
    """The model without a head."""

    def forward(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        """last_hidden_state [batch, sequence, hidden]; arguments as of `encode`."""
        return self.columns_of(inputs, attention_mask)


class SequenceClassifier(TextEncoder):
    """One set of logits for each text, from its last token that is not padding."""

    def __init__(self, config: ExaoneConfig, numerics: Numerics = PLAIN) -> None:
        super().__init__(config, numerics)
        self.pad_token_id = config.pad_token_id
        self.score = nn.Linear(config.text.hidden_size, len(config.labels.names), bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """logits [batch, labels]; arguments as of `encode`."""
        hidden, start = self.encode(input_ids, attention_mask)
        last = self.last_column(input_ids) - start
        return self.score(take_columns(hidden, last.unsqueeze(1)).squeeze(1))

    def last_column(self, input_ids: Tensor) -> Tensor:
        """int64 [batch]: the rightmost column whose id is not the padding's, whatever the mask says.

        As in transformers, the first column where all ids are the padding's, and the last one where the model has no
        padding token.
        """
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        if self.pad_token_id is None:
            return torch.zeros_like(input_ids[:, 0]) + (input_ids.shape[1] - 1)
        return (columns * (input_ids != self.pad_token_id)).amax(1)


class TokenClassifier(TextEncoder):
    """A set of logits for each token."""

    def __init__(self, config: ExaoneConfig, numerics: Numerics = PLAIN) -> None:
        super().__init__(config, numerics)
        labels = config.labels
        self.score = nn.Linear(config.text.hidden_size, len(labels.names), bias=labels.token_bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """logits [batch, sequence, labels]; arguments as of `encode`."""
        return self.score(self.columns_of(input_ids, attention_mask))


class QuestionAnswerer(TextEncoder):
    """For each token, how well an answer begins and ends with it."""

    def __init__(self, config: ExaoneConfig, numerics: Numerics = PLAIN) -> None:
        super().__init__(config, numerics)
        self.qa_outputs = nn.Linear(config.text.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """start_logits and end_logits, each [batch, sequence]; arguments as of `encode`."""
        logits = self.qa_outputs(self.columns_of(input_ids, attention_mask))
        return logits[..., 0], logits[..., 1]


_ENCODERS: dict[str, type[TextEncoder]] = {
    FEATURE_EXTRACTION: FeatureExtractor,
    TEXT_CLASSIFICATION: SequenceClassifier,
    TOKEN_CLASSIFICATION: TokenClassifier,
    QUESTION_ANSWERING: QuestionAnswerer,
}


def text_encoder(config: ExaoneConfig, numerics: Numerics = PLAIN) -> TextEncoder:
    """The module that becomes the graph `decoder` of `config.task`, which is none of generation."""
    return _ENCODERS[config.task](config, numerics)


class EncoderModel(nn.Module):
    """The parts that become graphs for `config.task`, under the graphs' names; a part that is not needed is None."""

    def __init__(self, config: ExaoneConfig) -> None:
        super().__init__()
        graphs = graphs_of(config.task, vision=config.vision is not None)
        self.config = config
        self.vision_encoder = VisionEncoder(config.vision) if config.vision else None
        self.embedding = Embedding(config) if config.vision and "embedding" in graphs else None
        self.decoder = text_encoder(config) if "decoder" in graphs else None
