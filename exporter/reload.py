"""Reads a float bundle's graphs back, their weights lazy, so that they can be changed and written again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import onnx_ir as ir

from exporter.bind import WeightTensor
from model.bundle import MANIFEST, MTP, GraphInfo, Manifest, bundle_path, check_contents, check_sizes, read_manifest
from model.config import ExaoneConfig
from model.errors import BundleError, UsageError
from model.shards import DTYPES, TensorRef
from model.source import WeightSource
from model.weights import expected_tensors, with_shared

_DTYPES = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16"}
_AGAIN = "Export it again"


def open_float_bundle(bundle: Path) -> tuple[Manifest, dict[str, Path]]:
    """The manifest of a bundle that is not quantized, and its files by name, itself included.

    Raises:
        BundleError: damaged, or not made by this package.
        UsageError: quantized already.
    """
    manifest = read_manifest(bundle)
    if manifest.recipe != "none":
        raise UsageError(
            "cannot quantize", bundle.name, f"it is already quantized ({manifest.recipe[:40]})",
            "Give the float bundle, or export the checkpoint with --quantize",
        )  # fmt: skip
    check_sizes(bundle, manifest)
    check_contents(bundle, manifest)  # what is read before all is hashed: configuration, structure
    return manifest, {name: bundle_path(bundle, name) for name in (*manifest.files, MANIFEST)}


def load_graphs(bundle: Path, manifest: Manifest, digests: Mapping[str, str]) -> dict[str, ir.Model]:
    """A float bundle's graphs.

    Args:
        bundle: its folder.
        manifest: as `open_float_bundle` gave it.
        digests: file name → sha256 of what is in the folder.

    Raises:
        BundleError: a file is not what the manifest says.
    """
    for name, info in manifest.files.items():
        if digests[name] != info.sha256:
            raise BundleError("damaged bundle", name, "its sha256 is not the one in the manifest", _AGAIN)
    models = {}
    for graph in manifest.graphs:
        try:
            models[graph.name] = ir.load(bundle / graph.file)
        except Exception as reason:  # noqa: BLE001 - protobuf and onnx_ir raise many kinds
            raise BundleError(
                "damaged bundle", graph.file, f"not an ONNX model ({type(reason).__name__})", _AGAIN
            ) from None
        _make_lazy(models[graph.name], graph, bundle, manifest)
    return models


def declared_weights(bundle: Path, manifest: Manifest, config: ExaoneConfig) -> dict[str, WeightSource]:
    """What `Checkpoint.bind` gives for a checkpoint, as far as a bundle's manifest and configuration tell it.

    Shapes and sizes are true, places only tell weights apart: nothing can be read from them.

    Raises:
        BundleError: the manifest names no known type.
    """
    draft = any(graph.name == MTP for graph in manifest.graphs)
    dtype = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}.get(manifest.dtype)
    if dtype is None:
        raise BundleError("damaged bundle", MANIFEST, f"its dtype is {manifest.dtype[:20]!r}", _AGAIN)
    weights: dict[str, WeightSource] = {}
    for place, (name, shape) in enumerate(expected_tensors(config, draft).items()):
        size = math.prod(shape) * DTYPES[dtype].itemsize
        weights[name] = TensorRef(name, dtype, shape, bundle, place, size)
    return with_shared(weights, config, draft=draft)


def _make_lazy(model: ir.Model, graph: GraphInfo, bundle: Path, manifest: Manifest) -> None:
    """Replaces tensors that would be mapped into memory by ones that are read piece by piece."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype not in _DTYPES:
            continue
        shape = tuple(int(size) for size in tensor.shape.numpy())
        home = PurePosixPath(graph.file).parent
        name, offset = (home / str(tensor.location)).as_posix(), tensor.offset or 0
        file, listed = bundle_path(bundle, name), manifest.files.get(name)
        if listed is None or offset < 0 or offset + tensor.nbytes > listed.size:
            raise BundleError("damaged bundle", str(value.name), "its data lies outside the bundle's files", _AGAIN)
        ref = TensorRef(str(value.name), _DTYPES[tensor.dtype], shape, file, offset, tensor.nbytes)
        value.const_value = WeightTensor(ref, tensor.dtype, shape, transposed=False, name=str(value.name))
