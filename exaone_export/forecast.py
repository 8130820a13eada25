"""How large a checkpoint's bundle will be, from the shapes of its tensors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
from quantize.pack import packed_shapes
from quantize.recipe import SHIPPED, Recipe, fitting_scheme, load_recipe
from quantize.scheme import Scheme

Shape = tuple[int, ...]
_FLOAT = 4


@dataclass(frozen=True)
class Forecast:
    """Bytes of weights in float32: `graphs` by graph, unquantized; `recipes` by recipe, all graphs together."""

    graphs: Mapping[str, int]
    recipes: Mapping[str, int]


def forecast(config: ExaoneConfig, shapes: Mapping[str, Shape]) -> Forecast:
    """Predicts sizes.

    Args:
        config: the model.
        shapes: canonical tensor name → shape in the checkpoint, as `Checkpoint.bind` names them.
    """
    stored = {name: shape for name, shape in shapes.items() if name != f"{MTP}.lm_head.weight"}
    tables = _FLOAT * config.text.max_position_embeddings * config.text.head_dim  # cosines and sines
    graphs = {name: 0 for name in GRAPHS if any(tensor.startswith(f"{name}.") for tensor in stored)}
    for tensor, shape in stored.items():
        graphs[tensor.partition(".")[0]] += _FLOAT * math.prod(shape)
    graphs[DECODER] += tables
    recipes = {"none": sum(graphs.values())}
    for recipe in SHIPPED:
        recipes[recipe] = tables + _quantized_bytes(stored, load_recipe(recipe), config.text.tie_word_embeddings)
    return Forecast(graphs, recipes)


def _quantized_bytes(shapes: Mapping[str, Shape], recipe: Recipe, tied: bool) -> int:
    total = 0
    schemes = {name: _scheme(name, shape, recipe) for name, shape in shapes.items()}
    embedding = next((schemes[name] for name in shapes if name.endswith(".embed_tokens.weight")), None)
    for name, shape in shapes.items():
        scheme, rows, columns = schemes[name], shape[0], math.prod(shape[1:])
        if scheme is None:
            total += _FLOAT * math.prod(shape)
            continue
        if tied and name == f"{DECODER}.lm_head.weight" and scheme == embedding:
            continue  # the same bytes as the embedding's
        for part, packed in packed_shapes(rows, columns, scheme).items():
            total += math.prod(packed) * (_FLOAT if part == "scales" else 1)
    return total


def _scheme(name: str, shape: Shape, recipe: Recipe) -> Scheme | None:
    rule = recipe.match(name.removesuffix(".weight")) if len(shape) > 1 else None
    return None if rule is None or rule.scheme is None else fitting_scheme(rule.scheme, math.prod(shape[1:]))


def interface(graph: str, config: ExaoneConfig, draft: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the inputs and outputs a graph will have; `draft`: whether the checkpoint has a draft head."""
    if graph == VISION_ENCODER:
        return ("pixel_values", "image_grid_thw"), ("image_features",)
    if graph == EMBEDDING:
        return ("input_ids", "image_features"), ("inputs_embeds",)
    layers = range(config.mtp.num_layers if graph == MTP and config.mtp else config.text.num_layers)
    past = [name(i) for i in layers for name in (past_key, past_value)]
    present = [name(i) for i in layers for name in (present_key, present_value)]
    if graph == MTP:
        first, hidden = ["inputs_embeds", "hidden_states"], ["hidden_states_out"]
    else:
        first = ["input_ids" if config.vision is None else "inputs_embeds"]
        hidden = ["hidden_states"] if draft else []
    return (*first, "attention_mask", *past, "logits_to_keep"), ("logits", *hidden, *present)
