"""The tables of a model card: graphs, weights, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model.bundle import (
    DECODER,
    EMBEDDING,
    FLOAT_BYTES,
    MTP,
    VISION_ENCODER,
    WINDOW_SLACK,
    GraphInfo,
    Manifest,
    WeightInfo,
    int8_cache,
    window_layers,
)
from model.config import ExaoneConfig
from model.memory import cache_size, weight_bytes
from model.tasks import GENERATION

CONTEXTS = (4096, 32768)
_LARGEST_TABLE = 16  # rows; more kinds of weights than that are summed up
_PURPOSE = {
    VISION_ENCODER: "patches of images → image features",
    EMBEDDING: "token ids and image features → embeddings",
    MTP: "draft head: hidden states → logits of the token after next",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def plain(text: str, longest: int = 200) -> str:
    """Text that cannot leave its place in the Markdown."""
    return " ".join(text.split())[:longest].replace("`", "'").replace("|", "/").replace("<", "&lt;")


def shown(count: float) -> str:
    """A number of bytes in units of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def own_bytes(manifest: Manifest, graph: GraphInfo) -> int:
    """Bytes of a graph's own files; data that it reads from another graph's file is not counted."""
    own = (graph.file, *(name for name in graph.data if name.startswith(graph.file)))
    return sum(manifest.files[name].size for name in own)


def graph_table(manifest: Manifest) -> str:
    """Every graph with its outputs' purpose and its own files' size."""
    rows = []
    for graph in manifest.graphs:
        rows.append((f"`{graph.file}`", _purpose(graph.name, manifest), shown(own_bytes(manifest, graph))))
    return table(("graph", "does", "size"), rows)


def _purpose(graph: str, manifest: Manifest) -> str:
    if graph != DECODER:
        return _PURPOSE.get(graph, graph)
    entry = "token ids" if manifest.graph(EMBEDDING) is None else "embeddings"
    if manifest.task in GENERATION:
        return f"{entry} and the cache → logits, and the longer cache"
    found = manifest.graph(DECODER)
    outputs = [tensor.name for tensor in found.outputs] if found else []
    return f"{entry} → {', '.join(outputs)}"


def weight_table(manifest: Manifest) -> str:
    """How many weights are stored in which way; those that were imported or dequantized say so."""
    totals: dict[tuple[str, str], list[int]] = {}
    for path, weight in sorted(manifest.weights.items()):
        if path == f"{MTP}.lm_head":  # the decoder's
            continue
        entry = totals.setdefault((_scheme(weight, manifest.dtype), weight.reason), [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + weight.parameters
    ordered = sorted(totals.items(), key=lambda item: (-item[1][1], item[0]))
    if not ordered:
        return ""
    rows = [
        (scheme, f"{count:,}", _millions(parameters), reason)
        for (scheme, reason), (count, parameters) in ordered[:_LARGEST_TABLE]
    ]
    if rest := ordered[_LARGEST_TABLE:]:
        count, parameters = (sum(entry[i] for _, entry in rest) for i in (0, 1))
        rows.append((f"{len(rest)} other kinds", f"{count:,}", _millions(parameters), ""))
    return table(("stored as", "weights", "parameters", "why"), rows)


def _scheme(weight: WeightInfo, dtype: str) -> str:
    if not weight.bits:
        return dtype
    kind = "symmetric" if weight.symmetric else "asymmetric"
    method = weight.method
    if method.startswith("imported:"):
        method = f"taken over from the source ({method.removeprefix('imported:')})"
    if weight.activations == "int8":
        turned = f", rotated by {weight.rotate}" if weight.rotate else ""
        return f"int{weight.bits}, one scale an output, {kind}, {method}; activations int8, one scale a row{turned}"
    return f"int{weight.bits}, blocks of {weight.block_size}, {kind}, {method}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.2f} million"


def memory_table(manifest: Manifest, config: ExaoneConfig) -> str:
    """Weights, and the cache for a few lengths of context where there is one."""
    weights = weight_bytes(manifest, manifest.graphs)
    above = "Activations" + (" and the encoding of images" if manifest.graph(VISION_ENCODER) else "") + " come on top."
    if manifest.task not in GENERATION or manifest.graph(DECODER) is None:
        return f"The weights take {shown(weights)}. {above}"
    most = config.text.max_position_embeddings
    lengths = [*(length for length in CONTEXTS if length < most), most]
    windows = bool(window_layers(manifest.graph(DECODER)))
    value_bytes = FLOAT_BYTES.get(manifest.dtype, 4)
    scaled = int8_cache(manifest.graph(DECODER))
    cache = cache_size(config.text, 1 if scaled else value_bytes, windows, WINDOW_SLACK.get(manifest.target, 0), scaled)
    rows = [
        (f"{length:,}", shown(weights), shown(cache.of(length)), shown(weights + cache.of(length)))
        for length in lengths
    ]
    sizes = table(("tokens in context", "weights", "keys and values", "together"), rows)
    return f"{sizes}\n\nFor one sequence. {above}"
