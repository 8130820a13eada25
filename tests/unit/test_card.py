"""The model card: metadata that the hub reads, and every fact in the text."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exporter.card import CardFacts, derivative_name, model_card
from exporter.licence import Licence, is_licence, read_licence
from model.bundle import WINDOW_SLACK, FileInfo, GraphInfo, Manifest, TensorInfo, WeightInfo
from model.config import parse_config
from model.memory import cache_size
from model.tasks import GENERATION, TASKS
from runtime.encoder import Encoder
from tests import tiny

EXAONE = Licence("LICENSE", "other", "EXAONE AI Model License Agreement 1.2 - NC", non_commercial=True)
WEIGHTS = {
    "decoder.layers.0.mlp.up_proj": WeightInfo(
        4, 128, True, "imported:compressed-tensors", 5_000_000, "repacked exactly"
    ),
    "decoder.layers.0.mlp.down_proj": WeightInfo(
        0, 0, False, "", 2_000_000, "dequantized: fp8 e4m3 per-channel: no kernel"
    ),
    "decoder.lm_head": WeightInfo(8, 32, True, "rtn", 3_000_000),
    "mtp.lm_head": WeightInfo(8, 32, True, "rtn", 3_000_000),
    "vision_encoder.patch_embed.proj": WeightInfo(0, 0, False, "", 1_000, "its 1176 inputs divide by no block"),
}
FIGURES: dict[str, Any] = {
    "ok": True,
    "problems": (),
    "parity": {"decoder": {"max_abs_error": 1.25e-5, "cosine": 0.99999987}},
    "quality": {
        "tokens": 12345, "mean_kld": 0.01234, "p99_kld": 0.1, "p999_kld": 0.2, "max_kld": 0.5, "same_top": 0.9712,
        "ppl": 8.3, "ppl_source": 8.2, "ppl_ratio": 1.0122,
    },
}  # fmt: skip


def cache_inputs(layers: int, sliding: set[int]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(
            f"past_key_values.{layer}.{part}",
            "float32",
            ("batch_size", 2, "window_cache_length" if layer in sliding else "past_sequence_length", 16),
        )
        for layer in range(layers)
        for part in ("key", "value")
    )


def make_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "tool": "1.2.3", "libraries": {"torch": "2.13.0", "numpy": "2.4"}, "model_type": "exaone4_5",
        "source": {"id": "LGAI-EXAONE/EXAONE-4.5-33B", "revision": "abc123", "files": {}},
        "task": "image-text-to-text", "dtype": "fp32", "target": "cpu", "recipe": "int4", "weights": WEIGHTS,
        "graphs": (
            GraphInfo("vision_encoder", "vision_encoder.onnx", ("vision_encoder.onnx.data",), (), ()),
            GraphInfo("embedding", "embedding.onnx", (), (), ()),
            GraphInfo("decoder", "decoder.onnx", (), cache_inputs(4, {0, 1, 2}), ()),
        ),
        "files": {
            "vision_encoder.onnx": FileInfo(1000, ""), "vision_encoder.onnx.data": FileInfo(5_000_000, ""),
            "embedding.onnx": FileInfo(1000, ""), "decoder.onnx": FileInfo(2_000_000, ""), "LICENSE": FileInfo(9, ""),
            "genai_config.json": FileInfo(9, ""),
        },
        "parameters": 12_300_000, "bits_per_weight": 4.5, "notes": ("No tokenizer.",),
    }  # fmt: skip
    return Manifest(**(values | changes))


def render(licence: Licence | None = EXAONE, figures: dict[str, Any] | None = None, **changes: Any) -> str:
    kind = "vlm" if changes.get("model_type", "exaone4_5") == "exaone4_5" else "hybrid"
    return model_card(CardFacts(make_manifest(**changes), parse_config(tiny.make_config(kind)), licence, figures))


def metadata(text: str) -> dict[str, Any]:
    """The front matter, read as the little YAML that it may be."""
    lines = text.split("\n---\n", 1)[0].split("\n")
    assert lines[0] == "---"
    found: dict[str, Any] = {}
    for line in lines[1:]:
        if line.startswith("- "):
            found[list(found)[-1]] = [*(found[list(found)[-1]] or []), line[2:]]
        else:
            key, _, value = line.partition(":")
            found[key] = value.strip()
    return found


def test_metadata_is_what_the_hub_reads() -> None:
    assert metadata(render()) == {
        "license": "other",
        "license_name": "exaone",
        "license_link": "LICENSE",
        "base_model": "LGAI-EXAONE/EXAONE-4.5-33B",
        "base_model_relation": "quantized",
        "pipeline_tag": "image-text-to-text",
        "library_name": "onnxruntime",
        "language": ["en", "ko", "es", "de", "ja", "vi"],
        "tags": ["onnx", "onnxruntime", "exaone", "int4", "int8"],
    }


def test_metadata_claims_no_more_than_is_known() -> None:
    local: dict[str, Any] = {"id": "exaone4-0123456789ab", "revision": None, "files": {}}
    plain = metadata(
        render(None, source=local, recipe="none", weights={}, model_type="exaone4", task="text-generation")
    )
    assert plain == {
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "library_name": "onnxruntime",
        "tags": ["onnx", "onnxruntime", "exaone"],
    }
    apache = metadata(render(Licence("LICENSE.txt", "apache-2.0")))
    assert apache["license"] == "apache-2.0"
    assert not {"license_name", "license_link"} & set(apache)
    other = metadata(render(Licence("License of us.md", "other")))
    assert (other["license"], other["license_link"]) == ("other", '"License of us.md"')
    assert "license_name" not in other
    unquantized = metadata(render(recipe="none", weights={}))
    assert unquantized["base_model"] == "LGAI-EXAONE/EXAONE-4.5-33B"
    assert "base_model_relation" not in unquantized
    awq = {"id": "LGAI-EXAONE/EXAONE-4.5-33B-AWQ", "quantization": {"weights": {"awq int4": 9}, "activations": False}}
    imported = render(source=awq, recipe="imported")
    assert metadata(imported)["base_model_relation"] == "quantized"
    assert "The source was quantized already (awq int4). Its weights are as the source has them" in imported


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "EXAONE-4.5-33B-ONNX-int4"),
        ({"dtype": "fp16"}, "EXAONE-4.5-33B-ONNX-int4-fp16"),
        ({"recipe": "none"}, "EXAONE-4.5-33B-ONNX-fp32"),
        ({"recipe": "my recipe/2"}, "EXAONE-4.5-33B-ONNX-my-recipe-2"),
        ({"source": {"id": "LGAI-EXAONE/EXAONE-4.5-33B-AWQ"}, "recipe": "imported"}, "EXAONE-4.5-33B-AWQ-ONNX-fp32"),
        ({"source": {"id": "someone/exaone-tuned"}}, "EXAONE-tuned-ONNX-int4"),
        ({"source": {"id": "someone/my-model"}}, "EXAONE-my-model-ONNX-int4"),
        ({"source": {"id": "exaone4_5-0123456789ab"}}, "EXAONE-4.5-architecture-ONNX-int4"),
        (
            {"source": {"id": "exaone4-01"}, "model_type": "exaone4", "task": "text-classification"},
            "EXAONE-4.0-architecture-text-classification-ONNX-int4",
        ),
    ],
)
def test_the_name_of_a_derivative_begins_with_exaone(changes: dict[str, Any], name: str) -> None:
    assert derivative_name(make_manifest(**changes)) == name
    assert f"\n# {name}\n" in render(**changes)


def test_the_card_says_what_from_where_and_how() -> None:
    text = render()
    for part in (
        "[LGAI-EXAONE/EXAONE-4.5-33B](https://huggingface.co/LGAI-EXAONE/EXAONE-4.5-33B) at revision `abc123`",
        "12.3 million parameters, 4.50 bits each",
        "| `vision_encoder.onnx` | patches of images → image features | 5.0 MB |",
        "| `decoder.onnx` | embeddings and the cache → logits, and the longer cache | 2.0 MB |",
        "exaone-export export LGAI-EXAONE/EXAONE-4.5-33B OUT --revision abc123 --quantize int4 --dtype fp32 "
        "--target cpu --task image-text-to-text",
        "exaone-export 1.2.3 with numpy 2.4, torch 2.13.0.",
        "--image picture.png",
        'ee.load("THIS_FOLDER")',
        "`genai_config.json`",
        "- No tokenizer.",
    ):
        assert part in text, part


def test_weights_are_summed_up_by_how_they_are_stored() -> None:
    text = render()
    rows = (
        "| int4, blocks of 128, symmetric, taken over from the source (compressed-tensors) | 1 | 5.00 million | "
        "repacked exactly |",
        "| int8, blocks of 32, symmetric, rtn | 1 | 3.00 million |  |",
        "| fp32 | 1 | 2.00 million | dequantized: fp8 e4m3 per-channel: no kernel |",
        "| fp32 | 1 | 0.00 million | its 1176 inputs divide by no block |",
    )
    assert [text.index(row) for row in rows] == sorted(text.index(row) for row in rows)
    many = {f"decoder.{i}": WeightInfo(0, 0, False, "", 1000, f"reason {i}") for i in range(40)}
    assert "| 24 other kinds | 24 | 0.02 million |  |" in render(weights=many)


def test_memory_counts_window_layers_as_windows() -> None:
    text = parse_config(tiny.make_config("vlm")).text
    held = cache_size(text, 4, window_cache=True, slack=WINDOW_SLACK["cpu"]).of(2048)  # what the runtime will say
    card = render()
    assert f"| 2,048 | 7.0 MB | {held / 1e3:.1f} kB | {(held + 7_002_000) / 1e6:.1f} MB |" in card
    assert "--kv-cache" not in card
    whole = render(graphs=(GraphInfo("decoder", "decoder.onnx", (), cache_inputs(4, set()), ()),))
    assert "| 2,048 | 2.0 MB | 2.1 MB | 4.1 MB |" in whole
    assert "--task image-text-to-text --kv-cache full" in whole
    classifier = render(task="text-classification", model_type="exaone4")
    assert "The weights take 7.0 MB." in classifier
    assert "tokens in context" not in classifier


def test_figures_are_shown_where_they_were_measured() -> None:
    text = render(figures=FIGURES)
    for part in (
        "| positions scored | 12,345 |",
        "| KL divergence from the source, mean, nats | 0.01234 |",
        "| same most likely token | 97.12 % |",
        "| ratio of the two | 1.012 |",
        "| decoder | 1.25e-05 | 1.000000 |",
    ):
        assert part in text, part
    assert "Not measured" not in text
    assert "how much is not known" not in text
    unknown = render()
    assert "Not measured" in unknown
    assert "how much is not known" in unknown


def test_a_failed_comparison_is_said_first() -> None:
    text = render(figures={"ok": False, "problems": ("decoder: it gives NaN or infinite values",), "quality": None})
    assert "**The last comparison with the source failed**: decoder: it gives NaN or infinite values." in text
    odd = render(figures=FIGURES | {"quality": {"tokens": 3, "mean_kld": float("nan"), "max_kld": None}})
    assert "| KL divergence from the source, mean, nats | nan |" in odd
    assert "| … largest | – |" in odd


def test_the_licence_section_repeats_facts_only() -> None:
    assert "EXAONE AI Model License Agreement 1.2 - NC, copied here unchanged from the source as `LICENSE`" in render()
    assert "prohibits commercial use" in render()
    assert "commercial" not in render(Licence("LICENSE", "other", "EXAONE AI Model License Agreement 2.0"))
    assert "see `LICENSE.md`" in render(Licence("LICENSE.md", "mit"))
    assert "without a licence file" in render(None)


def test_nothing_of_a_manifest_leaves_its_place() -> None:
    text = render(source={"id": "a`b\n# x <script>", "revision": None}, notes=("line\n## Licence <b>",))
    assert text.count("\n## Licence\n") == 1
    assert "<script>" not in text
    assert "<b>" not in text


def test_a_recipe_of_the_users_own_is_named_not_invented() -> None:
    text = render(recipe="mine", source={"id": "exaone4_5-01", "revision": None})
    assert "exaone-export export SOURCE OUT --quantize RECIPE.toml" in text
    assert "RECIPE.toml is the recipe called `mine`." in text
    assert "names no origin (`exaone4_5-01`)" in text


@pytest.mark.parametrize("task", [task for task in TASKS if task not in GENERATION])
def test_other_tasks_are_told_what_to_call(task: str) -> None:
    text = render(task=task)
    called = re.search(r"encoder\.(\w+)\(", text)
    assert called is not None
    assert callable(getattr(Encoder, called.group(1)))
    assert "generate" not in text
    assert metadata(text)["pipeline_tag"] == task


LICENCES = {
    "EXAONE AI Model License Agreement 1.2 - NC\n\nThe Licensee is expressly prohibited from using the Model,\n"
    "Derivatives, or Output for any commercial purposes": ("other", "EXAONE AI Model License Agreement 1.2 - NC", True),
    "EXAONE AI Model License Agreement 1.1": ("other", "EXAONE AI Model License Agreement 1.1", False),
    "                 Apache License\n           Version 2.0, January 2004": ("apache-2.0", "", False),
    "MIT License\n\nPermission is hereby granted": ("mit", "", False),
    "You are prohibited from using the model for any commercial purposes.": ("other", "", False),
}


@pytest.mark.parametrize("text", LICENCES, ids=lambda text: text.strip()[:20])
def test_what_a_licence_says_of_itself(tmp_path: Path, text: str) -> None:
    (tmp_path / "LICENSE").write_text(text)
    found = read_licence(tmp_path, ["LICENSE", "config.json"])
    assert found is not None
    assert (found.identifier, found.title, found.non_commercial) == LICENCES[text]


def test_exaones_licence_is_found_among_several(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("MIT License. Permission is hereby granted")
    (tmp_path / "LICENSE-MODEL.txt").write_bytes(b"\xff\xfeEXAONE AI Model License Agreement 1.2 - NC")
    (tmp_path / "NOTICE").write_text("EXAONE AI Model License Agreement 1.2 - NC")
    names = [path.name for path in tmp_path.iterdir()]
    found = read_licence(tmp_path, names)
    assert found is not None
    assert found.file == "LICENSE-MODEL.txt"
    assert read_licence(tmp_path, ["NOTICE"]) is None
    assert [is_licence(name) for name in ("license", "LICENCE.md", "Notice", "licenses.json", "my_license")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_cards_need_neither_torch_nor_onnx() -> None:
    code = "import sys, exporter.card; print([m for m in ('torch', 'onnx', 'onnx_ir', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_no_path_time_or_machine() -> None:
    text = render(figures=FIGURES)
    assert not re.search(r"/(home|tmp|root|work)/|\b20\d\d-\d\d-\d\d\b|\d\d:\d\d", text)


def test_quality_by_group_and_the_noisiest_weights() -> None:
    quality = FIGURES["quality"] | {
        "standard_errors": {"mean_kld": 0.00021},
        "groups": {"modality": {"image": FIGURES["quality"] | {"tokens": 77}}, "language": {"ko": {"tokens": 5}}},
    }
    layer = {"path": "decoder.lm_head", "snr_db": 19.44, "weight_snr_db": 20.06, "scheme": "int4 g32", "parameters": 9}
    task = {"task": "read a line", "asked": 256, "exact": 0.9961, "interval_95": [0.978, 0.999]}
    limits = {"mean_kld": 0.02, "same_top": 0.9, "nonsense": 3}
    text = render(figures=FIGURES | {"quality": quality, "layers": [layer], "accuracy": [task], "limits": limits})
    assert "| KL divergence from the source, mean, nats | 0.01234 ± 0.00021 | ≤ 0.02 |" in text
    assert "| same most likely token | 97.12 % | ≥ 90.00 % |" in text
    assert "| image | 77 | 0.01234 | 0.1 | 97.12 % | 1.012 |" in text
    assert "| ko | 5 | – | – | – | – |" in text
    assert "| `decoder.lm_head` | int4 g32 | 19.4 | 20.1 |" in text
    assert "| read a line | 256 | 99.61 % | 97.80 % – 99.90 % |" in text
    assert "nonsense" not in text
