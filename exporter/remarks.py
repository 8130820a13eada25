"""What a bundle's manifest says about the checkpoint's tensors: types, quantization, and which were left out.

It stands under the manifest's ``source``, from where the notes are made: a bundle that is quantized later says the same
as one that is quantized while exporting.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from model.config import ExaoneConfig
from model.errors import printable
from model.source import WeightSource
from model.weights import Checkpoint

DTYPES, LEFT_OUT, QUANTIZATION = "dtypes", "left_out", "quantization"
CALIBRATION = "calibration"  # which prompts a transform looked at; its own entry
MOST_NAMES = 1000  # listed of each kind
log = logging.getLogger("exaone_export.exporter")
_REASONS = {
    "extra": "left out on request, no part of the model",
    "draft_head": "left out, of a draft head that config.json does not describe",
    "activation_scales": "that only quantized activations or caches need were left out",
}


def describe_tensors(
    checkpoint: Checkpoint, config: ExaoneConfig, bound: Mapping[str, WeightSource]
) -> dict[str, dict[str, Any]]:
    """Entries for the manifest's ``source``; what is noteworthy is also logged as a warning.

    Returns:
        "dtypes": type → number of weights that are stored so. "left_out", where there are any: kind (see
        `Checkpoint.left_out`) → "count" of tensors, and their "names", at most `MOST_NAMES`. "quantization", of a
        quantized checkpoint: "weights", how they are stored → number, and whether "activations" were quantized too.
    """
    sources = {source.name: source for source in bound.values()}
    types = Counter(source.parts[0].dtype for source in sources.values())
    described: dict[str, dict[str, Any]] = {DTYPES: dict(sorted(types.items()))}
    labels = Counter(source.label for source in sources.values() if source.label)
    if labels and config.quantization is not None:
        activations = config.quantization.activations
        described[QUANTIZATION] = {"weights": dict(sorted(labels.items())), "activations": activations}
    left_out = checkpoint.left_out(config)
    if left_out:
        described[LEFT_OUT] = {
            kind: {"count": len(names), "names": [printable(name) for name in names[:MOST_NAMES]]}
            for kind, names in left_out.items()
        }
    for note in source_notes(described):
        log.warning("%s", note)
    return described


def source_notes(source: Mapping[str, Any]) -> tuple[str, ...]:
    """What users should know of the tensors, one sentence each, from a manifest's ``source``."""
    notes = []
    floats = {dtype: count for dtype, count in source.get(DTYPES, {}).items() if dtype in ("F32", "F16", "BF16")}
    if len(floats) > 1:
        listed = ", ".join(f"{count} of {dtype}" for dtype, count in floats.items())
        notes.append(f"The checkpoint mixes types: its tensors are {listed}.")
    if QUANTIZATION in source:
        listed = ", ".join(f"{count} as {label}" for label, count in source[QUANTIZATION]["weights"].items())
        notes.append(f"The checkpoint is quantized: of its weights, {listed}.")
        if source[QUANTIZATION]["activations"]:
            notes.append("The checkpoint is meant for quantized activations or caches; the bundle does not round them.")
    if CALIBRATION in source:
        entry = source[CALIBRATION]
        counts = f"{entry['text_tokens']} tokens of text and {entry['image_tokens']} of images"
        notes.append(f"Calibrated on {entry['prompts']} prompts ({printable(str(entry['name']), 80)}) with {counts}.")
    for kind, entry in source.get(LEFT_OUT, {}).items():
        count, names = entry["count"], entry["names"]
        shown = ", ".join(names[:3]) + (f" and {count - 3} more" if count > 3 else "")
        notes.append(f"{count} tensor{'s' * (count > 1)} {_REASONS[kind]}: {shown}.")
    return tuple(notes)
