"""Which tensors of a checkpoint a task reads beyond the layers, and which it passes over (no torch)."""

from __future__ import annotations

from model.bundle import DECODER, MTP, VISION_ENCODER
from model.config import ExaoneConfig
from model.tasks import (
    FEATURE_EXTRACTION,
    GENERATION,
    IMAGE_FEATURE_EXTRACTION,
    QUESTION_ANSWERING,
    TEXT_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)

# All heads that stand behind the last norm, as graph and parameter names begin.
HEADS = tuple(f"{DECODER}.{head}." for head in ("lm_head", "score", "qa_outputs"))


def head_shapes(config: ExaoneConfig) -> dict[str, tuple[int, ...]]:
    """Parameter → shape of what stands behind the decoder's last norm; a tied head has no tensor of its own.

    The heads are those of transformers' Exaone4ForSequenceClassification, Exaone4ForTokenClassification and
    Exaone4ForQuestionAnswering.
    """
    text, labels = config.text, config.labels
    width, count = text.hidden_size, len(labels.names)
    if config.task in GENERATION:
        return {} if text.tie_word_embeddings else {"lm_head.weight": (text.vocab_size, width)}
    if config.task == TEXT_CLASSIFICATION:
        return {"score.weight": (count, width)}
    if config.task == TOKEN_CLASSIFICATION:
        return {"score.weight": (count, width)} | ({"score.bias": (count,)} if labels.token_bias else {})
    if config.task == QUESTION_ANSWERING:
        return {"qa_outputs.weight": (2, width), "qa_outputs.bias": (2,)}
    return {}


def is_passed_over(name: str, config: ExaoneConfig) -> bool:
    """Whether the task has no use for a tensor, by its canonical name, that the whole model may have."""
    if name.startswith(f"{MTP}."):
        return config.mtp is None or config.task not in GENERATION
    if config.task == IMAGE_FEATURE_EXTRACTION:
        return not name.startswith(f"{VISION_ENCODER}.")
    return config.task == FEATURE_EXTRACTION and name.startswith(HEADS)
