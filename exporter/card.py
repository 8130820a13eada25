"""README.md of a bundle, a model card: what it is, where it comes from, how it was made, how good it is, how to run it.

The text is a function of the manifest, the configuration, the licence and the figures of `verify` alone: no path, no
time, nothing of the machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter import genai
from exporter.card_quality import quality_sections
from exporter.card_tables import graph_table, memory_table, plain, shown, weight_table
from exporter.licence import Licence
from model.bundle import (
    BUNDLE_LAYOUT,
    CARD,
    DECODER,
    MANIFEST,
    TRANSFORMERS_JS,
    VISION_ENCODER,
    Manifest,
    int8_cache,
    window_layers,
)
from model.config import ExaoneConfig
from model.tasks import (
    FEATURE_EXTRACTION,
    GENERATION,
    IMAGE_FEATURE_EXTRACTION,
    QUESTION_ANSWERING,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    TOKEN_CLASSIFICATION,
)

FAMILIES = {"exaone4": "EXAONE 4.0", "exaone4_5": "EXAONE 4.5"}
_SHIPPED = ("int8", "int4", "int4-edge", "int4-quality", "int8-dynamic")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TARGETS = {"cpu": "the CPU", "cuda": "CUDA"}
# As LG AI Research's own cards say.
_LANGUAGES = {
    "LGAI-EXAONE/EXAONE-4.5-": ("en", "ko", "es", "de", "ja", "vi"),
    "LGAI-EXAONE/EXAONE-4.0-": ("en", "ko", "es"),
}
_CALLS = {
    FEATURE_EXTRACTION: 'features("Some text.").shape',
    IMAGE_FEATURE_EXTRACTION: 'image_features("picture.png").shape',
    TEXT_CLASSIFICATION: 'classify("Some text.")',
    TOKEN_CLASSIFICATION: 'classify_tokens("Some text.")',
    QUESTION_ANSWERING: 'answer("Who asks?", "Some text that says who asks.")',
}
_PLAIN_YAML = re.compile(r"[A-Za-z][\w./-]*")


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from.

    Attributes:
        manifest: of the bundle; its entry of the card itself does not matter.
        config: of the model.
        licence: what came with the source, or None.
        figures: content of verify.json, or None where nothing was measured.
    """

    manifest: Manifest
    config: ExaoneConfig
    licence: Licence | None = None
    figures: Mapping[str, Any] | None = None


def derivative_name(manifest: Manifest) -> str:
    """A name for the bundle as a model of its own; like all derivatives of EXAONE it begins with "EXAONE".

    ``LGAI-EXAONE/EXAONE-4.5-33B`` with the recipe int4 gives ``EXAONE-4.5-33B-ONNX-int4``.
    """
    source = str(manifest.source["id"])
    if _HUB_ID.fullmatch(source):
        name = source.partition("/")[2]
        rest = name[6:] if name[:6].upper() == "EXAONE" else f"-{name}"
        parts = [f"EXAONE{rest}"]
    else:
        family = FAMILIES.get(manifest.model_type, "EXAONE").replace(" ", "-")
        parts = [f"{family}-architecture"]
    parts += ["" if manifest.task in GENERATION else manifest.task, "ONNX"]
    parts += [manifest.recipe if _chosen(manifest) else ""]
    parts += [manifest.dtype if manifest.dtype != "fp32" or not _chosen(manifest) else ""]
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.") for part in parts if part)


