"""Prompts of random ids and pixels, and graphs with lazy weights: tiny checkpoints are calibrated without tracing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporter.bind import bind
from exporter.export import ExportOptions
from model.config import ExaoneConfig, load_config
from model.source import WeightSource
from model.weights import Checkpoint
from quantize.apply import quantize_models
from quantize.calibration.job import Calibration
from quantize.calibration.plan import Plan
from quantize.calibration.prompts import Prompt, PromptSet
from quantize.calibration.store import INPUT_SCALE, StoredWeight
from quantize.methods import SCALED
from quantize.recipe import Recipe
from quantize.report import QuantizationReport
from quantize.scheme import AnyArray, Floats
from tests.declared import declare_readers

GRIDS = ((1, 4, 6), (1, 10, 4))


@dataclass(frozen=True)
class Opened:
    """A checkpoint as the exporter has it before it writes."""

    config: ExaoneConfig
    refs: Mapping[str, WeightSource]
    models: dict[str, ir.Model]
    report: QuantizationReport | None = None


def random_prompts(config: ExaoneConfig, lengths: tuple[int, ...] = (9, 30, 17), seed: int = 0) -> PromptSet:
    """Random ids; where the model sees, the second prompt has two images."""
    rng = np.random.default_rng(seed)
    prompts = []
    for number, length in enumerate(lengths):
        ids = rng.integers(100, config.text.vocab_size, length)
        if config.vision is None or number != 1:
            prompts.append(Prompt(ids))
            continue
        counts = [t * h * w for t, h, w in GRIDS]
        pixels: Floats = rng.standard_normal((sum(counts), config.vision.patch_dim)).astype(np.float32)
        images = np.full(sum(counts) // 4, config.image_token_id)
        whole = np.concatenate([ids[:5], images, ids[5:]])
        prompts.append(Prompt(whole, np.array(GRIDS), partial(np.asarray, pixels), "random"))
    media = () if config.image_token_id is None else (config.image_token_id,)
    return PromptSet("random", tuple(prompts), media)


def opened(folder: Path, recipe: Recipe | None = None, calibration: Calibration | None = None) -> Opened:
    """A checkpoint with graphs of one node a weight, quantized by a recipe if there is one."""
    config = load_config(folder)
    checkpoint = Checkpoint.open(folder)
    refs = checkpoint.bind(config)
    models = declare_readers(config, checkpoint.has_draft_head, ExportOptions(), None)
    bind(models, refs, config)
    report = None if recipe is None else quantize_models(models, recipe, calibration=calibration)
    return Opened(config, refs, models, report)


def quantized_weights(calibration: Calibration, known: Opened) -> Iterator[tuple[str, Floats]]:
    """Path of every quantized weight, and the float32 [N, K] that its codes stand for."""
    plan = Plan(calibration._weights, known.refs)
    for path, weight in calibration._weights.items():
        if path.endswith("embed_tokens"):
            yield path, plan.rows(path, range(weight.source.shape[0]))
            continue
        parts: dict[str, AnyArray] = {}
        if isinstance(weight, StoredWeight):
            parts |= {part: weight.take(part) for part in weight.shapes}
        else:
            parts |= plan.quantize(path, None)
        if weight.scheme.method in SCALED:
            parts[INPUT_SCALE] = calibration.store.read(path, INPUT_SCALE).view(np.float32)
        yield path, np.concatenate([values for _, values in plan.restored(path, parts)])
