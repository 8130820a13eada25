"""EXAONE 4.0 and 4.5 configurations as frozen dataclasses (no torch).

Every published spelling of ``config.json`` is accepted: layer types as a list or as the pattern
``"LLLG"``, one extra layer type for the draft head, rotary parameters under ``rope_parameters`` or
``rope_scaling`` with the base inside or beside. What is not implemented is refused by its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.errors import UsageError
from model.jsonfile import read_json_object
from model.labels import TWO_LABELS, LabelConfig, parse_labels
from model.quantization import Quantization, find_old_quantization, find_quantization
from model.reader import Reader
from model.tasks import CLASSIFICATION, architecture_of, possible_tasks

SLIDING = "sliding_attention"
FULL = "full_attention"
TEXT_MODEL_TYPES = ("exaone4", "exaone4_5_text", "exaone4_vl_text")
SUPPORTED = "Supported are EXAONE 4.0 (exaone4) and EXAONE 4.5 (exaone4_5)"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `rope_type` is "default" or "llama3"."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `layer_types` has one entry per layer, `sliding_window` counts the current token."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    rope: RopeConfig

    def is_sliding(self, layer: int) -> bool:
        """Whether layer number `layer` attends inside the window only."""
        return self.layer_types[layer] == SLIDING

    def uses_rope(self, layer: int) -> bool:
        """Whether the layer rotates queries and keys; global layers of a hybrid model do not (NoPE)."""
        return self.sliding_window is None or self.is_sliding(layer)

    def window(self, layer: int) -> int | None:
        """Keys visible to a query of this layer, itself included, or None for all."""
        return self.sliding_window if self.is_sliding(layer) else None

    @property
    def cached_window(self) -> int | None:
        """Tokens that the caches of window layers need to hold; None where that is every token there can be."""
        window = self.sliding_window
        return window if window is not None and window < self.max_position_embeddings else None


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: window attention, with full attention in `fullatt_block_indexes`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int
    in_channels: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_side(self) -> int:
        """Patches along one side of an attention window."""
        return self.window_size // self.spatial_merge_size // self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class MtpConfig:
    """The multi-token-prediction draft head: extra decoder layers over the target's hidden states."""

    num_layers: int
    layer_type: str


@dataclass(frozen=True)
class ExaoneConfig:
    """One model. `vision` and `mtp` are None for text-only models.

    `mtp` says what shape a draft head has; whether there is one is told by the checkpoint's tensors. `architecture` and
    `task` are of `model.tasks`; a task that is not given is the one that the architecture is made for. `quantization`
    is what the configuration says of quantized weights; which are, is told by the tensors.
    """

    model_type: str
    text: TextConfig
    vision: VisionConfig | None
    mtp: MtpConfig | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    architecture: str = ""
    task: str = ""
    labels: LabelConfig = TWO_LABELS
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        vision = self.vision is not None
        architecture = self.architecture or architecture_of(None, vision=vision)
        object.__setattr__(self, "architecture", architecture)
        object.__setattr__(self, "task", self.task or possible_tasks(architecture, vision=vision)[0])


def load_config(folder: Path) -> ExaoneConfig:
    """Reads ``folder/config.json``.

    Raises:
        CheckpointError: missing, damaged, inconsistent or not implemented.
        UsageError: another model family, or quantized in a way that cannot be imported.
    """
    config = parse_config(read_json_object(folder / "config.json"))
    quantization = config.quantization or find_old_quantization(folder)
    return config if quantization is None else replace(config, quantization=quantization)


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ExaoneConfig:
    """Parses a configuration; `where` is what messages call it. Raises as `load_config`."""
    top = Reader(raw, "", where)
    model_type = _model_type(raw, where)
    if "auto_map" in raw:
        raise top.fail("auto_map", "the checkpoint wants its own Python code to run", "Use the original checkpoint")
    if model_type == "exaone4":
        text_reader, vision, mtp_source = top, None, top
    else:
        text_reader = top.child("text_config")
        text_type = text_reader.raw.get("model_type", "exaone4")
        if text_type not in TEXT_MODEL_TYPES:
            raise text_reader.fail("model_type", f"{str(text_type)[:60]!r} is not an EXAONE 4 text model")
        mtp_source = top if top.has("num_nextn_predict_layers") else text_reader
        vision = _vision(top.child("vision_config"))
    draft_layers = mtp_source.integer("num_nextn_predict_layers", 0, low=0, high=8)
    tied = top.boolean("tie_word_embeddings", text_reader.boolean("tie_word_embeddings", False))
    text, extra = _text(text_reader, tied, spare=max(1, draft_layers) if vision or draft_layers else 0)
    if vision is not None and vision.out_hidden_size != text.hidden_size:
        raise top.fail(
            "vision_config.out_hidden_size",
            f"{vision.out_hidden_size} differs from the text model's hidden_size {text.hidden_size}",
        )
    architecture = architecture_of(_named(raw), vision=vision is not None)
    tasks = possible_tasks(architecture, vision=vision is not None)
    mtp = None
    if vision is not None or draft_layers:
        default = SLIDING if text.sliding_window is not None else FULL
        mtp = MtpConfig(max(1, draft_layers), extra[0] if extra else default)
    return ExaoneConfig(
        model_type=model_type,
        text=text,
        vision=vision,
        mtp=mtp,
        bos_token_id=_token(top, text_reader, "bos_token_id", text.vocab_size),
        eos_token_ids=_eos(top, text_reader, text.vocab_size),
        pad_token_id=_token(top, text_reader, "pad_token_id", text.vocab_size),
        architecture=architecture,
        task=tasks[0],
        labels=parse_labels(top) if set(CLASSIFICATION) & set(tasks) else TWO_LABELS,
        quantization=find_quantization(raw, where),
        **(_media_tokens(top, text.vocab_size) if vision else {}),
    )


