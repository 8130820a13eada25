"""A checkpoint as a set of named tensors: one spelling for all published ones, and a check against the configuration.

Canonical names are graph name, dot, parameter name: ``decoder.layers.0.mlp.up_proj.weight``,
``decoder.lm_head.weight``, ``vision_encoder.blocks.0.attn.qkv.bias``, ``embedding.embed_tokens.weight``,
``mtp.fc.weight``. A text-only model's embedding belongs to its decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from model.assemble import Assembled, assemble
from model.bundle import DECODER, EMBEDDING, MTP, VISION_ENCODER
from model.config import ExaoneConfig, TextConfig, VisionConfig
from model.errors import CheckpointError, printable
from model.packed_layer import PARTS
from model.shards import FLOATS, WHAT, Gate, TensorRef, open_shards
from model.source import WeightSource
from model.task_tensors import HEADS, head_shapes, is_passed_over
from model.tasks import GENERATION, graphs_of

Shapes = dict[str, tuple[int, ...]]
HEAD = f"{DECODER}.lm_head.weight"
PATCHES = f"{VISION_ENCODER}.patch_embed.proj.weight"

# Longest first; 4.5 as published and its re-saved spellings, then 4.0; question answering; a model without head.
_TEXT_PREFIXES = (
    "model.language_model.model.",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "model.",
    "transformer.",
    "",
)
_VISION_PREFIXES = ("model.visual.", "visual.")
_ROOTS = {"Exaone4ForQuestionAnswering": "transformer.", "Exaone4Model": "", "Exaone4_5_Model": ""}  # else "model."
_TEXT_REST = re.compile(r"((layers\.\d+|embed_tokens|lm_head|score|qa_outputs)\..+|norm\.weight)")


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
            graph = EMBEDDING if rest.startswith("embed_tokens.") and not text_only else DECODER
            return f"{graph}.{rest}"
    return None


def published(name: str, text_only: bool = False, architecture: str = "") -> str:
    """How checkpoints, of that architecture or the published ones, spell a canonical name; inverse of `canonical`."""
    graph, rest = name.split(".", 1)
    if graph == MTP or name.startswith(HEADS):
        return f"mtp.{rest}" if graph == MTP else rest
    root = _ROOTS.get(architecture, "model.")
    if graph == VISION_ENCODER:
        return f"{root}visual.{rest}"
    return f"{root}{rest}" if text_only else f"{root}language_model.{rest}"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: where it is.
        tensors: name in the files → place.
        files: every file opened, the index included.
        ignore_extra: whether tensors that are no part of the model are left out; else they are refused.
    """

    folder: Path
    tensors: Mapping[str, TensorRef]
    files: tuple[Path, ...]
    ignore_extra: bool = False

    @classmethod
    def open(cls, folder: Path, gate: Gate | None = None, *, ignore_extra: bool = False) -> Checkpoint:
        """Opens and validates the files; raises as `open_shards`. With a `gate`, weights are read through it."""
        tensors, files = open_shards(folder)
        if gate is not None:
            tensors = {name: replace(ref, gate=gate) for name, ref in tensors.items()}
        return cls(folder, tensors, files, ignore_extra)

    @property
    def has_draft_head(self) -> bool:
        """Whether there are weights of a multi-token-prediction head."""
        return any(f"{MTP}." in name and (canonical(name) or "").startswith(f"{MTP}.") for name in self.tensors)

    def assembled(self, config: ExaoneConfig) -> Assembled:
        """The weights under the names of plain ones: those of quantized layers are put together from their parts.

        Raises:
            CheckpointError: as `model.assemble.assemble`, or there are quantized layers the configuration ignores.
        """
        if config.quantization is None:
            _refuse_parts(self.tensors)
            return Assembled(dict(self.tensors))
        shapes = expected_tensors(config, draft=self.has_draft_head)
        return assemble(
            self.tensors,
            config.quantization,
            lambda name: shapes.get(canonical(name, text_only=config.vision is None) or ""),
        )

    def bind(self, config: ExaoneConfig, *, compare: bool = True) -> dict[str, WeightSource]:
        """Canonical name → weight, after `check_complete`; shared parameters appear under each of their names.

        Args:
            config: of the model.
            compare: whether a redundant tied head is read and compared with the embedding.

        Raises:
            CheckpointError: as `check_complete`.
        """
        check_complete(self, config, compare=compare)
        found, _ = _sort_out(self, config)
        shapes = expected_tensors(config, draft=self.has_draft_head)
        return with_shared({name: found[name] for name in shapes}, config, draft=self.has_draft_head)

    def left_out(self, config: ExaoneConfig) -> dict[str, tuple[str, ...]]:
        """Names of tensors that a complete checkpoint has beyond the model, by kind; empty where there are none.

        Kinds: "extra", which only `ignore_extra` accepts; "draft_head", one that config.json does not describe;
        "activation_scales", which only quantized activations and caches need.
        """
        found, extra = _sort_out(self, config)
        ignored = self.assembled(config).ignored
        draft = [ref.name for name, ref in found.items() if name.startswith(f"{MTP}.")] if config.mtp is None else []
        kinds = (("extra", extra), ("draft_head", draft), ("activation_scales", ignored))
        return {kind: tuple(sorted(names)) for kind, names in kinds if names}


