"""Export configurations in optimum's form: what each graph takes and gives, and dummy inputs for it.

Importing this module registers them with optimum's `TasksManager` under the backend "onnx". The dummy inputs are
what the graphs are traced with, and what a bundle is verified with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils.input_generators import (
    DummyInputGenerator,
    DummyPastKeyValuesGenerator,
    DummyTextInputGenerator,
    DummyVisionInputGenerator,
)
from optimum.utils.normalized_config import NormalizedConfig, NormalizedTextConfigWithGQA
from torch import Tensor

from model.bundle import (
    DECODER,
    EMBEDDING,
    GRAPHS,
    MTP,
    VISION_ENCODER,
    WINDOW_CACHE,
    past_key,
    past_value,
    present_key,
    present_value,
)
from model.config import SLIDING, ExaoneConfig, parse_config
from model.errors import UsageError
from model.tasks import (
    CLASSIFICATION,
    FEATURE_EXTRACTION,
    GENERATION,
    HEAD_OUTPUTS,
    IMAGE_FEATURE_EXTRACTION,
    IMAGE_TEXT_TO_TEXT,
    QUESTION_ANSWERING,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    WITH_PAST,
)

Axes = dict[int, str]
BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
KEPT, PATCHES, IMAGES, IMAGE_TOKENS = "kept_length", "patches", "images", "image_tokens"


class NormalizedExaoneTextConfig(NormalizedTextConfigWithGQA):
    """optimum's names for what `model.config.ExaoneConfig` calls otherwise."""

    VOCAB_SIZE = "text.vocab_size"
    HIDDEN_SIZE = "text.hidden_size"
    NUM_LAYERS = "text.num_layers"
    NUM_ATTENTION_HEADS = "text.num_heads"
    NUM_KEY_VALUE_HEADS = "text.num_kv_heads"
    HEAD_DIM = "text.head_dim"
    EOS_TOKEN_ID = "eos_token_ids"


class NormalizedExaoneConfig(NormalizedExaoneTextConfig):
    """The same with the vision encoder."""

    NUM_CHANNELS = "vision.in_channels"
    PATCH_DIM = "vision.patch_dim"
    SPATIAL_MERGE_SIZE = "vision.spatial_merge_size"


class ExaoneDummyTextInputGenerator(DummyTextInputGenerator):
    """Ids, masks of ones over past and new tokens, and float inputs of the decoder's width."""

    SUPPORTED_INPUT_NAMES = ("input_ids", "attention_mask", "inputs_embeds", "hidden_states", "logits_to_keep")

    def __init__(
        self, task: str, normalized_config: NormalizedConfig, past_sequence_length: int = 4, **shapes: Any
    ) -> None:
        super().__init__(task, normalized_config, **shapes)
        self.past_sequence_length = past_sequence_length
        self.hidden_size = normalized_config.hidden_size

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Tensor:
        if input_name == "attention_mask":
            past = self.past_sequence_length if self.task in GENERATION else 0
            return torch.ones(self.batch_size, past + self.sequence_length, dtype=torch.int64)
        if input_name == "logits_to_keep":
            return torch.ones(1, dtype=torch.int64)
        if input_name in ("inputs_embeds", "hidden_states"):
            shape = [self.batch_size, self.sequence_length, self.hidden_size]
            return self.random_float_tensor(shape, -1, 1, framework=framework, dtype=float_dtype)
        return super().generate(input_name, framework, int_dtype, float_dtype)


class ExaoneDummyMediaInputGenerator(DummyInputGenerator):
    """Features of `image_tokens` image tokens, and ids in which as many placeholders come first."""

    SUPPORTED_INPUT_NAMES = ("input_ids", "image_features")

    def __init__(
        self,
        task: str,
        normalized_config: NormalizedConfig,
        batch_size: int = 2,
        sequence_length: int = 16,
        image_tokens: int = 6,
        **_: Any,
    ) -> None:
        config: ExaoneConfig = normalized_config.config
        self.media = tuple(t for t in (config.image_token_id, config.video_token_id) if t is not None)
        self.vocab_size, self.width = config.text.vocab_size, config.text.hidden_size
        self.batch_size, self.sequence_length, self.image_tokens = batch_size, sequence_length, image_tokens

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Tensor:
        if input_name == "image_features":
            return self.random_float_tensor(
                [self.image_tokens, self.width], -1, 1, framework=framework, dtype=float_dtype
            )
        ids = self.random_int_tensor(
            [self.batch_size * self.sequence_length], self.vocab_size, framework=framework, dtype=int_dtype
        )
        plain = next(token for token in range(self.vocab_size) if token not in self.media)
        for token in self.media:
            ids = torch.where(ids == token, plain, ids)
        first = torch.arange(ids.shape[0]) < self.image_tokens
        return torch.where(first, self.media[0], ids).view(self.batch_size, self.sequence_length)


