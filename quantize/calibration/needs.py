"""How much memory calibrating will take, told from shapes before anything is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from model.config import ExaoneConfig
from model.source import WeightSource
from quantize.calibration.prompts import PromptSet
from quantize.methods import HESSIAN, USES
from quantize.recipe import Recipe

_FLOAT = 4
# A layer of a stack, or what stands alone: its modules are loaded together.
_LAYER = re.compile(r"(\w+)\.(layers|blocks)\.\d+|(\w+)\.(merger|patch_embed|fc)\b")
# Bytes for each product of two channels: the sum in float64 and a product to be added, or the Hessian, its reordered
# factor and what the factorization is working on.
_PRODUCT = 16
# Copies of the weights that a method works on: as read, reordered, their grid, codes, errors.
_COPIES, _PIECE = 10, 1 << 26
# Hidden states of one prompt, and what attention and the wide half of a layer make of them.
_WIDE, _SCORES = 6, 3


def calibration_memory(
    recipe: Recipe, prompts: PromptSet, config: ExaoneConfig, refs: Mapping[str, WeightSource]
) -> int:
    """Most bytes that are held at a time, libraries and tracing not counted.

    Args:
        recipe: whose methods look at inputs.
        prompts: that are run.
        config, refs: of the model.
    """
    layers: dict[str, int] = {}
    channels = largest = 0
    for name, source in refs.items():
        count = math.prod(source.shape)
        found = _LAYER.match(name)
        if found is not None:
            layers[found[0]] = layers.get(found[0], 0) + _FLOAT * count
        rule = recipe.match(name.removesuffix(".weight")) if len(source.shape) > 1 else None
        if rule is not None and rule.scheme is not None and not name.endswith("embed_tokens.weight"):
            largest = max(largest, count)
            if USES[rule.scheme.method] == HESSIAN:
                channels = max(channels, math.prod(source.shape[1:]))
    working = _FLOAT * _COPIES * min(largest, _PIECE) + _PRODUCT * channels**2
    return max(layers.values(), default=0) + working + _running(prompts, config)


def _running(prompts: PromptSet, config: ExaoneConfig) -> int:
    """Of the longest prompt, and the most images in one."""
    text, vision = config.text, config.vision
    tokens = max(prompt.ids.size for prompt in prompts.prompts)
    found = _WIDE * tokens * text.intermediate_size + _SCORES * text.num_heads * tokens**2
    if vision is not None:
        patches = max(prompt.patches for prompt in prompts.prompts)
        image = max((int(grid.prod()) for prompt in prompts.prompts for grid in prompt.grids), default=0)
        seen = patches * (_WIDE * vision.intermediate_size + 2 * vision.patch_dim)
        found = max(found, seen + _SCORES * vision.num_heads * image**2)
    return _FLOAT * found
