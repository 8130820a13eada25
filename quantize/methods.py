"""The quantization methods by the name a recipe calls them."""

from __future__ import annotations

from collections.abc import Mapping

from quantize import awq, gptq, hqq, rtn, search
from quantize.scheme import Method

METHODS: Mapping[str, Method] = {
    "rtn": rtn.quantize,
    "search": search.quantize,
    "hqq": hqq.quantize,
    "gptq": gptq.quantize,
    "awq": awq.quantize,
    "awq-gptq": gptq.quantize_scaled,
}

# What of `quantize.scheme.Statistics` a method has to be given.
NOTHING, MEAN_SQUARE, HESSIAN = "none", "mean_square", "hessian"
# Without it, a method raises UsageError.
NEEDS: Mapping[str, str] = {
    "rtn": NOTHING,
    "search": NOTHING,
    "hqq": NOTHING,
    "gptq": HESSIAN,
    "awq": MEAN_SQUARE,
    "awq-gptq": HESSIAN,
}
# What it makes use of where there is any.
USES: Mapping[str, str] = {**NEEDS, "search": MEAN_SQUARE}
# These also need the input scale that `awq.input_scale` chooses, and the Mul of `nodes.scale_inputs`.
SCALED = frozenset({"awq", "awq-gptq"})
