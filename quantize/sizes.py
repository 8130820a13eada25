"""How many bytes a weight will take, told from its shape before anything is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantize.pack import packed_shapes
from quantize.recipe import Recipe, fitting_scheme
from quantize.scheme import INT8, Scheme

if TYPE_CHECKING:
    from model.source import WeightSource

_COLUMN_SCALE = 4  # float32, see `quantize.columns`


def expected_scheme(recipe: Recipe | None, path: str, source: WeightSource) -> Scheme | None:
    """How a weight will be stored; None if it stays float.

    A weight that the checkpoint holds quantized counts as taken over, though a look at its scales or at the order of
    its columns may show that it cannot be.

    Args:
        recipe: the rules; None only takes over what is quantized.
        path: of its module, e.g. ``decoder.layers.3.mlp.down_proj``.
        source: the weight.
    """
    from quantize.blocks import imported_scheme  # needs ml_dtypes, which looking at a bundle does not

    table = path.endswith(".embed_tokens")
    return imported_scheme(source, fill=not table) or ruled_scheme(recipe, path, source.shape)


def ruled_scheme(recipe: Recipe | None, path: str, shape: tuple[int, ...]) -> Scheme | None:
    """What a recipe makes of a weight; dimensions behind the first count as one, and vectors stay float."""
    rule = recipe.match(path) if recipe is not None and len(shape) > 1 else None
    if rule is None or rule.scheme is None:
        return None
    return fitting_scheme(rule.scheme, math.prod(shape[1:]), table=path.endswith(".embed_tokens"))


def part_bytes(shape: tuple[int, ...], scheme: Scheme | None, float_bytes: int) -> dict[str, int]:
    """Bytes of each part that a weight is stored in: "codes", "scales", "zero_points", or "float".

    Codes that are turned round before they are written, and so lie in memory as a whole, are "turned_codes".

    Args:
        shape: of the weight.
        scheme: how it is stored; None for float.
        float_bytes: size of a float, scales included.
    """
    if scheme is None:
        return {"float": float_bytes * math.prod(shape)}
    parts = {part: math.prod(size) for part, size in packed_shapes(shape[0], math.prod(shape[1:]), scheme).items()}
    if scheme.activations == INT8:
        return {"turned_codes": parts["codes"], "scales": _COLUMN_SCALE * parts["scales"]}
    return parts | {"scales": parts["scales"] * float_bytes}