def _model_type(raw: Mapping[str, Any], where: str) -> str:
    model_type = raw.get("model_type")
    if model_type in ("exaone4", "exaone4_5"):
        return str(model_type)
    shown = str(model_type if model_type is not None else _named(raw))[:60]
    raise UsageError("cannot export", f"{where}: model_type", f"{shown!r} is not supported", SUPPORTED)


def _named(raw: Mapping[str, Any]) -> str | None:
    """The first of `architectures`."""
    listed = raw.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else None
    return named if isinstance(named, str) else None


def _text(reader: Reader, tied: bool, spare: int) -> tuple[TextConfig, tuple[str, ...]]:
    """The text model, and the layer types beyond its own layers (at most `spare`, for the draft head)."""
    reader.refuse("hidden_act", (None, "silu"))
    reader.refuse("attention_bias", (None, False))
    reader.refuse("mlp_bias", (None, False))
    hidden, heads = (
        reader.integer("hidden_size", high=1 << 20),
        reader.integer("num_attention_heads", high=1 << 14),
    )
    kv_heads = reader.integer("num_key_value_heads", heads, high=1 << 14)
    if not reader.has("head_dim") and hidden % heads:
        raise reader.fail("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")
    head_dim = reader.integer("head_dim", hidden // heads, high=1 << 14)
    if head_dim % 8:
        raise reader.fail("head_dim", f"{head_dim} is no multiple of 8, which ONNX Runtime's attention needs")
    if heads % kv_heads:
        raise reader.fail("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    layers = reader.integer("num_hidden_layers", high=4096)
    window = reader.integer("sliding_window") if reader.has("sliding_window") else None
    types = _layer_types(reader, layers, window, spare)
    return TextConfig(
        vocab_size=reader.integer("vocab_size", high=1 << 24),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", high=1 << 22),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-5),
        max_position_embeddings=reader.integer("max_position_embeddings", high=1 << 22),
        tie_word_embeddings=tied,
        sliding_window=window,
        layer_types=types[:layers],
        rope=_rope(reader),
    ), types[layers:]


def _layer_types(reader: Reader, layers: int, window: int | None, spare: int) -> tuple[str, ...]:
    listed = reader.raw.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list) or any(kind not in (SLIDING, FULL) for kind in listed):
            raise reader.fail("layer_types", f"every entry must be {SLIDING!r} or {FULL!r}")
        if not layers <= len(listed) <= layers + spare:
            raise reader.fail("layer_types", f"{len(listed)} entries for {layers} layers")
        if window is None and SLIDING in listed:
            raise reader.fail("sliding_window", f"null, but layer_types has {SLIDING!r}")
        return tuple(listed)
    if window is None:
        return (FULL,) * layers
    pattern = reader.raw.get("sliding_window_pattern", 4)
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        return tuple(SLIDING if pattern[i % len(pattern)] == "L" else FULL for i in range(layers))
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 1:
        # As transformers' Exaone4Config: every pattern-th layer is global.
        return tuple(SLIDING if (i + 1) % pattern else FULL for i in range(layers))
    raise reader.fail("sliding_window_pattern", f"{str(pattern)[:40]!r} is neither a number nor a word of L and G")


def _rope(reader: Reader) -> RopeConfig:
    # Where a file has both, transformers takes the older spelling.
    key = next((key for key in ("rope_scaling", "rope_parameters") if reader.raw.get(key)), None)
    inner = reader.child(key) if key else None
    if inner is not None and any(kind in inner.raw for kind in (SLIDING, FULL)):
        raise reader.fail(str(key), "rotary parameters per layer type are not implemented")
    for place in (reader, inner or reader):
        place.refuse("partial_rotary_factor", (None, 1, 1.0))
    if inner is not None and inner.has("rope_theta"):
        theta = inner.number("rope_theta")
    elif reader.has("rope_theta"):
        theta = reader.number("rope_theta")
    else:
        raise reader.fail(
            "rope_theta",
            "the key is missing",
            "Add the value the model was trained with; a guess gives a wrong model",
        )
    if inner is None:
        return RopeConfig(theta)
    kind = inner.raw.get("rope_type", inner.raw.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind != "llama3":
        raise inner.fail("rope_type", f"{str(kind)[:40]!r} is not implemented (only 'llama3' and 'default' are)")
    inner.refuse("attention_factor", (None, 1, 1.0))
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if high <= low:
        raise inner.fail("high_freq_factor", f"{high} is not above low_freq_factor {low}")
    return RopeConfig(
        theta, "llama3", inner.number("factor"), low, high, inner.integer("original_max_position_embeddings")
    )


def _vision(reader: Reader) -> VisionConfig:
    reader.refuse("hidden_act", (None, "silu"))
    hidden, heads = reader.integer("hidden_size", high=1 << 20), reader.integer("num_heads", high=1 << 14)
    kv_heads = reader.integer("num_key_value_heads", heads, high=1 << 14)
    if hidden % heads or (hidden // heads) % 4:
        raise reader.fail("num_heads", f"hidden_size {hidden} over {heads} heads is no multiple of 4")
    if heads % kv_heads:
        raise reader.fail("num_key_value_heads", f"{kv_heads} does not divide num_heads {heads}")
    depth = reader.integer("depth", high=4096)
    # No default: without the key every block would silently see windows only.
    full = reader.raw.get("fullatt_block_indexes")
    if not isinstance(full, list) or any(
        isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth for i in full
    ):
        raise reader.fail("fullatt_block_indexes", f"block numbers below depth {depth} are needed")
    theta = 1e4
    if reader.has("rope_parameters"):
        rope = reader.child("rope_parameters")
        rope.refuse("rope_type", (None, "default", "axial"))
        theta = rope.number("rope_theta", 1e4)
    patch, merge = (
        reader.integer("patch_size", 14, high=1 << 12),
        reader.integer("spatial_merge_size", 2, high=64),
    )
    window = reader.integer("window_size", 112, high=1 << 16)
    if window < patch * merge:
        raise reader.fail("window_size", f"{window} is smaller than one merged unit of {patch * merge} pixels")
    return VisionConfig(
        depth=depth,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", high=1 << 22),
        num_heads=heads,
        num_kv_heads=kv_heads,
        patch_size=patch,
        spatial_merge_size=merge,
        temporal_patch_size=reader.integer("temporal_patch_size", 2, high=64),
        window_size=window,
        fullatt_block_indexes=tuple(full),
        out_hidden_size=reader.integer("out_hidden_size", high=1 << 20),
        in_channels=reader.integer("in_channels", reader.integer("in_chans", 3, high=64), high=64),
        rope_theta=theta,
    )


def _token(top: Reader, text: Reader, key: str, vocab_size: int) -> int | None:
    reader = top if top.has(key) else text
    return _known(reader, key, reader.optional_integer(key), vocab_size)


def _eos(top: Reader, text: Reader, vocab_size: int) -> tuple[int, ...]:
    reader = top if top.has("eos_token_id") else text
    value = reader.raw.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in values):
        raise reader.fail("eos_token_id", "a token id or a list of them is needed")
    return tuple(token for token in values if _known(reader, "eos_token_id", token, vocab_size) is not None)


def _media_tokens(top: Reader, vocab_size: int) -> dict[str, int | None]:
    tokens: dict[str, int | None] = {
        "image_token_id": top.integer("image_token_id", top.optional_integer("vision_token_id"), low=0),
        "video_token_id": top.optional_integer("video_token_id"),
        "vision_start_token_id": top.optional_integer("vision_start_token_id"),
        "vision_end_token_id": top.optional_integer("vision_end_token_id"),
    }
    return {key: _known(top, key, token, vocab_size) for key, token in tokens.items()}


def _known(reader: Reader, key: str, token: int | None, vocab_size: int) -> int | None:
    if token is not None and token >= vocab_size:
        raise reader.fail(key, f"{str(token)[:40]} is outside the vocabulary of {vocab_size}")
    return token
