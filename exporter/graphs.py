"""The graphs a model is exported as: which modules they hold, what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from exporter.optimum_configs import IMAGE_TOKENS, PATCHES, Exaone4_5OnnxConfig, Exaone4OnnxConfig
from model.bundle import DECODER, EMBEDDING, MTP, VISION_ENCODER
from model.config import ExaoneConfig
from model.embedding import Embedding
from model.heads import text_encoder
from model.mtp import DraftHead
from model.numerics import PLAIN, Numerics
from model.tasks import GENERATION, graphs_of
from model.text import Decoder
from model.vision import VisionEncoder

# Inputs that callers may leave out, and what they then are: stock runtimes expect the logits of every position.
OPTIONAL_INPUTS = {"logits_to_keep": (0,)}


@dataclass(frozen=True)
class GraphSpec:
    """One graph to be traced.

    Attributes:
        name: one of `model.bundle.GRAPHS`.
        config: the whole model's.
        build: makes the module whose parameters are the graph's initializers.
        draft: whether a draft head follows, so that the decoder gives its hidden states out.
        window_cache: whether caches of window layers are buffers that hold the window only.
        numerics: how the module computes.
    """

    name: str
    config: ExaoneConfig
    build: Callable[[], nn.Module]
    draft: bool = False
    window_cache: bool = True
    numerics: Numerics = PLAIN

    def onnx_config(self, float_dtype: str = "fp32") -> Exaone4OnnxConfig:
        """optimum's view of this graph."""
        kind = Exaone4OnnxConfig if self.config.vision is None else Exaone4_5OnnxConfig
        return kind(
            self.config,
            self.config.task,
            graph=self.name,
            draft=self.draft,
            float_dtype=float_dtype,
            window_cache=self.window_cache,
        )

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Input names in order, with the names of their free axes."""
        return self.onnx_config().inputs

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Output names in order, with the names of their free axes."""
        return self.onnx_config().outputs

    def dummy_inputs(self, float_dtype: str = "fp32", **shapes: Any) -> dict[str, Tensor]:
        """Random inputs by name; shapes are optimum's (batch_size, sequence_length) and this package's.

        Args:
            float_dtype: "fp32", "fp16" or "bf16".
            **shapes: batch_size, sequence_length, past_sequence_length, window_cache_length, image_tokens, or
                grids (frames, rows and columns of patches of each image).
        """
        return dict(self.onnx_config(float_dtype).generate_dummy_inputs("pt", **shapes))

    def arguments(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the module's forward takes, from values by input name (tensors, or anything else per input)."""
        values = [value for name, value in inputs.items() if not name.startswith("past_key_values.")]
        cache = [value for name, value in inputs.items() if name.startswith("past_key_values.")]
        if not cache:
            return tuple(values)
        pairs = list(zip(cache[::2], cache[1::2], strict=True))
        return (*values[:-1], pairs, values[-1])

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """`torch.export`'s free axes, laid out like `arguments`."""
        dims: dict[str, Any] = {}
        for axis in {axis for axes in self.inputs.values() for axis in axes.values()}:
            dims[axis] = torch.export.Dim(axis)
        if self.config.vision is not None and PATCHES in dims:
            dims[PATCHES] = self.config.vision.spatial_merge_size**2 * torch.export.Dim(IMAGE_TOKENS)
        return self.arguments(
            {name: {axis: dims[label] for axis, label in axes.items()} for name, axes in self.inputs.items()}
        )


def graph_specs(
    config: ExaoneConfig, draft: bool, window_cache: bool = True, numerics: Numerics = PLAIN
) -> list[GraphSpec]:
    """The graphs of a model, in the order they run.

    Every graph holds its own weights: a head tied to the embedding is a parameter `lm_head.weight` of its own,
    to be bound to the embedding's tensor.

    Args:
        config: the model, and its task.
        draft: whether the checkpoint has a draft head that is to be exported.
        window_cache: whether caches of window layers are buffers that hold the window only; else they grow as those
            of full layers do.
        numerics: how they compute.
    """
    vision, mtp = config.vision, config.mtp
    text = replace(config.text, tie_word_embeddings=False)
    wanted = graphs_of(config.task, vision=vision is not None)
    specs: list[GraphSpec] = []

    def add(name: str, build: Callable[[], nn.Module], **caches: bool) -> None:
        specs.append(GraphSpec(name, config, build, numerics=numerics, **caches))

    if vision is not None:
        add(VISION_ENCODER, lambda: VisionEncoder(vision, numerics))
    if EMBEDDING in wanted:
        add(EMBEDDING, lambda: Embedding(config))
    if config.task not in GENERATION:
        if DECODER in wanted:
            add(DECODER, lambda: text_encoder(config, numerics))
        return specs
    draft = draft and mtp is not None
    caches = {"draft": draft, "window_cache": window_cache}
    add(DECODER, lambda: Decoder(text, vision is None, window_cache, numerics), **caches)
    if draft and mtp is not None:
        add(MTP, lambda: DraftHead(text, mtp, window_cache, numerics), **caches)
    return specs
