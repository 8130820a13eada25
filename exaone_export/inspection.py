"""What is in a bundle, or what a checkpoint would become: graphs, sizes, bits, memory. Needs neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from exaone_export.forecast import forecast, interface
from exaone_export.onnx_file import read_onnx
from model.bundle import DECODER, MANIFEST, MTP, Manifest, WeightInfo, bundle_path, check_sizes, read_manifest
from model.config import ExaoneConfig, load_config
from model.errors import BundleError, UsageError
from quantize.scheme import Scheme
from runtime.memory import kv_bytes_per_token, weight_bytes

CONTEXTS = (4096, 32768)
_FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class GraphSummary:
    """One graph. `bytes` counts its own files, a data file shared with an earlier graph not again.

    Attributes:
        name, file, bytes: of the graph.
        inputs, outputs: names.
        ops: operator → number of nodes; empty for a checkpoint, which has no graphs yet.
    """

    name: str
    file: str
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        model_type, task: as in the manifest.
        graphs: of the bundle; for a checkpoint those it would be exported as, in float32.
        bits_per_weight: stored bits of all weights over their number, scales and zero points included.
        quantized: scheme ("int4 g32 sym rtn", "float"; for a checkpoint its own types) → number of weights.
        parameters: number of weights.
        bytes: of all files; for a checkpoint of its weight files.
        kv_bytes_per_token: keys and values of one token, all layers together, as the runtime keeps them.
        memory_bytes: tokens in context → bytes of weights and cache; images and activations come on top.
        predicted_bytes: recipe → weights of the bundle that exporting the checkpoint would give; empty for a bundle.
    """

    model_type: str
    task: str
    graphs: tuple[GraphSummary, ...]
    bits_per_weight: float
    quantized: Mapping[str, int]
    parameters: int
    bytes: int
    kv_bytes_per_token: int
    memory_bytes: Mapping[int, int]
    predicted_bytes: Mapping[str, int] = field(default_factory=dict)


def inspect(folder: Path, context: int | None = None) -> Inspection:
    """Describes a bundle's or a checkpoint's folder.

    Args:
        folder: what to look at; a manifest in it makes it a bundle.
        context: tokens to reckon memory for; None takes 4096, 32768 and the most the model allows.

    Raises:
        UsageError: no such folder, neither kind, or a context beyond the model's.
        BundleError: the bundle is damaged.
        CheckpointError: the checkpoint is damaged.
    """
    if not folder.is_dir():
        raise UsageError("cannot inspect", str(folder), "no such folder", "Name a bundle's or a checkpoint's folder")
    if (folder / MANIFEST).exists() or (folder / f"{DECODER}.onnx").exists():
        return _inspect_bundle(folder, context)
    if not (folder / "config.json").exists():
        why = f"neither {MANIFEST} nor config.json is in it"
        raise UsageError("cannot inspect", str(folder), why, "Name a bundle's or a checkpoint's folder")
    return _inspect_checkpoint(folder, context)


def _inspect_bundle(folder: Path, context: int | None) -> Inspection:
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    config = load_config(folder)
    if manifest.dtype not in _FLOAT_BYTES:
        raise BundleError("cannot open bundle", MANIFEST, f"unknown dtype {manifest.dtype[:40]!r}", "Export it again")
    parameters, bits = _count(manifest, config)
    value_bytes = _FLOAT_BYTES[manifest.dtype]
    return Inspection(
        model_type=manifest.model_type,
        task=manifest.task,
        graphs=_graphs(folder, manifest),
        bits_per_weight=bits / max(1, parameters),
        quantized=_by_scheme(manifest.weights),
        parameters=parameters,
        bytes=sum(info.size for info in manifest.files.values()),
        kv_bytes_per_token=kv_bytes_per_token(config.text, value_bytes),
        memory_bytes=_memory(config, context, weight_bytes(manifest, manifest.graphs), value_bytes),
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
        bits += 0 if shared else weight.parameters * stored_bits(weight, manifest.dtype)
    return parameters, bits


def stored_bits(weight: WeightInfo, dtype: str) -> float:
    """Bits on disk of one parameter of a weight, its share of scales and zero points included."""
    scale = 8 * _FLOAT_BYTES[dtype]
    if weight.bits == 0:
        return scale
    zero_point = 0 if weight.symmetric else weight.bits
    return weight.bits + (scale + zero_point) / max(1, weight.block_size)


def _by_scheme(weights: Mapping[str, WeightInfo]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for path, weight in weights.items():
        if path == f"{MTP}.lm_head":
            continue
        scheme = Scheme(weight.bits, weight.block_size, weight.symmetric, weight.method)
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


def _inspect_checkpoint(folder: Path, context: int | None) -> Inspection:
    from model.weights import Checkpoint  # needs safetensors, which running bundles does not

    config = load_config(folder)
    checkpoint = Checkpoint.open(folder)
    bound = checkpoint.bind(config)
    by_type: dict[str, int] = {}
    stored = {(ref.file, ref.offset): ref for ref in bound.values()}.values()  # shared ones once
    for ref in stored:
        count = ref.nbytes // max(1, _type_bytes(ref.dtype))
        by_type[ref.dtype.lower()] = by_type.get(ref.dtype.lower(), 0) + count
    parameters, total = sum(by_type.values()), sum(ref.nbytes for ref in stored)
    shapes = {name: ref.shape for name, ref in bound.items()}
    expected = forecast(config, shapes)
    return Inspection(
        model_type=config.model_type,
        task="text-generation" if config.vision is None else "image-text-to-text",
        graphs=tuple(
            GraphSummary(name, f"{name}.onnx", size, *interface(name, config, checkpoint.has_draft_head))
            for name, size in expected.graphs.items()
        ),
        bits_per_weight=8 * total / max(1, parameters),
        quantized=by_type,
        parameters=parameters,
        bytes=sum(path.stat().st_size for path in checkpoint.files),
        predicted_bytes=expected.recipes,
        kv_bytes_per_token=kv_bytes_per_token(config.text),
        memory_bytes=_memory(config, context, expected.recipes["none"], _FLOAT_BYTES["fp32"]),
    )


def _type_bytes(dtype: str) -> int:
    return 4 if dtype == "F32" else 2


def _memory(config: ExaoneConfig, context: int | None, weights: int, value_bytes: int) -> dict[int, int]:
    most = config.text.max_position_embeddings
    if context is not None and not 1 <= context <= most:
        raise UsageError("cannot inspect", "--context", f"{context} is not between 1 and the model's {most} tokens")
    contexts = [context] if context is not None else [*(n for n in CONTEXTS if n < most), most]
    each = kv_bytes_per_token(config.text, value_bytes)
    return {tokens: weights + tokens * each for tokens in contexts}
