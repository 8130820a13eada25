"""The loss terms: answers, the draft head, and what the auxiliary heads should find in the image tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.exaone import Exaone
from model.text import DecoderLayer
from training.batches import BLANK, IGNORED, IMAGE, SLOTS, Batch, Batches
from training.forward import decode, decoder_layer, encode_images, norm

PROBE = 2  # decoder layers below the auxiliary head that tells the place in the line


class Auxiliary(nn.Module):
    """Heads used while training only: the characters in an image token, and the place of the first of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.characters = nn.Linear(width, SLOTS * (BLANK + 1))
        self.first = nn.Linear(width, 17)


def losses(model: Exaone, heads: Auxiliary, batch: Batch, draft: bool) -> tuple[dict[str, Tensor], float]:
    """Loss terms of a batch, and the share of lines whose every answer token is the most likely one."""
    assert model.embedding is not None and model.vision_encoder is not None
    x = model.embedding.embed_tokens(batch.input_ids)
    terms: dict[str, Tensor] = {}
    media = batch.input_ids == IMAGE
    if batch.patches is not None and batch.characters is not None:
        features = encode_images(model.vision_encoder, batch.patches, batch.rows, batch.columns)
        x = x.masked_scatter(media[..., None], features)
        terms["characters"] = character_loss(heads, features, batch.characters)
    hidden, probed = decode(model.decoder, x, PROBE)
    if batch.first is not None:
        known = batch.first.flatten() != IGNORED
        places = heads.first(probed[media][known]).float()
        terms["first"] = F.cross_entropy(places, batch.first.flatten()[known])
    asked = batch.labels != IGNORED
    logits = model.decoder.lm_head(hidden[asked]).float()
    terms["answer"] = F.cross_entropy(logits, batch.labels[asked])
    if draft:
        terms["draft"] = draft_loss(model, x.detach(), hidden.detach(), batch.labels)
    wrong = torch.zeros_like(batch.labels, dtype=torch.bool)
    wrong[asked] = logits.detach().argmax(-1) != batch.labels[asked]
    return terms, float((~wrong.any(1)).float().mean())


def character_loss(heads: Auxiliary, features: Tensor, characters: Tensor) -> Tensor:
    """Features [batch, tokens, hidden] against the characters in each token [batch, tokens, SLOTS]."""
    found = heads.characters(features).float().unflatten(-1, (SLOTS, -1))
    return F.cross_entropy(found.flatten(0, 2), characters.flatten())


def vision_loss(model: Exaone, heads: Auxiliary, batches: Batches) -> Tensor:
    """Loss of the characters in images full of them: many glyphs a second, no decoder."""
    assert model.vision_encoder is not None
    patches, characters, rows, columns = batches.dense()
    device = heads.first.weight.device
    features = encode_images(model.vision_encoder, patches.to(device), rows, columns)
    return character_loss(heads, features, characters.to(device))


def draft_loss(model: Exaone, x: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
    """The draft head's loss; nothing flows back into the model itself."""
    head = model.mtp
    assert head is not None
    joined = (norm(head.pre_fc_norm_embedding, x[:, 1:]), norm(head.pre_fc_norm_hidden, hidden[:, :-1]))
    z = head.fc(torch.cat(joined, dim=-1)).float()
    cos, sin = head.cos[: z.shape[1], None], head.sin[: z.shape[1], None]
    for layer in head.layers:
        assert isinstance(layer, DecoderLayer)
        z = decoder_layer(layer, z, cos, sin)
    # At t it has seen token t + 1 and predicts t + 2, the label of position t + 1; t + 1 must be part of the answer.
    asked = (labels[:, 1:] != IGNORED) & (labels[:, :-1] != IGNORED)
    logits = F.linear(norm(head.norm, z)[asked], model.decoder.lm_head.weight.detach())
    return F.cross_entropy(logits.float(), labels[:, 1:][asked])