def model_card(facts: CardFacts) -> str:
    """The card's text (Markdown, with the metadata that the Hugging Face hub reads on top)."""
    manifest = facts.manifest
    sections = [
        "\n".join(_front_matter(facts)),
        f"# {derivative_name(manifest)}",
        _summary(manifest),
        "## What is in it",
        graph_table(manifest),
        _sizes(manifest),
        weight_table(manifest),
        f"Every weight's precision, and size and sha256 of every file, are in `{MANIFEST}`.",
        "## Memory",
        memory_table(manifest, facts.config),
        "## Quality",
        *quality_sections(facts.figures),
        "## How to run it",
        *_usage(manifest),
        "## How it was made",
        *_recipe(manifest, facts.config),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(manifest, facts.figures)),
        "## Licence",
        _licence(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: CardFacts) -> Iterator[str]:
    manifest, licence, source = facts.manifest, facts.licence, str(facts.manifest.source["id"])
    yield "---"
    yield f"license: {'unknown' if licence is None else licence.identifier}"
    if licence is not None and licence.identifier == "other":
        if licence.exaone:
            yield "license_name: exaone"
        yield f"license_link: {_yaml(licence.file)}"
    if _HUB_ID.fullmatch(source):
        yield f"base_model: {_yaml(source)}"
        if _quantized(manifest):
            yield "base_model_relation: quantized"
    yield f"pipeline_tag: {_yaml(manifest.task)}"
    yield "library_name: onnxruntime"
    spoken = next((tags for known, tags in _LANGUAGES.items() if source.startswith(known)), ())
    yield from _yaml_list("language", spoken)
    bits = sorted({weight.bits for weight in manifest.weights.values() if weight.bits})
    yield from _yaml_list("tags", ("onnx", "onnxruntime", "exaone", *(f"int{width}" for width in bits)))
    yield "---"


def _summary(manifest: Manifest) -> str:
    source, revision = str(manifest.source["id"]), manifest.source.get("revision")
    family = FAMILIES.get(manifest.model_type, manifest.model_type)
    if _HUB_ID.fullmatch(source):
        origin = f"[{source}](https://huggingface.co/{source})" + (f" at revision `{revision}`" if revision else "")
    else:
        origin = f"a checkpoint of the {family} architecture that names no origin (`{plain(source)}`)"
    return (
        f"ONNX graphs of {origin}, architecture {family} (`{manifest.model_type}`), for the task {manifest.task} with "
        f"ONNX Runtime on {_TARGETS.get(manifest.target, manifest.target)}. {_precision(manifest)}"
    )


def _precision(manifest: Manifest) -> str:
    packed = ", ".join(plain(label) for label in _packed(manifest))
    source = f"The source was quantized already ({packed}). " if packed else ""
    if not _chosen(manifest):
        return f"{source}Its weights are as the source has them, computed in {manifest.dtype}."
    what = "Weights that no kernel reads as they are in the source" if packed else "Its weights"
    return f"{source}{what} are quantized with the recipe `{plain(manifest.recipe)}`; the rest is {manifest.dtype}."


def _sizes(manifest: Manifest) -> str:
    total = sum(info.size for name, info in manifest.files.items() if name != CARD)
    if not manifest.parameters:
        return f"{shown(total)} in all."
    return (
        f"{manifest.parameters / 1e6:,.1f} million parameters, {manifest.bits_per_weight:.2f} bits each with scales "
        f"and zero points, {shown(total)} in all."
    )


def _usage(manifest: Manifest) -> Iterator[str]:
    if manifest.task not in GENERATION:
        call = _CALLS.get(manifest.task, "run(inputs)")
        lines = ('with ee.load("THIS_FOLDER") as encoder:', f"    print(encoder.{call})")
        yield _code("python", "import exaone_export as ee", "", *lines)
        return
    image = manifest.graph(VISION_ENCODER) is not None
    question = "What does the picture say?" if image else "Explain what a window attention layer sees."
    yield _code(
        "sh",
        "pip install exaone-export",
        f'exaone-export generate THIS_FOLDER "{question}"' + (" --image picture.png" if image else ""),
    )
    images = ', images=["picture.png"]' if image else ""
    yield _code(
        "python",
        "import exaone_export as ee",
        "",
        'with ee.load("THIS_FOLDER") as engine:',
        f'    print(engine.generate("{question}"{images}, max_new_tokens=256).text)',
    )
    if genai.FILE in manifest.files:
        yield f"Stock onnxruntime-genai reads the same folder through `{genai.FILE}`."
    if manifest.layout == TRANSFORMERS_JS:
        yield "transformers.js finds the graphs in `onnx`; `config.json` says under `transformers.js_config` which."


