"""Reads a float bundle's graphs back, their weights lazy, so that they can be changed and written again."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from exporter.bind import WeightTensor
from exporter.package import hash_files
from model.bundle import Manifest, bundle_path, check_sizes, read_manifest
from model.errors import BundleError, UsageError
from model.progress import Progress
from model.shards import TensorRef

_DTYPES = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16"}
_AGAIN = "Export it again"


def load_float_bundle(bundle: Path, progress: Progress) -> tuple[Manifest, dict[str, ir.Model]]:
    """The manifest and the graphs of an intact bundle that is not quantized.

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
    files = {name: bundle_path(bundle, name) for name in manifest.files}
    for name, digest in hash_files(files, progress).items():
        if digest != manifest.files[name].sha256:
            raise BundleError("damaged bundle", name, "its sha256 is not the one in the manifest", _AGAIN)
    models = {}
    for graph in manifest.graphs:
        try:
            models[graph.name] = ir.load(bundle / graph.file)
        except Exception as reason:  # noqa: BLE001 - protobuf and onnx_ir raise many kinds
            raise BundleError(
                "damaged bundle", graph.file, f"not an ONNX model ({type(reason).__name__})", _AGAIN
            ) from None
        _make_lazy(models[graph.name], bundle, manifest)
    return manifest, models


def _make_lazy(model: ir.Model, bundle: Path, manifest: Manifest) -> None:
    """Replaces tensors that would be mapped into memory by ones that are read piece by piece."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype not in _DTYPES:
            continue
        shape = tuple(int(size) for size in tensor.shape.numpy())
        file, offset = bundle_path(bundle, str(tensor.location)), tensor.offset or 0
        listed = manifest.files.get(file.name)
        if listed is None or offset < 0 or offset + tensor.nbytes > listed.size:
            raise BundleError("damaged bundle", str(value.name), "its data lies outside the bundle's files", _AGAIN)
        ref = TensorRef(str(value.name), _DTYPES[tensor.dtype], shape, file, offset, tensor.nbytes)
        value.const_value = WeightTensor(ref, tensor.dtype, shape, transposed=False, name=str(value.name))