class ExaoneDummyPastKeyValuesGenerator(DummyPastKeyValuesGenerator):
    """Cached keys or values of one layer, [batch, key/value heads, past, head_dim].

    A layer of `window_layers` has a buffer of `window_cache_length` instead, by default the window itself.
    """

    def __init__(
        self,
        task: str,
        normalized_config: NormalizedConfig,
        past_sequence_length: int = 4,
        window_layers: Iterable[int] = (),
        window_cache_length: int | None = None,
        **shapes: Any,
    ) -> None:
        super().__init__(task, normalized_config, **{**shapes, "sequence_length": past_sequence_length})
        self.num_kv_heads, self.head_dim = normalized_config.num_key_value_heads, normalized_config.head_dim
        self.buffers = {name(layer) for layer in window_layers for name in (past_key, past_value)}
        self.window_cache_length = window_cache_length or normalized_config.config.text.sliding_window

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Tensor:
        length = self.window_cache_length if input_name in self.buffers else self.sequence_length
        shape = [self.batch_size, self.num_kv_heads, length, self.head_dim]
        return self.random_float_tensor(shape, -1, 1, framework=framework, dtype=float_dtype)


class ExaoneDummyVisionInputGenerator(DummyVisionInputGenerator):
    """Patches of several images; `grids` gives frames, rows and columns of patches of each."""

    SUPPORTED_INPUT_NAMES = ("pixel_values", "image_grid_thw")

    def __init__(
        self,
        task: str,
        normalized_config: NormalizedConfig,
        grids: Iterable[tuple[int, int, int]] | None = None,
        **shapes: Any,
    ) -> None:
        super().__init__(task, normalized_config, **shapes)
        merge = normalized_config.spatial_merge_size
        self.grids = list(grids) if grids is not None else [(1, 2 * merge, 3 * merge), (1, 4 * merge, 2 * merge)]
        self.patch_dim = normalized_config.patch_dim

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Tensor:
        if input_name == "image_grid_thw":
            return torch.tensor(self.grids, dtype=torch.int64)
        patches = sum(frames * rows * columns for frames, rows, columns in self.grids)
        return self.random_float_tensor([patches, self.patch_dim], -1, 1, framework=framework, dtype=float_dtype)