def _recipe(manifest: Manifest, config: ExaoneConfig) -> Iterator[str]:
    source = str(manifest.source["id"])
    hub = _HUB_ID.fullmatch(source) is not None
    words = ["exaone-export export", source if hub else "SOURCE", "OUT"]
    if hub and manifest.source.get("revision"):
        words.append(f"--revision {plain(str(manifest.source['revision']))}")
    if _chosen(manifest):
        words.append(f"--quantize {manifest.recipe if manifest.recipe in _SHIPPED else 'RECIPE.toml'}")
    words += [f"--dtype {manifest.dtype}", f"--target {manifest.target}", f"--task {manifest.task}"]
    words += ["--offload"] if manifest.offload else []
    words += [f"--layout {manifest.layout}"] if manifest.layout != BUNDLE_LAYOUT else []
    if int8_cache(manifest.graph(DECODER)):
        words.append("--kv-cache int8")
    elif (
        manifest.task in GENERATION
        and manifest.layout == BUNDLE_LAYOUT
        and config.text.cached_window is not None
        and not window_layers(manifest.graph(DECODER))
    ):
        words.append("--kv-cache full")
    if "extra" in manifest.source.get("left_out", {}):
        words.append("--ignore-extra")
    yield _code("sh", " ".join(words))
    if not hub:
        yield f"SOURCE is the folder whose files have the sha256 that `{MANIFEST}` lists."
    if _chosen(manifest) and manifest.recipe not in _SHIPPED:
        yield f"RECIPE.toml is the recipe called `{plain(manifest.recipe)}`."
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(manifest.libraries.items()))
    yield f"exaone-export {manifest.tool}" + (f" with {libraries}." if libraries else ".")


def _limits(manifest: Manifest, figures: Mapping[str, Any] | None) -> Iterator[str]:
    yield from (plain(note, 1000) for note in manifest.notes)
    if _quantized(manifest) and not (figures or {}).get("quality"):
        yield "Fewer bits cost quality; how much is not known of this bundle until it is measured."
    if (manifest.dtype, manifest.target) == ("bf16", "cpu"):
        yield "ONNX Runtime has no bf16 kernels for the CPU: these graphs need another execution provider."
    if manifest.task in GENERATION and manifest.task != TEXT_GENERATION:
        yield "The graphs read images and frames; exaone-export makes frames out of a video, other runtimes may not."
    yield "What the source gets wrong, this gets wrong too: it is the same model in another format."


def _licence(facts: CardFacts) -> str:
    licence = facts.licence
    if licence is None:
        return (
            "The source came without a licence file, so there is none here. The weights keep the licence of their "
            "source: look it up there before you use or pass on this bundle."
        )
    if not licence.exaone:
        return f"The weights keep the licence of their source, which is copied here unchanged: see `{licence.file}`."
    use = " It says that it prohibits commercial use." if licence.non_commercial else ""
    return (
        f"The weights are a derivative of LG AI Research's EXAONE and keep its licence, {licence.title}, copied here "
        f"unchanged from the source as `{licence.file}`.{use} Pass this bundle on only with that file."
    )


def _chosen(manifest: Manifest) -> bool:
    """Whether a recipe was asked for."""
    return manifest.recipe not in ("none", "imported")


def _packed(manifest: Manifest) -> Sequence[str]:
    """How the source held the weights that were quantized in it."""
    described = manifest.source.get("quantization")
    return list(described["weights"]) if described else []


def _quantized(manifest: Manifest) -> bool:
    return _chosen(manifest) or bool(_packed(manifest))


def _code(language: str, *lines: str) -> str:
    return "\n".join((f"```{language}", *lines, "```"))


def _yaml(text: str) -> str:
    return text if _PLAIN_YAML.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _yaml_list(key: str, values: Sequence[str]) -> Iterator[str]:
    if values:
        yield f"{key}:"
        yield from (f"- {_yaml(value)}" for value in values)
