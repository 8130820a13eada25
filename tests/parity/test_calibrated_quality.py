"""Calibration helps where it should: the demonstration checkpoint in 4 bits, on prompts it was not calibrated on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from exaone_export.calibration.encode import load_prompts
from exaone_export.demo import checkpoint_folder
from exaone_export.quality import eager_logits
from exaone_export.samples import Sample, load_samples
from model.exaone import Exaone
from model.load import load_exaone
from model.progress import NullProgress
from quantize.calibration.job import Calibration
from quantize.calibration.prompts import PromptSet
from quantize.recipe import Recipe, Rule
from quantize.scheme import Scheme
from tests import calibrating

CHECKPOINT = checkpoint_folder()


def recipe(method: str) -> Recipe:
    """Layers in 4 bits by a method; what is around them in 8, always the same."""
    rules = (
        Rule("vision_encoder.*", None),
        Rule("*.embed_tokens", Scheme(8, 32)),
        Rule("*.lm_head", Scheme(8, 32)),
        Rule("mtp.*", None),
        Rule("*", Scheme(4, 128, symmetric=False, method=method)),
    )
    return Recipe(method, rules)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return load_samples(CHECKPOINT, calibrating.opened(CHECKPOINT).config, None)[::5]


@pytest.fixture(scope="module")
def expected(samples: list[Sample]) -> list[torch.Tensor]:
    return log_probabilities(load_exaone(CHECKPOINT), samples)


def log_probabilities(model: Exaone, samples: list[Sample]) -> list[torch.Tensor]:
    return [torch.from_numpy(eager_logits(model, sample)).double().log_softmax(-1) for sample in samples]


def divergence(method: str, folder: Path, samples: list[Sample], expected: list[torch.Tensor]) -> float:
    """Mean KL divergence of the quantized model's next token from the float model's, in nats."""
    whole = load_prompts(CHECKPOINT, None)
    calibration = Calibration(PromptSet("some", whole.prompts[::4], whole.media))
    known = calibrating.opened(CHECKPOINT, recipe(method), calibration)
    calibration.prepare(folder, known.config, known.refs, NullProgress())
    model = load_exaone(CHECKPOINT)
    with torch.no_grad():
        for path, values in calibrating.quantized_weights(calibration, known):
            model.get_parameter(f"{path}.weight").copy_(torch.from_numpy(values))
    found = log_probabilities(model, samples)
    each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(expected, found, strict=True)]
    return float(torch.cat(each).mean())


def test_gptq_diverges_less_than_search(tmp_path: Path, samples: list[Sample], expected: list[torch.Tensor]) -> None:
    figures = {method: divergence(method, tmp_path / method, samples, expected) for method in ("search", "gptq")}
    assert all(np.isfinite(list(figures.values())))
    assert 0 < figures["gptq"] < 0.85 * figures["search"], figures
