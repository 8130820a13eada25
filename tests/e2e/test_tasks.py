"""Every task but generation, from the checkpoint that transformers saves to the Python API, against transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import exaone_export as ee
from exaone_export import cli
from model.bundle import read_manifest
from tests.e2e.conftest import Bundles
from tests.task_oracle import SMALL_DENSE, SMALL_HYBRID, SMALL_VLM, WINDOW, outputs, padded, save, task_model
from tests.tiny import SPECIAL

TOLERANCE = 5e-5
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text-classification": ("Exaone4ForSequenceClassification", SMALL_HYBRID, {"num_labels": 7}),
    "token-classification": ("Exaone4ForTokenClassification", SMALL_DENSE, {"num_labels": 3}),
    "question-answering": ("Exaone4ForQuestionAnswering", SMALL_HYBRID, {}),
    "feature-extraction": ("Exaone4Model", SMALL_DENSE, {}),
    "multimodal": ("Exaone4_5_ForConditionalGeneration", SMALL_VLM, {}),
    "image-feature-extraction": ("Exaone4_5_Model", SMALL_VLM, {}),
}
ASKED = {"multimodal": "feature-extraction", "image-feature-extraction": "image-feature-extraction"}
TEXTS = ["It rains.", "하늘은 왜 파랗게 보이나요? " * 3, "x", "The ferry to the island leaves at ten past seven."]


def reference(case: str) -> Any:
    architecture, raw, changes = CASES[case]
    return task_model(architecture, raw, **changes)


def source_of(bundles: Bundles, case: str) -> Path:
    folder = bundles.root / f"task-{case}"
    with bundles.making(folder) as missing:
        if missing:
            save(reference(case), folder)
            Bundles.accept_small_images(folder / "preprocessor_config.json")
    return folder


def bundle_of(bundles: Bundles, case: str, recipe: str = "none") -> Path:
    folder = bundles.root / f"task-{case}-{recipe}"
    origin = source_of(bundles, case) if recipe == "none" else bundle_of(bundles, case)
    with bundles.making(folder) as missing:
        if missing and recipe == "none":
            ee.export(origin, folder, task=ASKED.get(case, "auto"))
        elif missing:
            ee.quantize(origin, folder, recipe=recipe)
    return folder


@pytest.fixture(scope="module")
def opened(bundles: Bundles) -> Iterator[dict[str, ee.Encoder]]:
    """Encoders by case, each loaded when it is first asked for."""

    class Opened(dict[str, ee.Encoder]):
        def __missing__(self, case: str) -> ee.Encoder:
            loaded = ee.load(bundle_of(bundles, case))
            assert isinstance(loaded, ee.Encoder)
            self[case] = loaded
            return loaded

    found = Opened()
    yield found
    for encoder in found.values():
        encoder.close()


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (rows, columns, 3), np.uint8)) for rows, columns in ((56, 140), (84, 56))
    ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "case", ["text-classification", "token-classification", "question-answering", "feature-extraction"]
)
def test_arrays(case: str, side: str, opened: dict[str, ee.Encoder]) -> None:
    model, encoder = reference(case), opened[case]
    for lengths in ([1], [WINDOW - 1], [WINDOW], [WINDOW + 1], [3, 5 * WINDOW, 1, WINDOW + 2]):
        inputs = padded(lengths, side, seed=lengths[0])
        found, expected = encoder.run(**inputs), outputs(model, **inputs)
        assert set(found) == set(expected)
        for name, theirs in expected.items():
            kept = slice(None) if case == "text-classification" else inputs["attention_mask"].astype(bool)
            assert np.isfinite(found[name]).all()
            np.testing.assert_allclose(found[name][kept], theirs[kept], atol=TOLERANCE)


def test_features_of_texts(opened: dict[str, ee.Encoder], bundles: Bundles) -> None:
    pipeline = transformers.pipeline("feature-extraction", model=str(source_of(bundles, "feature-extraction")))
    encoder = opened["feature-extraction"]
    for found, expected in zip(encoder.features(TEXTS), pipeline(TEXTS), strict=True):
        np.testing.assert_allclose(found, np.array(expected)[0], atol=TOLERANCE)
    ids = encoder.requests.tokenizer.encode(TEXTS[0])
    np.testing.assert_array_equal(encoder.features(ids), encoder.features(TEXTS[0]))


def test_features_of_texts_with_images(opened: dict[str, ee.Encoder]) -> None:
    encoder, model, images = opened["multimodal"], reference("multimodal"), pictures()
    texts = ["<vision><|image_pad|></vision>and<vision><|image_pad|></vision>", "no picture at all"]
    found = encoder.features(texts, [images, []])
    processor = encoder.requests.image_processor
    cut = [processor(image) for image in images]
    ids = encoder.requests.tokenizer.encode(texts[0])
    counts = iter([len(pixels) // 4 for pixels, _ in cut])
    pad = SPECIAL["<|image_pad|>"]
    expanded = [i for token in ids for i in ([token] * next(counts) if token == pad else [token])]
    media = {"pixel_values": np.concatenate([p for p, _ in cut]), "image_grid_thw": np.concatenate([g for _, g in cut])}
    expected = outputs(model.model, input_ids=[expanded], **media)["last_hidden_state"]
    np.testing.assert_allclose(found[0], expected[0], atol=TOLERANCE)
    expected = outputs(model.model, input_ids=[encoder.requests.tokenizer.encode(texts[1])])["last_hidden_state"]
    np.testing.assert_allclose(found[1], expected[0], atol=TOLERANCE)
    left = {"input_ids": [[0, 0, *expanded]], "attention_mask": [[0, 0] + [1] * len(expanded)]}
    np.testing.assert_allclose(encoder.run(**left, **media)["last_hidden_state"][0, 2:], found[0], atol=TOLERANCE)


@pytest.mark.parametrize("case", ["multimodal", "image-feature-extraction"])
def test_features_of_images(case: str, opened: dict[str, ee.Encoder]) -> None:
    encoder, images = opened[case], pictures()
    cut = [encoder.requests.image_processor(image) for image in images]
    pixels, grid = (np.concatenate(part) for part in zip(*cut, strict=True))
    with torch.inference_mode():
        expected = reference(case).get_image_features(torch.from_numpy(pixels), torch.from_numpy(grid)).pooler_output
    for found, theirs in zip(encoder.image_features(images), expected, strict=True):
        np.testing.assert_allclose(found, theirs.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(encoder.image_features(images[1]), expected[1].numpy(), atol=TOLERANCE)
    if case == "image-feature-extraction":
        arrays = encoder.run(pixel_values=pixels, image_grid_thw=grid)
        np.testing.assert_allclose(arrays["image_features"], torch.cat(expected).numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("problem", [None, "single_label_classification", "multi_label_classification", "regression"])
def test_labels_of_texts(problem: str | None, opened: dict[str, ee.Encoder], bundles: Bundles) -> None:
    encoder, folder = opened["text-classification"], source_of(bundles, "text-classification")
    config = encoder.graphs.config
    encoder.graphs.config = dataclasses.replace(config, labels=dataclasses.replace(config.labels, problem_type=problem))
    pipeline = transformers.pipeline("text-classification", model=str(folder))
    pipeline.model.config.problem_type = problem
    try:
        for found, expected in zip(encoder.classify(TEXTS), pipeline(TEXTS, top_k=None), strict=True):
            assert [score.label for score in found.scores] == [score["label"] for score in expected]
            assert [score.score for score in found.scores] == pytest.approx([s["score"] for s in expected], abs=1e-5)
            assert (found.label, found.score) == (found.scores[0].label, found.scores[0].score)
        [expected] = pipeline([{"text": TEXTS[0], "text_pair": TEXTS[3]}])
        paired = encoder.classify(TEXTS[0], text_pair=TEXTS[3])
        assert paired.label == expected["label"]
        assert paired.score == pytest.approx(expected["score"], abs=1e-5)
    finally:
        encoder.graphs.config = config


def test_labels_of_tokens(opened: dict[str, ee.Encoder], bundles: Bundles) -> None:
    pipeline = transformers.pipeline("token-classification", model=str(source_of(bundles, "token-classification")))
    for text, found in zip(TEXTS, opened["token-classification"].classify_tokens(TEXTS), strict=True):
        expected = pipeline(text, ignore_labels=[])
        assert [(t.label, t.start, t.end) for t in found] == [(t["entity"], t["start"], t["end"]) for t in expected]
        assert [t.score for t in found] == pytest.approx([t["score"] for t in expected], abs=1e-5)
        assert all(token.text == text[token.start : token.end] for token in found)


def test_answers(opened: dict[str, ee.Encoder], bundles: Bundles) -> None:
    """The best pair of start and end among all, found the slow way from transformers' logits."""
    model, encoder = reference("question-answering"), opened["question-answering"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source_of(bundles, "question-answering"))
    question, context = "When does the ferry leave?", f" {TEXTS[3]} {TEXTS[1]}"
    encoded = tokenizer(question, context, return_tensors="np", return_offsets_mapping=True)
    found = outputs(model, input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
    inside = [i for i, part in enumerate(encoded.sequence_ids(0)) if part == 1]
    start, end = (
        torch.from_numpy(found[name][0][inside]).double().softmax(0) for name in ("start_logits", "end_logits")
    )
    for longest in (1, 4, 15, 1000):
        spans = [(i, j) for i in range(len(inside)) for j in range(i, min(len(inside), i + longest))]
        first, last = max(spans, key=lambda span: float(start[span[0]] * end[span[1]]))
        offsets = encoded["offset_mapping"][0]
        text = context[offsets[inside[first]][0] : offsets[inside[last]][1]]
        answer = encoder.answer(question, context, max_answer_tokens=longest)
        assert answer.text == text.strip() == context[answer.start : answer.end]
        assert answer.score == pytest.approx(float(start[first] * end[last]), rel=1e-4)


@pytest.mark.parametrize("case", ["text-classification", "multimodal"])
def test_int8_is_close(case: str, bundles: Bundles, opened: dict[str, ee.Encoder]) -> None:
    folder = bundle_of(bundles, case, "int8")
    manifest = read_manifest(folder)
    assert {path: weight.bits for path, weight in manifest.weights.items() if ".score" in path} == (
        {"decoder.score": 0} if case == "text-classification" else {}
    )
    assert {weight.bits for path, weight in manifest.weights.items() if "layers." in path} == {8}
    name = "logits" if case == "text-classification" else "last_hidden_state"
    inputs = padded([30])
    with ee.Encoder.load(folder) as small:
        found, expected = small.run(**inputs)[name].ravel(), opened[case].run(**inputs)[name].ravel()
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.99


@pytest.mark.parametrize("case", CASES)
def test_what_a_bundle_says(case: str, bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = source_of(bundles, case), bundle_of(bundles, case)
    manifest = read_manifest(folder)
    assert manifest.task == ASKED.get(case, case)
    assert "genai_config.json" not in manifest.files
    assert "exaone-export generate" not in (folder / "README.md").read_text()
    capsys.readouterr()
    assert cli.main(["verify", str(folder), "--source", str(source), "--json", "--quiet"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["ok"]
    assert verified["quality"] is None
    assert set(verified["parity"]) == {graph.name for graph in manifest.graphs}
    inspected = ee.inspect(folder)
    assert inspected.task == manifest.task
    if case not in ASKED:  # a checkpoint is described as what it is made for
        told = ee.inspect(source)
        assert told.task == manifest.task
        assert [(g.name, g.inputs, g.outputs) for g in told.graphs] == [
            (g.name, g.inputs, g.outputs) for g in inspected.graphs
        ]


def test_verify_takes_no_prompts_for_a_head(bundles: Bundles, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "some words"}\n')
    folder, source = bundle_of(bundles, "text-classification"), source_of(bundles, "text-classification")
    with pytest.raises(ee.UsageError, match="tells no next token"):
        ee.verify(folder, source=source, prompts=prompts)


def test_other_methods_are_refused(
    bundles: Bundles, opened: dict[str, ee.Encoder], capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = opened["question-answering"]
    for method in ("generate", "stream", "generate_ids", "logits", "prompt", "features", "classify", "classify_tokens"):
        with pytest.raises(ee.UsageError, match="exported for question-answering. Use its method answer"):
            getattr(encoder, method)("text")
    with pytest.raises(ee.UsageError, match="exported for feature-extraction"):
        opened["feature-extraction"].image_features(pictures())
    capsys.readouterr()
    assert cli.main(["generate", str(bundle_of(bundles, "question-answering")), "hello"]) == 2
    told = capsys.readouterr().err.strip()
    assert "question-answering" in told
    assert len(told.splitlines()) <= 3
    with ee.load(bundles.bundle("dense")) as engine:
        for method in ("features", "image_features", "classify", "classify_tokens", "answer", "run"):
            with pytest.raises(ee.UsageError, match="exported for text-generation. Use its method generate"):
                getattr(engine, method)("text")


def test_inputs_that_are_refused(opened: dict[str, ee.Encoder]) -> None:
    encoder = opened["text-classification"]
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "takes input_ids"),
        ({"input_ids": [[1, 2], [3]]}, "rows differ in length"),
        ({"input_ids": [1, 2]}, "whole numbers"),
        ({"input_ids": [[1.5]]}, "whole numbers"),
        ({"input_ids": [[512]]}, "not between 0 and 511"),
        ({"input_ids": [[200] * 513]}, "513 tokens and the context holds 512"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]}, "shape"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "row 0"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "row 0"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "row 0"),
        ({"input_ids": [[200, 201]], "attention_mask": [[1, 0]]}, "last token that is not padding"),
        ({"input_ids": [[200]], "pixel_values": [[0.0]], "image_grid_thw": [[1, 2, 2]]}, "reads text only"),
    ]
    for inputs, why in bad:
        with pytest.raises(ee.UsageError, match=why):
            encoder.run(**inputs)
    for text, why in (
        ("", "no tokens"),
        ("x" * 513, "513 tokens"),
        (None, "neither a text"),
        ([["a"]], "whole numbers"),
    ):
        with pytest.raises(ee.UsageError, match=why):
            encoder.classify(text)  # type: ignore[arg-type]
    with pytest.raises(ee.UsageError, match="text_pair"):
        encoder.classify(["a", "b"], text_pair=["c"])
    answerer = opened["question-answering"]
    for question, context in (("", "text"), ("what?", "")):
        with pytest.raises(ee.UsageError, match="it is empty"):
            answerer.answer(question, context)
    seeing = opened["multimodal"]
    with pytest.raises(ee.UsageError, match="placeholder"):
        seeing.features("no placeholder", [pictures()[0]])
    for stray in ("<|image_pad|>", [67, 200]):
        with pytest.raises(ee.UsageError, match="placeholder"):
            seeing.features(stray)
    with pytest.raises(ee.UsageError, match="as many lists"):
        seeing.features(["a", "b"], [[pictures()[0]]])
    with pytest.raises(ee.UsageError, match="means 4 patches"):
        opened["image-feature-extraction"].run(pixel_values=np.zeros((3, 1176)), image_grid_thw=[[1, 2, 2]])
    with pytest.raises(ee.UsageError, match="takes pixel_values"):
        opened["image-feature-extraction"].run(input_ids=[[1]])


def test_a_long_list_runs_in_several_passes(opened: dict[str, ee.Encoder], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = opened["text-classification"]
    together = encoder.classify(TEXTS * 3)
    monkeypatch.setattr("runtime.encoder_pass.PASS_TOKENS", 150)
    apart = encoder.classify(TEXTS * 3)
    assert [one.label for one in together] == [one.label for one in apart]
    assert [one.score for one in together] == pytest.approx([one.score for one in apart], abs=1e-5)


def test_without_a_padding_token_texts_run_one_by_one(opened: dict[str, ee.Encoder]) -> None:
    encoder = opened["text-classification"]
    config, together = encoder.graphs.config, encoder.classify(TEXTS)
    encoder.graphs.config = dataclasses.replace(config, pad_token_id=None)
    try:
        alone = encoder.classify(TEXTS)
        with pytest.raises(ee.UsageError, match="no pad_token_id"):
            encoder.run(input_ids=[[200, 201], [202, 203]])
    finally:
        encoder.graphs.config = config
    assert [one.score for one in together] == pytest.approx([one.score for one in alone], abs=1e-5)


def test_a_model_that_gives_nan(opened: dict[str, ee.Encoder], monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened["text-classification"].graphs.session("decoder")
    monkeypatch.setattr(session, "run", lambda *_: [np.full((1, 7), np.nan, np.float32)])
    with pytest.raises(ee.NumericalError, match="logits: it holds NaN or Inf"):
        opened["text-classification"].classify("some text")


def test_bundles_that_are_not_what_they_say(bundles: Bundles, tmp_path: Path) -> None:
    folder = bundle_of(bundles, "text-classification")
    for changes, why in (
        ({"task": "question-answering"}, "does not give start_logits and end_logits"),
        ({"task": "poetry"}, "no known task"),
        ({"task": "text-generation"}, "decoder"),
    ):
        copy = shutil.copytree(folder, tmp_path / changes["task"])
        manifest = json.loads((copy / "exaone_export.json").read_text())
        (copy / "exaone_export.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(ee.BundleError, match=why), ee.load(copy) as loaded:
            loaded.generate_ids([200], max_new_tokens=1)
    with ee.Encoder.load(folder) as encoder:
        more = dataclasses.replace(encoder.graphs.config.labels, names=("a", "b"))
        encoder._passes._config = dataclasses.replace(encoder.graphs.config, labels=more)
        with pytest.raises(ee.BundleError, match="7 logits, config.json has 2 labels"):
            encoder.classify("some text")


def test_the_longest_text(opened: dict[str, ee.Encoder]) -> None:
    assert opened["feature-extraction"].features("a" * 512).shape == (512, 64)


def test_a_text_that_does_not_fit_into_memory(opened: dict[str, ee.Encoder], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = opened["feature-extraction"]
    encoder.open()
    monkeypatch.setattr("runtime.memory.available_bytes", lambda: 100_000)
    with pytest.raises(ee.ResourceError, match="tokens fit"):
        encoder.features("a" * 500)


def test_running_imports_neither_torch_nor_transformers(bundles: Bundles) -> None:
    program = (
        "import sys, exaone_export as ee\n"
        "with ee.load(sys.argv[1]) as encoder: encoder.classify(['one', 'two'])\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'exporter', 'safetensors'} & set(sys.modules)))"
    )
    folder = str(bundle_of(bundles, "text-classification"))
    done = subprocess.run(
        [sys.executable, "-c", program, folder], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
