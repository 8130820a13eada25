"""Which task a checkpoint can be exported for, its labels and tensors, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from exaone_export import cli
from model.bundle import DECODER, EMBEDDING, VISION_ENCODER
from model.config import load_config, parse_config
from model.errors import CheckpointError, UsageError
from model.tasks import TASKS, architecture_of, choose_task, graphs_of, possible_tasks
from model.weights import expected_tensors, published
from tests import tiny
from tests.tiny import make_task_checkpoint, save_tensors

TEXT = {
    "Exaone4ForCausalLM": ["text-generation", "feature-extraction"],
    "Exaone4Model": ["feature-extraction"],
    "Exaone4ForSequenceClassification": ["text-classification", "feature-extraction"],
    "Exaone4ForTokenClassification": ["token-classification", "feature-extraction"],
    "Exaone4ForQuestionAnswering": ["question-answering", "feature-extraction"],
}
MULTIMODAL = {
    "Exaone4_5_ForConditionalGeneration": ["image-text-to-text", "feature-extraction", "image-feature-extraction"],
    "Exaone4_5_Model": ["feature-extraction", "image-feature-extraction"],
}


def classifier(**changes: Any) -> dict[str, Any]:
    return tiny.make_config("hybrid", architectures=["Exaone4ForSequenceClassification"], **changes)


@pytest.mark.parametrize(("architecture", "tasks"), [*TEXT.items(), *MULTIMODAL.items()])
def test_every_architecture_with_every_task(architecture: str, tasks: list[str]) -> None:
    vision = architecture in MULTIMODAL
    assert list(possible_tasks(architecture, vision=vision)) == tasks
    assert choose_task("auto", architecture, vision=vision) == tasks[0]
    for task in TASKS:
        if task in tasks:
            assert choose_task(task, architecture, vision=vision) == task
            continue
        with pytest.raises(UsageError, match=f"{architecture} does no {task}.*Possible: auto, {', '.join(tasks)}"):
            choose_task(task, architecture, vision=vision)


def test_a_past_is_for_generation() -> None:
    assert choose_task("text-generation-with-past", "Exaone4ForCausalLM", vision=False) == "text-generation"
    with pytest.raises(UsageError, match="feature-extraction needs no past"):
        choose_task("feature-extraction-with-past", "Exaone4ForCausalLM", vision=False)
    with pytest.raises(UsageError, match="there is no task 'poetry'"):
        choose_task("poetry", "Exaone4ForCausalLM", vision=False)


@pytest.mark.parametrize("named", [None, "SomethingElse", "Exaone4_5_Model"])
def test_an_unknown_architecture_generates(named: str | None) -> None:
    assert architecture_of(named, vision=False) == "Exaone4ForCausalLM"
    assert architecture_of(None, vision=True) == "Exaone4_5_ForConditionalGeneration"


def test_the_architecture_is_the_configurations() -> None:
    for listed in (["Exaone4Model"], ["Exaone4Model", "Other"]):
        assert parse_config(tiny.make_config("dense", architectures=listed)).task == "feature-extraction"
    for odd in (None, [], "Exaone4Model", [3]):
        assert parse_config(tiny.make_config("dense", architectures=odd)).task == "text-generation"
    assert parse_config(tiny.make_config("vlm")).task == "image-text-to-text"


def test_graphs_of_a_task() -> None:
    assert graphs_of("text-classification", vision=False) == (DECODER,)
    assert graphs_of("feature-extraction", vision=True) == (VISION_ENCODER, EMBEDDING, DECODER)
    assert graphs_of("image-feature-extraction", vision=True) == (VISION_ENCODER,)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_labels": 5},
        {"id2label": {"0": "no", "1": "yes", "2": "perhaps"}},
        {"id2label": {"1": "yes", "0": "no"}, "num_labels": 2},
        {"num_labels": 1, "problem_type": "regression"},
        {"problem_type": "multi_label_classification"},
    ],
)
def test_labels_are_read_as_transformers_reads_them(changes: dict[str, Any]) -> None:
    raw = classifier(**changes)
    known = transformers.Exaone4Config(**{key: value for key, value in raw.items() if key != "model_type"})
    labels = parse_config(raw).labels
    assert list(labels.names) == [known.id2label[i] for i in range(known.num_labels)]
    assert labels.problem_type == known.problem_type
    assert parse_config(known.to_dict()).labels == labels  # whose keys are numbers


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_labels": 0}, "num_labels"),
        ({"num_labels": "two"}, "num_labels"),
        ({"id2label": {}}, "id2label"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 7}, "num_labels"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"id2label": {"0": "a", "2": "c"}}, "id2label"),
        ({"id2label": {"0": "a", "1": None}}, "id2label"),
        ({"problem_type": "guessing"}, "problem_type"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "problem_type"),
        ({"token_classification_bias": "no"}, "token_classification_bias"),
    ],
)
def test_labels_that_make_no_sense(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        parse_config(classifier(**changes))
    raw = tiny.make_config("hybrid", **changes)  # a model without labels does not care
    assert parse_config(raw).labels.names == ("LABEL_0", "LABEL_1")


def test_tensors_are_called_as_in_the_file() -> None:
    assert published("decoder.score.bias", True, "Exaone4ForTokenClassification") == "score.bias"
    assert published("decoder.norm.weight", True, "Exaone4ForQuestionAnswering") == "transformer.norm.weight"
    assert published("decoder.qa_outputs.weight", True, "Exaone4ForQuestionAnswering") == "qa_outputs.weight"
    assert published("decoder.norm.weight", True, "Exaone4Model") == "norm.weight"
    assert published("vision_encoder.merger.ln_q.weight", False, "Exaone4_5_Model") == "visual.merger.ln_q.weight"


def without(folder: Path, *names: str, **changed: tuple[int, ...]) -> Path:
    """The checkpoint without some tensors, and with others of another shape."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    for name, shape in changed.items():
        tensors[name.replace("__", ".")] = tensors[name.replace("__", ".")][: shape[0]]
    save_tensors(folder, tensors)
    return folder


