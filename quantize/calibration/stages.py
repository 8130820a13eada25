"""The model in steps: what each reads, which module it is, and which of its products share an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from model.bundle import DECODER, EMBEDDING, MTP, VISION_ENCODER
from model.config import SLIDING, ExaoneConfig, VisionConfig
from model.load import load_part
from model.source import WeightSource
from model.text import DecoderLayer, RMSNorm, rope_tables
from model.vision import PatchEmbed, PatchMerger, VisionBlock
from quantize.calibration import parts
from quantize.calibration.prompts import Prompt, PromptSet, even_weights, token_weights
from quantize.calibration.states import States
from quantize.scheme import Floats

Groups = tuple[tuple[str, ...], ...]
Refs = Mapping[str, WeightSource]
LAYER: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
BLOCK: Groups = (("attn.qkv",), ("attn.proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_HEADS = ("lm_head", "score", "qa_outputs")
# Gives rows [n, hidden] of the embedding for ascending ids, as the quantized model has them.
Rows = Callable[[str, Sequence[int]], Floats]


@dataclass(frozen=True, eq=False)
class Stage:
    """One step over all prompts.

    Attributes:
        name: what it is called in files and messages, e.g. "decoder.layers.3".
        prefix: of its weights' names, e.g. "decoder.layers.3"; those of a head begin with "decoder" alone.
        groups: products inside it, in the order in which they run; those of one group read the same input.
        inputs: the stages whose states it reads.
        prompts: it runs over, which may be some only.
        counts: rows of each prompt's states.
        width: of a row.
        weights: how much each row counts, float32 [rows] a prompt.
        build: makes the module; weights without values.
        run: the module, a prompt's number and its input states, in order → its states [rows, width].
    """

    name: str
    prefix: str
    groups: Groups
    inputs: tuple[Stage, ...]
    prompts: tuple[Prompt, ...]
    counts: tuple[int, ...]
    width: int
    weights: list[Floats]
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, int, tuple[Tensor, ...]], Tensor]

    def load(self, refs: Refs, device: torch.device) -> nn.Module:
        """The module in float32, with its weights."""
        with torch.device("meta"):
            module = self.build()
        load_part(module, refs, self.prefix)
        return module.to(device).eval().requires_grad_(False)

    def states(self, states: Mapping[str, States], index: int, device: torch.device) -> tuple[Tensor, ...]:
        """The states that a prompt's run reads."""
        return tuple(torch.from_numpy(states[stage.name].read(index)).to(device) for stage in self.inputs)


@dataclass(frozen=True, eq=False)
class LookupStage(Stage):
    """The embedding, whose inputs are the features of those prompts that have images.

    Attributes:
        media: token ids that stand for images.
        rows: gives rows of the table.
    """

    media: tuple[int, ...] = ()
    rows: Rows | None = None

    def load(self, refs: Refs, device: torch.device) -> nn.Module:
        """A table of the prompts' tokens alone."""
        if self.rows is None:
            raise ValueError("no rows to look up")
        ids = np.unique(np.concatenate([prompt.ids for prompt in self.prompts]))
        table = self.rows(f"{self.prefix}.embed_tokens", ids.tolist())
        return parts.Lookup(torch.from_numpy(ids).to(device), torch.from_numpy(table).to(device), self.media)

    def states(self, states: Mapping[str, States], index: int, device: torch.device) -> tuple[Tensor, ...]:
        """The features of a prompt's images; nothing for a prompt without."""
        if not self.inputs or not self.prompts[index].patches:
            return ()
        seen = sum(prompt.patches > 0 for prompt in self.prompts[:index])
        return (torch.from_numpy(states[self.inputs[0].name].read(seen)).to(device),)


