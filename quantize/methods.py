"""The quantization methods by the name a recipe calls them."""

from __future__ import annotations

from collections.abc import Mapping

from quantize import rtn, search
from quantize.scheme import Method

METHODS: Mapping[str, Method] = {
    "rtn": rtn.quantize,
    "search": search.quantize,
}
