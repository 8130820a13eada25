"""The loss terms: answers, the draft head, and what the auxiliary heads should find in the image tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.exaone import Exaone
from model.text import DecoderLayer
from training.batches import IMAGE, Batch, Images
from training.forward import decode, decoder_layer, encode_images, norm
from training.pixels import BLANK, IGNORED, PLACES, ROWS, SLOTS

PROBE = 2  # decoder layers below the auxiliary heads that tell the place in the line and the line


class Auxiliary(nn.Module):
    """Heads used while training only: characters of an image token, and place and line of the first of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.characters = nn.Linear(width, SLOTS * (BLANK + 1))
        self.first = nn.Linear(width, PLACES)
        self.line = nn.Linear(width, ROWS)


def embedded(model: Exaone, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """What goes into the decoder [batch, sequence, hidden], and the image tokens in it [batch, tokens, hidden]."""
    assert model.embedding is not None and model.vision_encoder is not None
    x = model.embedding.embed_tokens(batch.input_ids)
    if not batch.images:
        return x, None
    parts = [encode_images(model.vision_encoder, one.patches, one.rows, one.columns) for one in batch.images]
    features = torch.cat(parts, 1)
    return x.masked_scatter((batch.input_ids == IMAGE)[..., None], features), features


def losses(model: Exaone, heads: Auxiliary, batch: Batch, draft: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Loss terms of a batch, and for every sample whether all its answer's tokens are the most likely ones.

    Then greedy decoding gives that very answer.
    """
    terms: dict[str, Tensor] = {}
    x, features = embedded(model, batch)
    if features is not None:
        terms["characters"] = character_loss(heads, features, joined(batch.images, "characters"))
    hidden, probed = decode(model.decoder, x, PROBE)
    if batch.images:
        for name, head in (("first", heads.first), ("line", heads.line)):
            target = joined(batch.images, name).flatten()
            known = target != IGNORED
            terms[name] = F.cross_entropy(head(probed[batch.input_ids == IMAGE][known]).float(), target[known])
    asked = batch.labels != IGNORED
    logits = model.decoder.lm_head(hidden[asked]).float()
    terms["answer"] = F.cross_entropy(logits, batch.labels[asked])
    if draft:
        terms["draft"] = draft_loss(model, x.detach(), hidden.detach(), batch.labels)
    wrong = torch.zeros_like(batch.labels, dtype=torch.bool)
    wrong[asked] = logits.detach().argmax(-1) != batch.labels[asked]
    return terms, ~wrong.any(1)


def joined(images: tuple[Images, ...], name: str) -> Tensor:
    """A target of all images of each sample, one after the other: [batch, tokens, ...]."""
    return torch.cat([getattr(one, name) for one in images], 1)


def character_loss(heads: Auxiliary, features: Tensor, characters: Tensor) -> Tensor:
    """Features [batch, tokens, hidden] against the characters in each token [batch, tokens, SLOTS]."""
    found = heads.characters(features).float().unflatten(-1, (SLOTS, -1))
    return F.cross_entropy(found.flatten(0, 2), characters.flatten())


def vision_loss(model: Exaone, heads: Auxiliary, images: Images) -> Tensor:
    """Loss of the characters in images full of them: many glyphs a second, no decoder."""
    assert model.vision_encoder is not None
    features = encode_images(model.vision_encoder, images.patches, images.rows, images.columns)
    return character_loss(heads, features, images.characters)


def draft_logits(model: Exaone, x: Tensor, hidden: Tensor) -> Tensor:
    """The draft head's logits [batch, sequence - 1, vocab]: at t it has seen token t + 1 and predicts t + 2.

    Args:
        model: with a draft head.
        x: embeddings with images merged in [batch, sequence, hidden].
        hidden: the decoder's states after its final norm, of the same shape.
    """
    head = model.mtp
    assert head is not None
    joined = (norm(head.pre_fc_norm_embedding, x[:, 1:]), norm(head.pre_fc_norm_hidden, hidden[:, :-1]))
    z = head.fc(torch.cat(joined, dim=-1)).float()
    cos, sin = head.cos[: z.shape[1], None], head.sin[: z.shape[1], None]
    for layer in head.layers:
        assert isinstance(layer, DecoderLayer)
        z = decoder_layer(layer, z, cos, sin)
    return F.linear(norm(head.norm, z), model.decoder.lm_head.weight.detach())


def drafted(labels: Tensor) -> Tensor:
    """Bool [batch, sequence - 1]: where the draft head is asked, that is where t + 1 and t + 2 are of the answer."""
    return (labels[:, 1:] != IGNORED) & (labels[:, :-1] != IGNORED)


def draft_loss(model: Exaone, x: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
    """The draft head's loss; nothing flows back into the model itself."""
    asked = drafted(labels)
    return F.cross_entropy(draft_logits(model, x, hidden)[asked].float(), labels[:, 1:][asked])
