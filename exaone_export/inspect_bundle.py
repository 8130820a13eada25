"""What is in a bundle, told from its manifest and the structure of its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from exaone_export.forecast import Weights, rotary_bytes
from exaone_export.inspection import GraphSummary, Inspection, Outlook, chosen_contexts
from exaone_export.memory_need import Machine, largest_image
from model.bundle import (
    DECODER,
    FLOAT_BYTES,
    MANIFEST,
    MTP,
    Manifest,
    WeightInfo,
    bundle_path,
    check_sizes,
    int8_cache,
    read_manifest,
    window_layers,
)
from model.config import ExaoneConfig, load_config
from model.errors import BundleError
from model.memory import weight_bytes
from quantize.scheme import FLOAT, Scheme
from runtime.onnx_file import read_onnx


def inspect_bundle(folder: Path, context: int | None) -> Inspection:
    """Describes a bundle; arguments and errors as of `exaone_export.inspection.inspect`."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    config = replace(load_config(folder), task=manifest.task)
    if manifest.dtype not in FLOAT_BYTES:
        raise BundleError("cannot open bundle", MANIFEST, f"unknown dtype {manifest.dtype[:40]!r}", "Export it again")
    if manifest.target not in ("cpu", "cuda"):
        raise BundleError("cannot open bundle", MANIFEST, f"unknown target {manifest.target[:40]!r}", "Export it again")
    parameters, bits = _count(manifest, config)
    if manifest.parameters:  # what the export counted, norms and biases too; older bundles do not say
        parameters, bits = manifest.parameters, manifest.parameters * manifest.bits_per_weight
    windows = bool(window_layers(manifest.graph(DECODER)))
    scaled = int8_cache(manifest.graph(DECODER))
    machine = Machine(manifest.target, FLOAT_BYTES[manifest.dtype], windows, scaled)
    cache, contexts = machine.cache(config), chosen_contexts(config, context)
    weights = _weights(manifest, config, machine.float_bytes)
    pixels = largest_image(folder)
    memory = {n: machine.need(weights, config, n, pixels) for n in contexts}
    size = weight_bytes(manifest, manifest.graphs)
    outlook = Outlook(manifest.dtype, size, bits / max(1, parameters), memory)
    return Inspection(
        model_type=manifest.model_type,
        task=manifest.task,
        graphs=_graphs(folder, manifest),
        bits_per_weight=outlook.bits_per_weight,
        quantized=_by_scheme(manifest.weights),
        parameters=parameters,
        bytes=sum(info.size for info in manifest.files.values()),
        kv_bytes_per_token=cache.per_token,
        kv_window_bytes=cache.window_tokens * cache.window_per_token,
        kv_bytes={n: need.kv for n, need in memory.items()},
        memory_bytes={n: need.total for n, need in memory.items()},
        outlooks={manifest.target: {manifest.recipe: outlook}},
        quantization=manifest.recipe,
    )


def _count(manifest: Manifest, config: ExaoneConfig) -> tuple[int, float]:
    """Parameters, and bits they take; the draft head's output layer is the decoder's, a tied one the embedding."""
    parameters, bits = 0, 0.0
    embedding = next((w for path, w in manifest.weights.items() if path.endswith(".embed_tokens")), None)
    for path, weight in manifest.weights.items():
        tied = path == f"{DECODER}.lm_head" and config.text.tie_word_embeddings
        if path == f"{MTP}.lm_head":
            continue
        parameters += 0 if tied else weight.parameters
        # Quantized alike, the two are the same bytes; in float one of them is stored transposed.
        shared = tied and weight.bits > 0 and weight == embedding
        bits += 0 if shared else 8 * sum(_parts(weight, FLOAT_BYTES[manifest.dtype]).values())
    return parameters, bits


def _parts(weight: WeightInfo, float_bytes: int) -> dict[str, int]:
    """Bytes on disk of the parts of a weight."""
    if weight.bits == 0:
        return {"float": weight.parameters * float_bytes}
    blocks = weight.parameters // max(1, weight.block_size)
    scale_bytes = float_bytes if weight.activations == FLOAT else 4
    parts = {"codes": weight.parameters * weight.bits // 8, "scales": blocks * scale_bytes}
    return parts if weight.symmetric else parts | {"zero_points": blocks * weight.bits // 8}


def _weights(manifest: Manifest, config: ExaoneConfig, float_bytes: int) -> Weights:
    weights = Weights(tables=rotary_bytes(config, float_bytes) if manifest.graph(DECODER) is not None else 0)
    for path, weight in manifest.weights.items():
        weights = weights.with_weight(path, _parts(weight, float_bytes))
    return weights


def _by_scheme(weights: Mapping[str, WeightInfo]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for path, weight in weights.items():
        if path == f"{MTP}.lm_head":
            continue
        scheme = Scheme(
            weight.bits, weight.block_size, weight.symmetric, weight.method, weight.activations, weight.rotate
        )
        label = str(scheme) if weight.bits else "float"
        totals[label] = totals.get(label, 0) + weight.parameters
    return totals


def _graphs(folder: Path, manifest: Manifest) -> tuple[GraphSummary, ...]:
    graphs, counted = [], set[str]()
    for graph in manifest.graphs:
        own = {graph.file, *graph.data} - counted
        counted |= own
        graphs.append(
            GraphSummary(
                name=graph.name,
                file=graph.file,
                bytes=sum(manifest.files[name].size for name in own),
                inputs=tuple(tensor.name for tensor in graph.inputs),
                outputs=tuple(tensor.name for tensor in graph.outputs),
                ops=dict(sorted(read_onnx(bundle_path(folder, graph.file)).ops.items())),
            )
        )
    return tuple(graphs)