def expected_tensors(config: ExaoneConfig, draft: bool) -> Shapes:
    """Canonical name → shape in the file, of every tensor the model's task needs; a tied head has none of its own.

    Args:
        config: the model.
        draft: whether to include the multi-token-prediction head.
    """
    text = config.text
    shapes: Shapes = {}
    if DECODER in graphs_of(config.task, vision=config.vision is not None):
        shapes[_embedding(config)] = (text.vocab_size, text.hidden_size)
        for i in range(text.num_layers):
            shapes |= _prefixed(f"{DECODER}.layers.{i}", _layer(text))
        shapes[f"{DECODER}.norm.weight"] = (text.hidden_size,)
        shapes |= _prefixed(DECODER, head_shapes(config))
    if config.vision is not None:
        shapes |= _prefixed(VISION_ENCODER, _vision(config.vision))
    if draft and config.mtp is not None and config.task in GENERATION:
        width = text.hidden_size
        shapes[f"{MTP}.fc.weight"] = (width, 2 * width)
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            shapes[f"{MTP}.{norm}.weight"] = (width,)
        for i in range(config.mtp.num_layers):
            shapes |= _prefixed(f"{MTP}.layers.{i}", _layer(text))
    return shapes


def with_shared(weights: Mapping[str, WeightSource], config: ExaoneConfig, *, draft: bool) -> dict[str, WeightSource]:
    """The weights of `expected_tensors`, and those that are other ones' under a second name: tied and draft heads."""
    every = dict(weights)
    if config.task in GENERATION:
        every.setdefault(HEAD, every[_embedding(config)])
        if draft and config.mtp is not None:
            every[f"{MTP}.lm_head.weight"] = every[HEAD]
    return every


def check_complete(checkpoint: Checkpoint, config: ExaoneConfig, *, compare: bool = True) -> None:
    """Compares a checkpoint's tensors with what the configuration needs.

    Weights are read only of a redundant tied head, which must be the embedding; and only to `compare` them.

    Raises:
        CheckpointError: a tensor is missing, unexpected, given twice, or of another shape or an unsupported type.
    """
    found, extra = _sort_out(checkpoint, config)
    if extra and not checkpoint.ignore_extra:
        raise _unexpected(extra)
    shapes = expected_tensors(config, draft=checkpoint.has_draft_head)
    missing = [name for name in shapes if name not in found]
    if missing:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        listed = ", ".join(published(name, config.vision is None, config.architecture) for name in missing[:5])
        raise CheckpointError(
            WHAT, checkpoint.folder.name, f"missing tensors: {listed}{rest}", "Download the checkpoint completely"
        )
    for name, shape in shapes.items():
        _check_tensor(found[name], shape, flat=name == PATCHES)
    if compare and config.task in GENERATION and HEAD in found and HEAD not in shapes:
        _check_tied_head(found[HEAD], found[_embedding(config)])


def _sort_out(checkpoint: Checkpoint, config: ExaoneConfig) -> tuple[dict[str, WeightSource], list[str]]:
    """Canonical name → weight, and the names in the files of what is no part of the model."""
    shapes = expected_tensors(config, draft=checkpoint.has_draft_head)
    found: dict[str, WeightSource] = {}
    extra = []
    for name, ref in checkpoint.assembled(config).sources.items():
        if name.endswith(".rotary_emb.inv_freq"):  # older transformers stored it; it is computed
            continue
        key = canonical(name, text_only=config.vision is None)
        tied_head = key == HEAD and config.task in GENERATION
        if key is None or not (key in shapes or is_passed_over(key, config) or tied_head):
            extra.append(name)
        elif key in found:
            same = f"it is the same parameter as {printable(found[key].name)}"
            raise CheckpointError(WHAT, name, same, "Keep one of the two")
        else:
            found[key] = ref
    return found, extra


def _refuse_parts(tensors: Mapping[str, TensorRef]) -> None:
    part = next((name for name in tensors if name.rpartition(".")[2] in PARTS), None)
    if part is not None:
        raise CheckpointError(
            WHAT, part, "it belongs to a quantized weight, but config.json has no quantization_config",
            "Add the one that the weights were saved with",
        )  # fmt: skip


def _unexpected(names: list[str]) -> CheckpointError:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    listed = ", ".join(printable(name, 80) or "''" for name in names[:5])
    return CheckpointError(
        WHAT, listed + rest, f"unexpected tensor{'s' * (len(names) > 1)}, no part of the model that config.json means",
        "Check that config.json belongs to these weights, or leave them out with --ignore-extra",
    )  # fmt: skip


def _check_tensor(ref: WeightSource, shape: tuple[int, ...], flat: bool) -> None:
    if ref.dtype not in FLOATS:
        why = f"values of type {ref.dtype} are not supported (only {', '.join(FLOATS)} are)"
        raise CheckpointError(WHAT, ref.name, why, "Use the unquantized checkpoint")
    if ref.shape == shape or (flat and ref.shape == (shape[0], int(np.prod(shape[1:])))):
        return
    raise CheckpointError(
        WHAT, ref.name, f"shape {list(ref.shape)}, but config.json means {list(shape)}",
        "Check that config.json belongs to these weights",
    )  # fmt: skip


def _check_tied_head(head: WeightSource, embedding: WeightSource) -> None:
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
