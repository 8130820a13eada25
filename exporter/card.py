"""README.md of a bundle: what it is, where it comes from, how large it is and how to run it."""

from __future__ import annotations

from collections.abc import Mapping

from model.bundle import EMBEDDING, MTP, VISION_ENCODER, FileInfo, Manifest

FILE = "README.md"
_PURPOSE = {
    VISION_ENCODER: "patches of images → image features",
    EMBEDDING: "token ids and image features → embeddings",
    "decoder": "embeddings or ids, and the cache → logits, and the longer cache",
    MTP: "draft head: hidden states → logits of the token after next",
}
_TARGETS = {"cpu": "ONNX Runtime's CPU provider", "cuda": "ONNX Runtime's CUDA provider"}


def model_card(manifest: Manifest, files: Mapping[str, FileInfo], *, bits_per_weight: float, parameters: int) -> str:
    """The card's text (Markdown).

    Args:
        manifest: of the bundle, its `files` not needed.
        files: what was written so far.
        bits_per_weight: stored bits of all weights over their number.
        parameters: number of weights.
    """
    total = sum(info.size for info in files.values())
    licences = sorted(name for name in files if name.startswith("LICENSE"))
    sections = [
        f"# {manifest.source['id']}, exported to ONNX",
        _origin(manifest),
        f"{parameters / 1e6:,.1f} million parameters, {bits_per_weight:.2f} bits each, {_size(total)} in all.",
        _graphs(manifest, files),
        "Every weight's precision, and size and sha256 of every file, are in `exaone_export.json`. "
        "Quality figures, where `exaone-export verify` was run with the source, are in `verify.json`.",
        "## Run it",
        _usage(manifest),
        *(f"Note: {note}" for note in manifest.notes),
        "## Licence",
        _licence(licences),
    ]
    return "\n\n".join(sections) + "\n"


def _origin(manifest: Manifest) -> str:
    revision = manifest.source.get("revision")
    origin = f"Made from `{manifest.source['id']}`" + (f" at revision `{revision}`" if revision else "")
    recipe = "not quantized" if manifest.recipe == "none" else f"quantized with the recipe `{manifest.recipe}`"
    return (
        f"{origin} (`{manifest.model_type}`, {manifest.task}) by exaone-export {manifest.tool}: {recipe}, "
        f"the rest in {manifest.dtype}, for {_TARGETS.get(manifest.target, manifest.target)}."
    )


def _graphs(manifest: Manifest, files: Mapping[str, FileInfo]) -> str:
    rows = ["| graph | does | size |", "|---|---|---|"]
    for graph in manifest.graphs:
        own = (graph.file, f"{graph.file}.data")
        size = sum(files[name].size for name in own if name in files)
        rows.append(f"| `{graph.file}` | {_PURPOSE.get(graph.name, graph.name)} | {_size(size)} |")
    return "\n".join(rows)


def _usage(manifest: Manifest) -> str:
    image = " --image picture.png" if manifest.graph(VISION_ENCODER) else ""
    question = "What does the picture say?" if image else "Explain what a window attention layer sees."
    return f'```\npip install exaone-export\nexaone-export generate THIS_FOLDER{image} "{question}"\n```'


def _licence(licences: list[str]) -> str:
    if licences:
        return f"The weights keep the licence of their source: see `{licences[0]}`."
    return "The weights keep the licence of their source, which came without a licence file: look it up there."


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
