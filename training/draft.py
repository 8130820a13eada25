"""The draft head several tokens ahead, as it is used: from the second on it goes by its own states, not the decoder's.

A pass over a text gives, for every position, what a chain of drafts that ends there says, with right tokens between
(a chain goes on only where they were right). Step 1 is `training.losses.draft_logits`. In step s a position sees keys
of step 1 up to where its chain began, and one of each later step after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.exaone import Exaone
from model.ops import rotate
from model.text import Attention, DecoderLayer
from training.batches import Batch
from training.forward import decode, norm
from training.losses import embedded
from training.pixels import IGNORED

BEFORE = 40  # tokens of the prompt that are kept, more than the head's window
LATER = 0.8  # weight of a step's loss over that of the step before


@dataclass(frozen=True)
class Piece:
    """The end of a text: what the draft head sees of it.

    Attributes:
        task: a key of `TASKS`.
        x, hidden: bfloat16 [tokens, hidden], embeddings and the decoder's states after its final norm.
        labels: int64 [tokens], as in `Batch`.
    """

    task: str
    x: Tensor
    hidden: Tensor
    labels: Tensor


def pieces(model: Exaone, batch: Batch) -> list[Piece]:
    """What the draft head sees of each sample."""
    with torch.no_grad():
        x, _ = embedded(model, batch)
        hidden, _ = decode(model.decoder, x, 0)
    found = []
    for row, labels in enumerate(batch.labels):
        asked = (labels != IGNORED).nonzero()[:, 0]
        part = slice(max(0, int(asked[0]) - BEFORE), int(asked[-1]) + 1)
        found.append(Piece(batch.task, x[row, part].bfloat16(), hidden[row, part].bfloat16(), labels[part].clone()))
    return found


def padded(some: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces as float32 [batch, tokens, hidden] twice and labels [batch, tokens]."""
    length = max(len(piece.labels) for piece in some)
    x, hidden = (
        torch.stack([F.pad(part.float(), (0, 0, 0, length - len(part))) for part in parts])
        for parts in ([piece.x for piece in some], [piece.hidden for piece in some])
    )
    labels = [F.pad(piece.labels, (0, length - len(piece.labels)), value=IGNORED) for piece in some]
    return x, hidden, torch.stack(labels)


def chained_logits(model: Exaone, x: Tensor, hidden: Tensor, steps: int) -> list[Tensor]:
    """For each step, logits [batch, sequence - 1, vocab] of the token after next.

    Args:
        model: with a draft head of one layer.
        x, hidden: [batch, sequence, hidden], as for `training.losses.draft_logits`.
        steps: drafts in a chain.
    """
    head = model.mtp
    assert head is not None and len(head.layers) == 1
    layer = head.layers[0]
    assert isinstance(layer, DecoderLayer)
    tokens = norm(head.pre_fc_norm_embedding, x[:, 1:])
    rope = head.cos[: tokens.shape[1], None], head.sin[: tokens.shape[1], None]
    before, found = hidden[:, :-1], []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for _ in range(steps):
        z = head.fc(torch.cat((tokens, norm(head.pre_fc_norm_hidden, before)), dim=-1)).float()
        query, key, value = _heads(layer.self_attn, z, rope)
        keys.append(key)
        values.append(value)
        out = layer.self_attn.o_proj(_attend(query, keys, values, layer.self_attn.window))
        z = z + norm(layer.post_attention_layernorm, out)
        z = norm(head.norm, z + norm(layer.post_feedforward_layernorm, layer.mlp(z)))
        found.append(F.linear(z, model.decoder.lm_head.weight.detach()))
        before = _later(z, 1)
    return found


def _heads(attention: Attention, z: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, sequence, width], keys and values repeated for every query head."""
    query = norm(attention.q_norm, attention.q_proj(z).unflatten(-1, (attention.num_heads, -1)))
    key = norm(attention.k_norm, attention.k_proj(z).unflatten(-1, (attention.num_kv_heads, -1)))
    value = attention.v_proj(z).unflatten(-1, (attention.num_kv_heads, -1))
    if attention.rotary:
        query, key = rotate(query, *rope), rotate(key, *rope)
    groups = attention.num_heads // attention.num_kv_heads
    key, value = (part.repeat_interleave(groups, dim=2) for part in (key, value))
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _attend(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], window: int | None) -> Tensor:
    """Attention of the last step; results [batch, sequence, heads * width]."""
    length, later = query.shape[2], len(keys) - 1
    at = torch.arange(length, device=query.device)
    seen = at[None, :] <= at[:, None] - later
    if window is not None:
        seen &= at[None, :] > at[:, None] - window
    query = query * query.shape[-1] ** -0.5
    scores = [(query @ keys[0].transpose(2, 3)).masked_fill(~seen, -1e4)]
    # Of each later step one key: that of the chain's own draft.
    moved = [(_later(keys[i], later - i), _later(values[i], later - i)) for i in range(1, later + 1)]
    scores += [(query * key).sum(-1, keepdim=True) for key, _ in moved]
    weights = torch.cat(scores, -1).softmax(-1)
    out = weights[..., :length] @ values[0]
    for i, (_, value) in enumerate(moved):
        out = out + weights[..., length + i, None] * value
    return out.transpose(1, 2).flatten(2)


def _later(x: Tensor, places: int) -> Tensor:
    """What stands at a position [..., sequence, width], so many positions later."""
    return F.pad(x, (0, 0, places, 0))[..., : x.shape[-2], :]


def chained(labels: Tensor, step: int) -> Tensor:
    """Bool [batch, sequence - 1]: where a draft of this step (from 1) is of the answer, and its whole chain too."""
    started = F.pad(labels[:, :-1] != IGNORED, (step - 1, 0))[:, : labels.shape[1] - 1]
    return started & (labels[:, 1:] != IGNORED)


def chain_loss(model: Exaone, some: Sequence[Piece], steps: int) -> Tensor:
    """The mean loss of every step, the later ones weighing less."""
    x, hidden, labels = padded(some)
    total = torch.zeros(())
    for step, logits in enumerate(chained_logits(model, x, hidden, steps), start=1):
        asked = chained(labels, step)
        if asked.any():
            total = total + LATER ** (step - 1) * F.cross_entropy(logits[asked].float(), labels[:, 1:][asked])
    return total


def rates(model: Exaone, some: Sequence[Piece], steps: int) -> list[float]:
    """How often each step is right, where those before it were."""
    counts = torch.zeros(steps, 2)
    with torch.no_grad():
        for start in range(0, len(some), 64):
            x, hidden, labels = padded(some[start : start + 64])
            right = torch.ones_like(labels[:, 1:], dtype=torch.bool)
            for step, logits in enumerate(chained_logits(model, x, hidden, steps), start=1):
                asked = chained(labels, step) & right
                hit = asked & (logits.argmax(-1) == labels[:, 1:])
                counts[step - 1] += torch.tensor([hit.sum(), asked.sum()])
                right = F.pad(hit, (1, 0))[:, : hit.shape[1]]
    return [float(hits / max(1, asked)) for hits, asked in counts]