class Stages:
    """All steps of a model in the order they run.

    Args:
        config: of the model.
        refs: canonical name → weight; what is not there is no step.
        prompts: to run.
        rows: gives rows of the embedding.
        device: where to run.

    Attributes:
        every: the steps.
    """

    def __init__(self, config: ExaoneConfig, refs: Refs, prompts: PromptSet, rows: Rows, device: torch.device) -> None:
        self._config, self._refs, self._prompts, self._rows, self._device = config, refs, prompts, rows, device
        self.every: list[Stage] = []
        vision = config.vision
        seen = tuple(prompt for prompt in prompts.prompts if prompt.patches)
        features = self._add_vision(vision, seen) if vision is not None and seen else None
        table = EMBEDDING if vision is not None else DECODER
        if f"{table}.embed_tokens.weight" in refs:
            embeds = self._add_lookup(table, features)
            hidden = self._add_text(embeds)
            if f"{MTP}.fc.weight" in refs:
                self._add_draft(embeds, hidden)

    def _add_vision(self, vision: VisionConfig, prompts: tuple[Prompt, ...]) -> Stage:
        counts = tuple(prompt.patches for prompt in prompts)
        weights, width, device = even_weights(counts), vision.hidden_size, self._device
        grids = [torch.from_numpy(prompt.grids).to(device) for prompt in prompts]

        def see(module: nn.Module, index: int, given: tuple[Tensor, ...]) -> Tensor:
            pixels = prompts[index].pixels
            if pixels is None:
                raise ValueError(f"prompt {index} has no pixels")
            return module(torch.from_numpy(pixels()).to(device), grids[index])

        def go_on(module: nn.Module, index: int, given: tuple[Tensor, ...]) -> Tensor:
            return module(given[0], grids[index])

        def block(number: int) -> Callable[[], nn.Module]:
            full = number in vision.fullatt_block_indexes
            fixed = vision.spatial_merge_size, vision.window_side, vision.rope_theta
            return lambda: parts.Block(VisionBlock(vision, full), *fixed)

        name = f"{VISION_ENCODER}.patch_embed"
        stage = Stage(
            name, name, (("proj",),), (), prompts, counts, width, weights,
            lambda: parts.Patches(PatchEmbed(vision)), see,
        )  # fmt: skip
        self.every.append(stage)
        for number in range(vision.depth):
            name = f"{VISION_ENCODER}.blocks.{number}"
            stage = Stage(name, name, BLOCK, (stage,), prompts, counts, width, weights, block(number), go_on)
            self.every.append(stage)
        name, merged = f"{VISION_ENCODER}.merger", tuple(count // vision.spatial_merge_size**2 for count in counts)
        stage = Stage(
            name, name, (("mlp.0",), ("mlp.2",)), (stage,), prompts, merged, vision.out_hidden_size,
            even_weights(merged), lambda: parts.Merger(PatchMerger(vision)), go_on,
        )  # fmt: skip
        self.every.append(stage)
        return stage

    def _add_lookup(self, prefix: str, features: Stage | None) -> Stage:
        prompts, device = self._prompts.prompts, self._device
        inputs = () if features is None else (features,)

        def look_up(module: nn.Module, index: int, given: tuple[Tensor, ...]) -> Tensor:
            return module(torch.from_numpy(prompts[index].ids).to(device), given[0] if given else None)

        stage = LookupStage(
            EMBEDDING, prefix, (), inputs, prompts, self._counts, self._config.text.hidden_size, self._weights,
            nn.Identity, look_up, self._prompts.media, self._rows,
        )  # fmt: skip
        self.every.append(stage)
        return stage

    def _add_text(self, stage: Stage) -> Stage:
        """The decoder's layers and its final norm; the last stage."""
        text = self._config.text
        for number in range(text.num_layers):
            window, rotary = text.window(number), text.uses_rope(number)
            stage = self._add_layer(f"{DECODER}.layers.{number}", stage, window, rotary)
        return self._add_head(DECODER, stage)

    def _add_draft(self, embeds: Stage, hidden: Stage) -> None:
        text, mtp = self._config.text, self._config.mtp
        if mtp is None:
            raise ValueError("weights of a draft head, but none in the configuration")
        counts, weights = tuple(count - 1 for count in self._counts), [row[:-1] for row in self._weights]
        weights = [row / sum(float(part.sum()) for part in weights) for row in weights]
        stage = Stage(
            f"{MTP}.fc", MTP, (("fc",),), (embeds, hidden), self._prompts.prompts, counts, text.hidden_size, weights,
            lambda: parts.DraftInput(text.hidden_size, text.rms_norm_eps),
            lambda module, index, given: module(*given),
        )  # fmt: skip
        self.every.append(stage)
        sliding = mtp.layer_type == SLIDING
        window = text.sliding_window if sliding else None
        for number in range(mtp.num_layers):
            rotary = sliding or text.sliding_window is None
            stage = self._add_layer(f"{MTP}.layers.{number}", stage, window, rotary)
        self._add_head(MTP, stage)

    def _add_layer(self, name: str, before: Stage, window: int | None, rotary: bool) -> Stage:
        rope, text = self._rope, self._config.text
        stage = Stage(
            name, name, LAYER, (before,), before.prompts, before.counts, before.width, before.weights,
            lambda: parts.Layer(DecoderLayer(text, window, rotary)),
            lambda module, index, given: module(given[0], rope),
        )  # fmt: skip
        self.every.append(stage)
        return stage

    def _add_head(self, prefix: str, before: Stage) -> Stage:
        heads = tuple(head for head in _HEADS if f"{prefix}.{head}.weight" in self._refs)
        text = self._config.text
        stage = Stage(
            f"{prefix}.norm", prefix, tuple((head,) for head in heads), (before,), before.prompts, before.counts,
            before.width, before.weights,
            lambda: parts.Head(RMSNorm(text.hidden_size, text.rms_norm_eps), heads),
            lambda module, index, given: module(given[0]),
        )  # fmt: skip
        self.every.append(stage)
        return stage

    @property
    def _counts(self) -> tuple[int, ...]:
        return tuple(prompt.ids.size for prompt in self._prompts.prompts)

    @cached_property
    def _weights(self) -> list[Floats]:
        return token_weights(self._prompts)

    @cached_property
    def _rope(self) -> tuple[Tensor, Tensor]:
        longest = max(self._counts)
        cos, sin = (table[:longest].clone().to(self._device) for table in rope_tables(self._config.text))
        return cos, sin