class Exaone4OnnxConfig(ExporterConfig):
    """One graph of an EXAONE model; EXAONE 4.0 has only the decoder.

    Args:
        config: transformers' configuration or this package's.
        task: "text-generation" or, for models with vision, "image-text-to-text"; or another of `TASK_NAMES`.
        int_dtype, float_dtype: as in optimum ("int64"; "fp32", "fp16" or "bf16").
        use_past: accepted for optimum's sake; the one decoder graph serves an empty cache as well.
        graph: which of `model.bundle.GRAPHS`.
        draft: whether a draft head follows, so that the decoder gives its hidden states out.
        window_cache: whether caches of window layers are buffers that hold the window only.

    Raises:
        UsageError: the model has no such graph or task.
    """

    NORMALIZED_CONFIG_CLASS = NormalizedExaoneTextConfig
    SUPPORTS_PAST = True
    ATOL_FOR_VALIDATION = 1e-4
    GRAPH_NAMES: tuple[str, ...] = (DECODER, MTP)
    TASK_NAMES: tuple[str, ...] = (TEXT_GENERATION, FEATURE_EXTRACTION, *CLASSIFICATION, QUESTION_ANSWERING)

    def __init__(
        self,
        config: Any,
        task: str = "text-generation",
        int_dtype: str = "int64",
        float_dtype: str = "fp32",
        use_past: bool = True,
        graph: str = DECODER,
        draft: bool = False,
        window_cache: bool = True,
    ) -> None:
        own = config if isinstance(config, ExaoneConfig) else parse_config(config.to_dict())
        if graph not in self.GRAPH_NAMES:
            raise UsageError("no such graph", graph, f"{own.model_type} has {', '.join(self.GRAPH_NAMES)}", "")
        if task not in self.TASK_NAMES:
            raise UsageError("no such task", task, f"{own.model_type} does {', '.join(self.TASK_NAMES)}", "")
        super().__init__(own, task, int_dtype=int_dtype, float_dtype=float_dtype)
        self.exaone, self.use_past, self.graph, self.draft = own, use_past, graph, draft
        self.cached_layers = (own.mtp.num_layers if own.mtp else 0) if graph == MTP else own.text.num_layers
        self.window_layers = _window_layers(own, graph) if window_cache else ()

    @property
    def DUMMY_INPUT_GENERATOR_CLASSES(self) -> tuple[type[DummyInputGenerator], ...]:  # noqa: N802 - optimum's name
        if self.graph == VISION_ENCODER:
            return (ExaoneDummyVisionInputGenerator,)
        if self.graph == EMBEDDING:
            return (ExaoneDummyMediaInputGenerator,)
        return (ExaoneDummyTextInputGenerator, ExaoneDummyPastKeyValuesGenerator)

    @property
    def inputs(self) -> dict[str, Axes]:
        """Names of the inputs, in the graph's order, with their free axes."""
        if self.graph == VISION_ENCODER:
            return {"pixel_values": {0: PATCHES}, "image_grid_thw": {0: IMAGES}}
        if self.graph == EMBEDDING:
            return {"input_ids": {0: BATCH, 1: SEQUENCE}, "image_features": {0: IMAGE_TOKENS}}
        tokens = {0: BATCH, 1: SEQUENCE}
        if self.task not in GENERATION:
            return {"input_ids" if self.exaone.vision is None else "inputs_embeds": tokens, "attention_mask": tokens}
        names = ["inputs_embeds", "hidden_states"] if self.graph == MTP else ["inputs_embeds"]
        if self.exaone.vision is None and self.graph == DECODER:
            names = ["input_ids"]
        inputs = dict.fromkeys(names, tokens) | {"attention_mask": {0: BATCH, 1: TOTAL}}
        for layer in range(self.cached_layers):
            cache = {0: BATCH, 2: WINDOW_CACHE if layer in self.window_layers else PAST}
            inputs |= {past_key(layer): cache, past_value(layer): cache}
        return inputs | {"logits_to_keep": {}}

    @property
    def outputs(self) -> dict[str, Axes]:
        """Names of the outputs, in the graph's order, with their free axes."""
        if self.graph == VISION_ENCODER:
            return {"image_features": {0: IMAGE_TOKENS}}
        tokens = {0: BATCH, 1: SEQUENCE}
        if self.graph == EMBEDDING:
            return {"inputs_embeds": tokens}
        if self.task not in GENERATION:
            names = HEAD_OUTPUTS[self.task]
            return dict.fromkeys(names, {0: BATCH} if self.task == TEXT_CLASSIFICATION else tokens)
        outputs = {"logits": {0: BATCH, 1: KEPT}}
        if self.graph == MTP:
            outputs["hidden_states_out"] = tokens
        elif self.draft:
            outputs["hidden_states"] = tokens
        for layer in range(self.cached_layers):
            cache = {0: BATCH, 2: WINDOW_CACHE if layer in self.window_layers else TOTAL}
            outputs |= {present_key(layer): cache, present_value(layer): cache}
        return outputs

    def _create_dummy_input_generator_classes(self, **shapes: Any) -> list[DummyInputGenerator]:
        return super()._create_dummy_input_generator_classes(**{"window_layers": self.window_layers, **shapes})


def _window_layers(config: ExaoneConfig, graph: str) -> tuple[int, ...]:
    """Layers of a graph whose cache needs to hold no more than the window."""
    if config.text.cached_window is None:
        return ()
    if graph == MTP:
        return tuple(range(config.mtp.num_layers)) if config.mtp and config.mtp.layer_type == SLIDING else ()
    return tuple(layer for layer in range(config.text.num_layers) if config.text.is_sliding(layer))


class Exaone4_5OnnxConfig(Exaone4OnnxConfig):  # noqa: N801 - transformers spells the model so
    """One graph of EXAONE 4.5: vision encoder, embedding, decoder or draft head."""

    NORMALIZED_CONFIG_CLASS = NormalizedExaoneConfig
    GRAPH_NAMES = GRAPHS
    TASK_NAMES = (IMAGE_TEXT_TO_TEXT, FEATURE_EXTRACTION, IMAGE_FEATURE_EXTRACTION)

    def __init__(self, config: Any, task: str = "image-text-to-text", **options: Any) -> None:
        super().__init__(config, task, **options)


_register = TasksManager.create_register("onnx", overwrite_existing=True)
_register("exaone4", f"{TEXT_GENERATION}{WITH_PAST}", *Exaone4OnnxConfig.TASK_NAMES)(Exaone4OnnxConfig)
# optimum takes "image-feature-extraction" for another word for "feature-extraction".
_register("exaone4_5", f"{IMAGE_TEXT_TO_TEXT}{WITH_PAST}", IMAGE_TEXT_TO_TEXT, FEATURE_EXTRACTION)(Exaone4_5OnnxConfig)
