"""Whether an export is calibrated, and on what."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UsageError
from quantize.calibration.job import Calibration, uses_calibration
from quantize.recipe import Recipe

if TYPE_CHECKING:
    from quantize.apply import Quantizer

log = logging.getLogger("exaone_export.quantize")
_OPTION = "--calibration"


def take_calibration(options: dict[str, Any], recipe: Recipe | None, *, planned: bool = False) -> Path | None:
    """Takes the file of prompts out of the options, after what can be said of it at once.

    Args:
        options: `calibration`, which is taken, and `low_disk`, which stays.
        recipe: None for none.
        planned: whether a recipe will be planned.

    Returns:
        None where the user named none.

    Raises:
        UsageError: the file is not there, nothing in the recipe uses it, or weights would have to be fetched twice.
    """
    given = options.pop("calibration", None)
    file = None if given is None else Path(given)
    if file is not None and not file.is_file():
        raise UsageError("cannot calibrate", str(file), "no such file", "Give a file with one JSON object on each line")
    if file is not None and not planned and (recipe is None or not uses_calibration(recipe, needs=False)):
        name = "none" if recipe is None else recipe.name
        why = f"no method of recipe {name} looks at what goes into a weight"
        raise UsageError("cannot calibrate", _OPTION, why, "Leave it out, or use a recipe with search, gptq or awq")
    calibrates = file is not None or (recipe is not None and uses_calibration(recipe, needs=True))
    if calibrates and options.get("low_disk"):
        why = "calibrating reads every weight before the first one is written"
        raise UsageError("cannot calibrate", "--low-disk", why, "Leave it out, or use a recipe without gptq and awq")
    return file


def refuse_uncalibrated(recipe: Recipe) -> None:
    """Refuses a recipe for a float bundle, whose model cannot be run layer by layer.

    Raises:
        UsageError: one of its methods does not work without calibration.
    """
    methods = uses_calibration(recipe, needs=True)
    if methods:
        why = f"its method {methods[0]} looks at what goes into a weight, for which the checkpoint is needed"
        remedy = (
            "Use export SOURCE OUT --quantize with this recipe, with --calibration FILE.jsonl for prompts of your own"
        )
        raise UsageError("cannot quantize", f"recipe {recipe.name[:60]}", why, remedy)


def calibrated(transform: Quantizer, folder: Path, file: Path | None) -> Quantizer:
    """A quantizer with prompts, where it has a use for them.

    Args:
        transform: with a recipe or without.
        folder: the checkpoint, for its tokenizer, chat template and preprocessor configuration.
        file: of prompts; None takes our own, and those only for methods that do not work without.

    Raises:
        UsageError: a prompt cannot be used, or the checkpoint has no tokenizer.
    """
    recipe = transform.recipe
    if recipe is None or not uses_calibration(recipe, needs=file is None):
        return transform
    from exaone_export.calibration.encode import load_prompts

    prompts = load_prompts(folder, file)
    if file is None:
        log.warning(
            "recipe %s needs calibration: the %d prompts of the default set are used; --calibration takes your own",
            recipe.name, len(prompts.prompts),
        )  # fmt: skip
    return replace(transform, calibration=Calibration(prompts))
