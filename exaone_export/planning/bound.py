"""What `--quantize auto` has to stay within, as users say it."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import sizes
from model.errors import UsageError

AUTO = "auto"
_BITS, _BYTES = "--bits-per-weight", "--max-bytes"


@dataclass(frozen=True)
class Bound:
    """What a bundle may take, in one of two ways, and where the plan is written.

    Attributes:
        file: TOML file for the recipe.
        bits_per_weight: as a manifest counts them: scales, zero points, and what stays float included.
        max_bytes: of the whole bundle.
    """

    file: Path
    bits_per_weight: float | None = None
    max_bytes: int | None = None


def take_bound(options: MutableMapping[str, Any], quantize: object, out: Path) -> Bound | None:
    """Takes what concerns planning out of an export's options; None where nothing is to be planned.

    Args:
        options: of `export`; loses bits_per_weight and max_bytes.
        quantize: as `export` was given it.
        out: the bundle to make; the recipe is written beside it.

    Raises:
        UsageError: a bound without "auto", "auto" without a bound or with two, one that is no size, or the recipe's
            file is there already and nothing is to be replaced.
    """
    bits, size = options.pop("bits_per_weight", None), options.pop("max_bytes", None)
    what = "cannot plan"
    if quantize != AUTO:
        if bits is None and size is None:
            return None
        raise UsageError(what, _BITS if bits is not None else _BYTES, "nothing is planned", "Add --quantize auto")
    if (bits is None) == (size is None):
        why = "there are two bounds" if bits is not None else "there is no bound"
        raise UsageError(what, "--quantize auto", why, f"Give either {_BITS} or {_BYTES}")
    if bits is not None and not (math.isfinite(bits) and 0 < bits <= 32):
        raise UsageError(what, _BITS, f"{bits} is not between 0 and 32")
    if options.get("low_disk"):
        raise UsageError(what, "--low-disk", "planning runs the whole model before anything is written", "Leave it out")
    file = out.with_name(f"{out.name}.recipe.toml")
    if file.exists() and not (options.get("force") or options.get("resume")):
        raise UsageError(what, file.name, "it exists already", f"Use --quantize {file.name}, or --force to plan again")
    return Bound(file, bits, None if size is None else parse_size(size))


def parse_size(size: int | str) -> int:
    """Bytes, of a number of them or of text such as "18GB", "17.5 GiB".

    Raises:
        UsageError: it is no size.
    """
    return sizes.parse_size(size, "cannot plan", _BYTES)
