"""How large a checkpoint's bundle will be, from the shapes of its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from model.bundle import (
    DECODER,
    EMBEDDING,
    GRAPHS,
    MTP,
    VISION_ENCODER,
    past_key,
    past_value,
    present_key,
    present_value,
)
from model.config import ExaoneConfig
from model.rotary import stores_tables
from model.tasks import GENERATION, HEAD_OUTPUTS
from quantize.recipe import SHIPPED, load_recipe
from quantize.scheme import Scheme
from quantize.sizes import part_bytes, ruled_scheme

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """Bytes of a bundle's weights.

    Attributes:
        stored: of all of them, as they lie on the disk.
        tables: of the rotary tables that are stored, which no checkpoint has.
        codes, scales, floats: of those that a generation multiplies by, so without the draft head.
        looked_up: of embeddings, of which only some rows are used.
        largest: of the largest tensor that is multiplied by.
    """

    stored: int = 0
    tables: int = 0
    codes: int = 0
    scales: int = 0
    floats: int = 0
    looked_up: int = 0
    largest: int = 0

    @property
    def total(self) -> int:
        """Of all data files together."""
        return self.stored + self.tables

    def with_weight(self, path: str, parts: Mapping[str, int], *, copy: bool = False) -> Weights:
        """These and another weight.

        Args:
            path: of its module, with the graph's name.
            parts: bytes of its ``codes`` (or ``turned_codes``), ``scales`` and ``zero_points``, or ``float``.
            copy: whether its bytes are those of another weight.
        """
        size = sum(parts.values())
        changed = replace(self, stored=self.stored + (0 if copy else size))
        if path.startswith(f"{MTP}."):
            return changed
        if path.endswith(".embed_tokens"):
            return replace(changed, looked_up=self.looked_up + size)
        codes, floats = parts.get("codes", 0) + parts.get("turned_codes", 0), parts.get("float", 0)
        return replace(
            changed,
            codes=self.codes + codes + parts.get("zero_points", 0),
            scales=self.scales + parts.get("scales", 0),
            floats=self.floats + floats,
            largest=max(self.largest, codes, floats),
        )


@dataclass(frozen=True)
class Forecast:
    """What a checkpoint becomes: `graphs`, bytes by graph without a recipe; `recipes`, the weights by recipe."""

    graphs: Mapping[str, int]
    recipes: Mapping[str, Weights]


def forecast(
    config: ExaoneConfig,
    shapes: Mapping[str, Shape],
    kept: Mapping[str, Scheme] = MappingProxyType({}),
    float_bytes: int = 4,
    target: str = "cpu",
) -> Forecast:
    """Predicts sizes.

    Args:
        config: the model.
        shapes: canonical tensor name → shape in the checkpoint, as `Checkpoint.bind` names them.
        kept: of those that are quantized already and taken over as they are, how they will be stored.
        float_bytes: size of a float, scales included.
        target: what the graphs will run on, "cpu" or "cuda".
    """
    stored = {name: shape for name, shape in shapes.items() if name != f"{MTP}.lm_head.weight"}
    graphs = {name: 0 for name in GRAPHS if any(tensor.startswith(f"{name}.") for tensor in stored)}
    for tensor, shape in stored.items():
        graphs[tensor.partition(".")[0]] += sum(part_bytes(shape, kept.get(tensor), float_bytes).values())
    tables = rotary_bytes(config, float_bytes) if DECODER in graphs else 0
    if tables:
        graphs[DECODER] += tables
    recipes = {}
    for recipe in ("none", *SHIPPED):
        rules = load_recipe(recipe).for_target(target) if recipe != "none" else None
        schemes = {
            name: kept.get(name) or ruled_scheme(rules, name.removesuffix(".weight"), shape)
            for name, shape in stored.items()
        }
        recipes[recipe] = _weights(stored, schemes, config.text.tie_word_embeddings, float_bytes, tables)
    return Forecast(graphs, recipes)


def rotary_bytes(config: ExaoneConfig, float_bytes: int) -> int:
    """Bytes of the cosines and sines of every position, where a bundle stores them."""
    return float_bytes * config.text.max_position_embeddings * config.text.head_dim if stores_tables(config.text) else 0


def _weights(
    shapes: Mapping[str, Shape], schemes: Mapping[str, Scheme | None], tied: bool, float_bytes: int, tables: int
) -> Weights:
    weights = Weights(tables=tables)
    embedding = next((schemes[name] for name in shapes if name.endswith(".embed_tokens.weight")), None)
    for name, shape in shapes.items():
        # Quantized alike, a tied head's bytes are the embedding's; in float one of them is stored transposed.
        copy = tied and name == f"{DECODER}.lm_head.weight" and embedding is not None and schemes[name] == embedding
        parts = part_bytes(shape, schemes[name], float_bytes)
        weights = weights.with_weight(name.rpartition(".")[0], parts, copy=copy)
    return weights


def interface(graph: str, config: ExaoneConfig, draft: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the inputs and outputs a graph will have; `draft`: whether the checkpoint has a draft head."""
    if graph == VISION_ENCODER:
        return ("pixel_values", "image_grid_thw"), ("image_features",)
    if graph == EMBEDDING:
        return ("input_ids", "image_features"), ("inputs_embeds",)
    if config.task not in GENERATION:
        return ("input_ids" if config.vision is None else "inputs_embeds", "attention_mask"), HEAD_OUTPUTS[config.task]
    layers = range(config.mtp.num_layers if graph == MTP and config.mtp else config.text.num_layers)
    past = [name(i) for i in layers for name in (past_key, past_value)]
    present = [name(i) for i in layers for name in (present_key, present_value)]
    if graph == MTP:
        first, hidden = ["inputs_embeds", "hidden_states"], ["hidden_states_out"]
    else:
        first = ["input_ids" if config.vision is None else "inputs_embeds"]
        hidden = ["hidden_states"] if draft else []
    return (*first, "attention_mask", *past, "logits_to_keep"), ("logits", *hidden, *present)
