"""The heads of every task in eager PyTorch, loaded from what transformers saves, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.load import load_encoder
from tests import task_oracle, tiny
from tests.task_oracle import SMALL_DENSE, SMALL_HYBRID, SMALL_VLM, WINDOW, Arrays, outputs, padded, save, task_model

RAW = {"hybrid": SMALL_HYBRID, "dense": SMALL_DENSE}
ARCHITECTURES = {
    "feature-extraction": "Exaone4Model",
    "text-classification": "Exaone4ForSequenceClassification",
    "token-classification": "Exaone4ForTokenClassification",
    "question-answering": "Exaone4ForQuestionAnswering",
}
TOLERANCE = 1e-5


def ours(folder: Path, task: str, inputs: Arrays) -> list[np.ndarray]:
    encoder = load_encoder(folder, task).decoder
    assert encoder is not None
    found = encoder(*(torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask")))
    return [value.numpy() for value in (found if isinstance(found, tuple) else (found,))]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], mask: np.ndarray) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        kept = mask.astype(bool) if theirs.shape[:2] == mask.shape else slice(None)
        assert np.abs(theirs[kept]).max() > 0.5
        np.testing.assert_allclose(ours[kept], theirs[kept], atol=TOLERANCE)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", ARCHITECTURES)
@pytest.mark.parametrize("kind", RAW)
def test_heads(kind: str, task: str, side: str, tmp_path: Path) -> None:
    model = task_model(ARCHITECTURES[task], RAW[kind], num_labels=3)
    folder = save(model, tmp_path / "saved")
    inputs = padded([3, WINDOW + 2, 5 * WINDOW, 1], side)
    expected = list(outputs(model, **inputs).values())
    assert_close(ours(folder, task, inputs), expected, inputs["attention_mask"])


@pytest.mark.parametrize("labels", [1, 2, 7])
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_numbers_of_labels(task: str, labels: int, tmp_path: Path) -> None:
    model = task_model(ARCHITECTURES[task], SMALL_DENSE, num_labels=labels)
    inputs = padded([4, 9])
    [logits] = ours(save(model, tmp_path / "saved"), task, inputs)
    assert logits.shape[-1] == labels
    assert_close([logits], [outputs(model, **inputs)["logits"]], inputs["attention_mask"])


def test_token_classifier_without_bias(tmp_path: Path) -> None:
    model = task_model("Exaone4ForTokenClassification", SMALL_DENSE, token_classification_bias=False)
    assert model.score.bias is None
    inputs = padded([4, 9])
    found = ours(save(model, tmp_path / "saved"), "token-classification", inputs)
    assert_close(found, [outputs(model, **inputs)["logits"]], inputs["attention_mask"])


@pytest.mark.parametrize(
    "ids",
    [
        [[200, 0, 201, 0, 0]],  # the padding's id inside the text, and at its end
        [[0, 0, 0, 0, 0]],  # nothing else
        [[0, 200, 201, 202, 203], [200, 201, 202, 0, 0]],
        [[200, 201, 202, 203, 204]],
    ],
)
def test_last_token_that_is_not_padding(ids: list[list[int]], tmp_path: Path) -> None:
    model = task_model("Exaone4ForSequenceClassification", SMALL_HYBRID)
    inputs = {"input_ids": np.array(ids), "attention_mask": np.ones_like(ids)}
    found = ours(save(model, tmp_path / "saved"), "text-classification", inputs)
    np.testing.assert_allclose(found[0], outputs(model, **inputs)["logits"], atol=TOLERANCE)


def test_last_column_without_a_padding_token(tmp_path: Path) -> None:
    model = task_model("Exaone4ForSequenceClassification", SMALL_DENSE, pad_token_id=None)
    inputs = padded([7])
    found = ours(save(model, tmp_path / "saved"), "text-classification", inputs)
    np.testing.assert_allclose(found[0], outputs(model, **inputs)["logits"], atol=TOLERANCE)
    with pytest.raises(ValueError, match="no padding token"):
        outputs(model, **padded([7, 7]))  # which is why the runtime refuses it


@pytest.mark.parametrize("architecture", ["Exaone4ForCausalLM", *ARCHITECTURES.values()])
def test_features_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    model = task_model(architecture, SMALL_HYBRID)
    inputs = padded([4, 9])
    expected = outputs(getattr(model, model.base_model_prefix, model), **inputs)["last_hidden_state"]
    found = ours(save(model, tmp_path / "saved"), "feature-extraction", inputs)
    assert_close(found, [expected], inputs["attention_mask"])


@pytest.mark.parametrize("architecture", ["Exaone4_5_Model", "Exaone4_5_ForConditionalGeneration"])
def test_multimodal_features(architecture: str, tmp_path: Path) -> None:
    model = task_model(architecture, SMALL_VLM)
    base = getattr(model, "model", model) if architecture.endswith("Generation") else model
    loaded = load_encoder(save(model, tmp_path / "saved"), "feature-extraction")
    assert loaded.vision_encoder is not None
    assert loaded.embedding is not None
    assert loaded.decoder is not None
    grid = torch.tensor([[1, 4, 6]])
    pixels = torch.randn(24, 1176, generator=torch.Generator().manual_seed(0))
    inputs = padded([12, 20], "left")
    inputs["input_ids"][1, 3:9] = tiny.SPECIAL["<|image_pad|>"]
    features = loaded.vision_encoder(pixels, grid)
    embeds = loaded.embedding(torch.from_numpy(inputs["input_ids"]), features)
    found = loaded.decoder(embeds, torch.from_numpy(inputs["attention_mask"]))
    expected = outputs(base, **inputs, pixel_values=pixels, image_grid_thw=grid)["last_hidden_state"]
    assert_close([found.numpy()], [expected], inputs["attention_mask"])


def test_own_checkpoints_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    import transformers

    for kind, architecture in [*((k, a) for k in RAW for a in ARCHITECTURES.values()), ("vlm", "Exaone4_5_Model")]:
        folder = tiny.make_task_checkpoint(tmp_path / f"{kind}-{architecture}", kind, architecture)
        found: Any = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)[1]
        assert not any(found.values()), (kind, architecture, found)


def test_oracle_is_random_everywhere() -> None:
    model = task_oracle.task_model("Exaone4ForTokenClassification", SMALL_DENSE)
    assert all(float(parameter.std()) > 0.01 for parameter in model.parameters())
