"""What a checkpoint would become, told from its configuration and the headers of its files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from exaone_export.forecast import Forecast, forecast, interface
from exaone_export.inspection import GraphSummary, Inspection, Outlook, chosen_contexts
from exaone_export.memory_need import Machine, largest_image
from model.config import ExaoneConfig, load_config
from model.source import WeightSource
from model.weights import Checkpoint
from quantize.blocks import imported_scheme
from quantize.recipe import load_recipe

# What export makes by default for the CPU, and what suits a device.
_MACHINES = {"fp32": Machine("cpu", 4), "fp16": Machine("cuda", 2)}


def inspect_checkpoint(folder: Path, context: int | None) -> Inspection:
    """Describes a checkpoint; arguments and errors as of `exaone_export.inspection.inspect`."""
    config = load_config(folder)
    contexts = chosen_contexts(config, context)
    checkpoint = Checkpoint.open(folder, ignore_extra=True)
    bound = checkpoint.bind(config, compare=False)
    by_type, total = _stored(bound)
    parameters = sum(by_type.values())
    draft = checkpoint.has_draft_head and config.mtp is not None
    shapes = {name: ref.shape for name, ref in bound.items()}
    kept = {name: imported_scheme(ref, fill="embed_tokens" not in name) for name, ref in bound.items()}
    schemes = {name: scheme for name, scheme in kept.items() if scheme is not None}
    forecasts = {
        dtype: forecast(config, shapes, schemes, machine.float_bytes, machine.target)
        for dtype, machine in _MACHINES.items()
    }
    pixels = largest_image(folder)
    outlooks = {
        machine.target: _outlooks(config, forecasts[dtype], parameters, contexts, (dtype, machine, pixels))
        for dtype, machine in _MACHINES.items()
    }
    cache, plain = _MACHINES["fp32"].cache(config), outlooks["cpu"]["none"]
    return Inspection(
        model_type=config.model_type,
        task=config.task,
        graphs=tuple(
            GraphSummary(name, f"{name}.onnx", size, *interface(name, config, draft))
            for name, size in forecasts["fp32"].graphs.items()
        ),
        bits_per_weight=8 * total / max(1, parameters),
        quantized=by_type,
        parameters=parameters,
        bytes=sum(path.stat().st_size for path in checkpoint.files),
        kv_bytes_per_token=cache.per_token,
        kv_window_bytes=cache.window_tokens * cache.window_per_token,
        kv_bytes={n: need.kv for n, need in plain.memory.items()},
        memory_bytes={n: need.total for n, need in plain.memory.items()},
        outlooks=outlooks,
        predicted_bytes={recipe: outlook.bytes for recipe, outlook in outlooks["cpu"].items()},
        quantization=config.quantization.method if config.quantization is not None else "none",
        left_out=checkpoint.left_out(config),
    )


def _stored(bound: Mapping[str, WeightSource]) -> tuple[dict[str, int], int]:
    """Type → number of weights, and the bytes of all; shared ones count once."""
    by_type: dict[str, int] = {}
    stored = {(ref.file, ref.offset): ref for ref in bound.values()}.values()
    for ref in stored:
        label = ref.label or ref.dtype.lower()
        by_type[label] = by_type.get(label, 0) + math.prod(ref.shape)
    return by_type, sum(part.nbytes for ref in stored for part in ref.parts)


def _outlooks(
    config: ExaoneConfig,
    expected: Forecast,
    parameters: int,
    contexts: Sequence[int],
    place: tuple[str, Machine, int],
) -> dict[str, Outlook]:
    """Recipe → what its bundle takes, where there are kernels for it; `place`: its dtype, machine and largest image."""
    dtype, machine, pixels = place
    return {
        recipe: Outlook(
            dtype=dtype,
            bytes=weights.total,
            bits_per_weight=8 * weights.stored / max(1, parameters),
            memory={n: machine.need(weights, config, n, pixels) for n in contexts},
        )
        for recipe, weights in expected.recipes.items()
        if recipe == "none" or machine.target == "cpu" or load_recipe(recipe).cpu_rule is None
    }
