"""The export configurations as optimum sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from optimum.exporters.tasks import TasksManager

from exporter.optimum_configs import Exaone4_5OnnxConfig, Exaone4OnnxConfig
from model.bundle import past_key, past_value, present_key, present_value
from model.errors import UsageError


def small_text() -> dict[str, Any]:
    return {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip


def small_multimodal() -> Any:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_key_value_heads": 1,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32,
    }  # fmt: skip
    return transformers.Exaone4_5_Config(
        text_config={**small_text(), "model_type": "exaone4_5_text"},
        vision_config=vision, image_token_id=90, video_token_id=91,
        vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip


def constructor(model_type: str, task: str) -> Callable[..., Any]:
    made: Callable[..., Any] = TasksManager.get_exporter_config_constructor(
        "onnx", model_type=model_type, task=task, library_name="transformers"
    )
    return made


@pytest.mark.parametrize(
    ("model_type", "task", "kind"),
    [
        ("exaone4", "text-generation", Exaone4OnnxConfig),
        ("exaone4", "text-generation-with-past", Exaone4OnnxConfig),
        ("exaone4_5", "image-text-to-text", Exaone4_5OnnxConfig),
        ("exaone4_5", "image-text-to-text-with-past", Exaone4_5OnnxConfig),
        ("exaone4", "feature-extraction", Exaone4OnnxConfig),
        ("exaone4", "text-classification", Exaone4OnnxConfig),
        ("exaone4", "token-classification", Exaone4OnnxConfig),
        ("exaone4", "question-answering", Exaone4OnnxConfig),
        ("exaone4_5", "feature-extraction", Exaone4_5OnnxConfig),
    ],
)
def test_optimum_finds_the_configurations(model_type: str, task: str, kind: type) -> None:
    config = transformers.Exaone4Config(**small_text()) if model_type == "exaone4" else small_multimodal()
    found: Any = constructor(model_type, task)(config)
    assert found.task == task.replace("-with-past", "")
    assert type(found) is kind


def test_text_model() -> None:
    config = constructor("exaone4", "text-generation-with-past")(transformers.Exaone4Config(**small_text()))
    layers = [name for layer in range(2) for name in (past_key(layer), past_value(layer))]
    assert list(config.inputs) == ["input_ids", "attention_mask", *layers, "logits_to_keep"]
    assert config.inputs[past_key(1)] == {0: "batch_size", 2: "past_sequence_length"}
    assert config.inputs[past_key(0)] == config.outputs[present_key(0)] == {0: "batch_size", 2: "window_cache_length"}
    assert list(config.outputs) == [
        "logits",
        *(name for layer in range(2) for name in (present_key(layer), present_value(layer))),
    ]
    inputs = config.generate_dummy_inputs(
        "pt", batch_size=3, sequence_length=5, past_sequence_length=7, window_cache_length=9
    )
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (3, 5),
        "attention_mask": (3, 12),
        **dict.fromkeys(layers[:2], (3, 2, 9, 8)),
        **dict.fromkeys(layers[2:], (3, 2, 7, 8)),
        "logits_to_keep": (1,),
    }


def test_where_windows_are_kept() -> None:
    text = small_text() | {"layer_types": ["full_attention", "sliding_attention"]}

    def past(**options: Any) -> list[str]:
        config = Exaone4OnnxConfig(transformers.Exaone4Config(**text), **options)
        return [config.inputs[past_key(layer)][2] for layer in range(2)]

    assert past() == ["past_sequence_length", "window_cache_length"]
    assert past(window_cache=False) == ["past_sequence_length"] * 2
    # A window of the whole context saves nothing.
    text["sliding_window"] = 64
    assert past() == ["past_sequence_length"] * 2
    draft = Exaone4_5OnnxConfig(small_multimodal(), graph="mtp")
    assert draft.inputs[past_value(0)][2] == "window_cache_length"


@pytest.mark.parametrize("graph", Exaone4_5OnnxConfig.GRAPH_NAMES)
def test_multimodal_graphs_have_an_input_for_every_name(graph: str) -> None:
    config = Exaone4_5OnnxConfig(small_multimodal(), graph=graph, float_dtype="fp16")
    inputs = config.generate_dummy_inputs("pt")
    assert list(inputs) == list(config.inputs)
    assert {value.dtype for value in inputs.values()} <= {torch.int64, torch.float16}
    for name, axes in config.inputs.items():
        assert all(axis < inputs[name].dim() for axis in axes)


def test_placeholders_match_the_features() -> None:
    config = Exaone4_5OnnxConfig(small_multimodal(), graph="embedding")
    inputs = config.generate_dummy_inputs("pt", batch_size=2, sequence_length=8, image_tokens=11)
    assert int((inputs["input_ids"] >= 90).logical_and(inputs["input_ids"] <= 91).sum()) == 11
    assert tuple(inputs["image_features"].shape) == (11, 32)


def test_a_text_model_has_no_vision_encoder() -> None:
    with pytest.raises(UsageError, match="vision_encoder"):
        Exaone4OnnxConfig(transformers.Exaone4Config(**small_text()), graph="vision_encoder")


def test_image_features_are_a_synonym_for_optimum() -> None:
    assert TasksManager.map_from_synonym("image-feature-extraction") == "feature-extraction"
    config = Exaone4_5OnnxConfig(small_multimodal(), "image-feature-extraction", graph="vision_encoder")
    assert list(config.outputs) == ["image_features"]


@pytest.mark.parametrize(
    ("task", "outputs"),
    [
        ("feature-extraction", {"last_hidden_state": {0: "batch_size", 1: "sequence_length"}}),
        ("text-classification", {"logits": {0: "batch_size"}}),
        ("token-classification", {"logits": {0: "batch_size", 1: "sequence_length"}}),
        (
            "question-answering",
            {name: {0: "batch_size", 1: "sequence_length"} for name in ("start_logits", "end_logits")},
        ),
    ],
)
def test_graphs_without_a_past(task: str, outputs: dict[str, dict[int, str]]) -> None:
    config = constructor("exaone4", task)(transformers.Exaone4Config(**small_text()))
    tokens = {0: "batch_size", 1: "sequence_length"}
    assert config.inputs == {"input_ids": tokens, "attention_mask": tokens}
    assert config.outputs == outputs
    inputs = config.generate_dummy_inputs("pt", batch_size=3, sequence_length=5, past_sequence_length=7)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == dict.fromkeys(config.inputs, (3, 5))


def test_tasks_that_a_model_does_not_have() -> None:
    with pytest.raises(UsageError, match="text-classification"):
        Exaone4_5OnnxConfig(small_multimodal(), "text-classification")
    with pytest.raises(ValueError, match="feature-extraction-with-past"):
        constructor("exaone4", "feature-extraction-with-past")