def refusal(folder: Path, task: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["export", str(folder), str(folder.parent / "out"), "--task", task, "--quiet"])
    told = capsys.readouterr().err.strip()
    assert 1 <= len(told.splitlines()) <= 3
    assert not (folder.parent / "out").exists()
    return code, told


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("Exaone4ForSequenceClassification", "score.weight"),
        ("Exaone4ForTokenClassification", "score.bias"),
        ("Exaone4ForQuestionAnswering", "qa_outputs.bias"),
        ("Exaone4ForQuestionAnswering", "transformer.norm.weight"),
        ("Exaone4Model", "norm.weight"),
    ],
)
def test_a_missing_head_is_named(
    architecture: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without(make_task_checkpoint(tmp_path / "source", "dense", architecture), name)
    code, told = refusal(folder, "auto", capsys)
    assert code == 3
    assert f"missing tensors: {name}" in told


def test_weights_of_another_number_of_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_task_checkpoint(tmp_path / "source", "dense", "Exaone4ForSequenceClassification", labels=5)
    code, told = refusal(without(folder, score__weight=(3,)), "auto", capsys)
    assert code == 3
    assert "score.weight" in told
    assert "[3, 64]" in told
    assert "[5, 64]" in told


def test_a_head_that_the_architecture_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_task_checkpoint(tmp_path / "source", "hybrid", "Exaone4ForTokenClassification")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Exaone4ForQuestionAnswering"]}
    (folder / "config.json").write_text(json.dumps(config))
    code, told = refusal(folder, "auto", capsys)
    assert code == 3
    assert "qa_outputs" in told or "score.weight" in told


@pytest.mark.parametrize("task", ["poetry", "text-generation", "feature-extraction-with-past", ""])
def test_tasks_that_cannot_be(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_task_checkpoint(tmp_path / "source", "dense", "Exaone4ForSequenceClassification")
    code, told = refusal(folder, task, capsys)
    assert code == 2
    assert "--task" in told
    assert "Possible: auto, text-classification, feature-extraction" in told


def test_only_what_the_task_needs_is_asked_for(tmp_path: Path) -> None:
    from dataclasses import replace

    config = load_config(tiny.make_checkpoint(tmp_path / "vlm", "vlm"))
    whole = set(expected_tensors(config, draft=True))
    features = set(expected_tensors(replace(config, task="feature-extraction"), draft=True))
    images = set(expected_tensors(replace(config, task="image-feature-extraction"), draft=True))
    assert images < features < whole
    assert {name.partition(".")[0] for name in whole - features} == {"mtp", "decoder"}
    assert {name.partition(".")[0] for name in images} == {"vision_encoder"}
