"""A checkpoint as a set of named tensors: one spelling for all published ones, and a check against the configuration.

Canonical names are graph name, dot, parameter name: ``decoder.layers.0.mlp.up_proj.weight``,
``decoder.lm_head.weight``, ``vision_encoder.blocks.0.attn.qkv.bias``, ``embedding.embed_tokens.weight``,
``mtp.fc.weight``. A text-only model's embedding belongs to its decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.bundle import DECODER, EMBEDDING, MTP, VISION_ENCODER
from model.config import ExaoneConfig, TextConfig, VisionConfig
from model.errors import CheckpointError
from model.shards import DTYPES, WHAT, TensorRef, open_shards

Shapes = dict[str, tuple[int, ...]]
HEAD = f"{DECODER}.lm_head.weight"
PATCHES = f"{VISION_ENCODER}.patch_embed.proj.weight"

# Longest first; 4.5 as published and its re-saved spellings, then 4.0.
_TEXT_PREFIXES = (
    "model.language_model.model.",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "model.",
    "",
)
_VISION_PREFIXES = ("model.visual.", "visual.")
_TEXT_REST = re.compile(r"(layers\.\d+\..+|norm\.weight|lm_head\.weight|embed_tokens\.weight)")


def canonical(name: str, text_only: bool = False) -> str | None:
    """The canonical name of a checkpoint's tensor, or None if no published spelling reads so.

    Args:
        name: as in the safetensors file.
        text_only: whether the model is EXAONE 4.0, whose decoder holds the embedding.
    """
    for prefix in _VISION_PREFIXES:
        if name.startswith(prefix):
            return f"{VISION_ENCODER}.{name.removeprefix(prefix)}"
    bare = name.removeprefix("model.")
    if bare.startswith("mtp."):
        return f"{MTP}.{bare.removeprefix('mtp.')}"
    for prefix in _TEXT_PREFIXES:
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and _TEXT_REST.fullmatch(rest):
            graph = EMBEDDING if rest == "embed_tokens.weight" and not text_only else DECODER
            return f"{graph}.{rest}"
    return None


def published(name: str, text_only: bool = False) -> str:
    """How the published checkpoints spell a canonical name; the inverse of `canonical`."""
    graph, rest = name.split(".", 1)
    if graph == MTP or rest == "lm_head.weight":
        return f"mtp.{rest}" if graph == MTP else rest
    if graph == VISION_ENCODER:
        return f"model.visual.{rest}"
    return f"model.{rest}" if text_only else f"model.language_model.{rest}"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: where it is.
        tensors: name in the files → place.
        files: every file opened, the index included.
    """

    folder: Path
    tensors: Mapping[str, TensorRef]
    files: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Opens and validates the files; raises as `open_shards`."""
        tensors, files = open_shards(folder)
        return cls(folder, tensors, files)

    @property
    def has_draft_head(self) -> bool:
        """Whether there are weights of a multi-token-prediction head."""
        return any((canonical(name) or "").startswith(f"{MTP}.") for name in self.tensors)

    def bind(self, config: ExaoneConfig) -> dict[str, TensorRef]:
        """Canonical name → place, after `check_complete`; shared parameters appear under each of their names.

        Raises:
            CheckpointError: as `check_complete`.
        """
        check_complete(self, config)
        found = _by_canonical_name(self, config)
        shapes = expected_tensors(config, draft=self.has_draft_head)
        bound = {name: found[name] for name in shapes}
        bound.setdefault(HEAD, found[_embedding(config)])
        if self.has_draft_head and config.mtp is not None:
            bound[f"{MTP}.lm_head.weight"] = bound[HEAD]
        return bound


def expected_tensors(config: ExaoneConfig, draft: bool) -> Shapes:
    """Canonical name → shape in the file, of every tensor the model needs; a tied head has none of its own.

    Args:
        config: the model.
        draft: whether to include the multi-token-prediction head.
    """
    text = config.text
    shapes: Shapes = {_embedding(config): (text.vocab_size, text.hidden_size)}
    for i in range(text.num_layers):
        shapes |= _prefixed(f"{DECODER}.layers.{i}", _layer(text))
    shapes[f"{DECODER}.norm.weight"] = (text.hidden_size,)
    if not text.tie_word_embeddings:
        shapes[HEAD] = (text.vocab_size, text.hidden_size)
    if config.vision is not None:
        shapes |= _prefixed(VISION_ENCODER, _vision(config.vision))
    if draft and config.mtp is not None:
        width = text.hidden_size
        shapes[f"{MTP}.fc.weight"] = (width, 2 * width)
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            shapes[f"{MTP}.{norm}.weight"] = (width,)
        for i in range(config.mtp.num_layers):
            shapes |= _prefixed(f"{MTP}.layers.{i}", _layer(text))
    return shapes


def check_complete(checkpoint: Checkpoint, config: ExaoneConfig) -> None:
    """Compares a checkpoint's tensors with what the configuration needs; reads weights only of a redundant tied head.

    Raises:
        CheckpointError: a tensor is missing, unexpected, given twice, or of another shape or an unsupported type.
    """
    found = _by_canonical_name(checkpoint, config)
    shapes = expected_tensors(config, draft=checkpoint.has_draft_head)
    missing = [name for name in shapes if name not in found]
    if missing:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        listed = ", ".join(published(name, text_only=config.vision is None) for name in missing[:5])
        raise CheckpointError(
            WHAT, checkpoint.folder.name, f"missing tensors: {listed}{rest}", "Download the checkpoint completely"
        )
    for name, shape in shapes.items():
        _check_tensor(found[name], shape, flat=name == PATCHES)
    for name, ref in found.items():
        if name in shapes or (name.startswith(f"{MTP}.") and config.mtp is None):
            continue
        if name != HEAD:
            raise _unexpected(ref.name)
        _check_tied_head(ref, found[_embedding(config)])


def _by_canonical_name(checkpoint: Checkpoint, config: ExaoneConfig) -> dict[str, TensorRef]:
    found: dict[str, TensorRef] = {}
    for name, ref in checkpoint.tensors.items():
        if name.endswith(".rotary_emb.inv_freq"):  # older transformers stored it; it is computed
            continue
        key = canonical(name, text_only=config.vision is None)
        if key is None:
            raise _unexpected(name)
        if key in found:
            raise CheckpointError(WHAT, name, f"it is the same parameter as {found[key].name}", "Keep one of the two")
        found[key] = ref
    return found


def _unexpected(name: str) -> CheckpointError:
    shown = name[:120].encode("unicode_escape").decode("ascii")
    return CheckpointError(
        WHAT, shown, "unexpected tensor, no part of the model that config.json describes",
        "Check that config.json belongs to these weights",
    )  # fmt: skip


def _check_tensor(ref: TensorRef, shape: tuple[int, ...], flat: bool) -> None:
    if ref.dtype not in DTYPES:
        why = f"values of type {ref.dtype} are not supported (only {', '.join(DTYPES)} are)"
        raise CheckpointError(WHAT, ref.name, why, "Use the unquantized checkpoint")
    if ref.shape == shape or (flat and ref.shape == (shape[0], int(np.prod(shape[1:])))):
        return
    raise CheckpointError(
        WHAT, ref.name, f"shape {list(ref.shape)}, but config.json means {list(shape)}",
        "Check that config.json belongs to these weights",
    )  # fmt: skip


def _check_tied_head(head: TensorRef, embedding: TensorRef) -> None:
    _check_tensor(head, embedding.shape, flat=False)
    step = max(1, (16 << 20) // max(1, embedding.nbytes // embedding.shape[0]))
    for start in range(0, embedding.shape[0], step):
        stop = min(start + step, embedding.shape[0])
        if not np.array_equal(head.rows(start, stop), embedding.rows(start, stop)):
            raise CheckpointError(
                WHAT, head.name, "config.json ties it to the embedding, but their values differ",
                "Set tie_word_embeddings to what the model was trained with",
            )  # fmt: skip


def _embedding(config: ExaoneConfig) -> str:
    return f"{DECODER if config.vision is None else EMBEDDING}.embed_tokens.weight"


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _layer(text: TextConfig) -> Shapes:
    width, inner = text.hidden_size, text.intermediate_size
    query, key = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return {
        "self_attn.q_proj.weight": (query, width),
        "self_attn.k_proj.weight": (key, width),
        "self_attn.v_proj.weight": (key, width),
        "self_attn.o_proj.weight": (width, query),
        "self_attn.q_norm.weight": (text.head_dim,),
        "self_attn.k_norm.weight": (text.head_dim,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "post_attention_layernorm.weight": (width,),
        "post_feedforward_layernorm.weight": (width,),
    }


def _vision(vision: VisionConfig) -> Shapes:
    width, inner, out = vision.hidden_size, vision.intermediate_size, vision.out_hidden_size
    packed = width + 2 * vision.num_kv_heads * vision.head_dim
    merged = width * vision.spatial_merge_size**2
    linears = {
        "attn.qkv": (packed, width),
        "attn.proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    block: Shapes = {"norm1.weight": (width,), "norm2.weight": (width,)}
    for name, shape in linears.items():
        block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: Shapes = {"patch_embed.proj.weight": (width, *patch)}
    for i in range(vision.depth):
        shapes |= _prefixed(f"blocks.{i}", block)
    return shapes | {
        "merger.ln_q.weight": (width,),
        "merger.mlp.0.weight": (merged, merged),
        "merger.mlp.0.bias": (merged,),
        "merger.mlp.2.weight": (out, merged),
        "merger.mlp.2.bias": (out,),
    }
