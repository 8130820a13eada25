"""Streams graphs to disk: ``<graph>.onnx`` with the structure, ``<graph>.onnx.data`` with the weights.

One initializer at a time is asked for its bytes, which go straight to the file and into its hash; nothing is kept.
Equal tensors, of one graph or of two, are stored once. The same models give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from exporter.bind import DEDUP
from model.bundle import FileInfo, GraphInfo, TensorInfo
from model.progress import Progress

INLINE_BYTES = 1024  # smaller tensors stay inside the .onnx file
SHARED_BYTES = 1 << 20  # from this size on, tensors of equal content are stored once for all graphs
ALIGNMENT = 4096  # a page, so that a runtime can map a tensor where it lies


@dataclass
class Written:
    """What was written.

    Attributes:
        graphs: in the order of the models.
        files: name → size and sha256.
        stored: "<graph>/<initializer>" → bytes it takes, 0 where it shares an earlier one's.
    """

    graphs: list[GraphInfo] = field(default_factory=list)
    files: dict[str, FileInfo] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    length: int


class _DataFile:
    """An external data file being written: aligned, hashed on the way, and able to take back its last tensor."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path, self.progress = path, progress
        self.stream: BinaryIO = path.open("xb", buffering=0)
        self.size = 0
        self.hash = hashlib.sha256()
        self.tensor_hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        """What `tofile` calls; counts and hashes."""
        view = memoryview(data).cast("B")
        self._append(view)
        self.tensor_hash.update(view)
        self.progress.advance(view.nbytes)
        return view.nbytes

    def add(self, tensor: ir.TensorProtocol, known: Mapping[object, _Place], scope: str) -> tuple[object, _Place]:
        """Appends a tensor; if one with the same content is in `known`, takes it back and returns that one's place."""
        before = self.size, self.hash.copy()
        self._append(memoryview(bytes(-self.size % ALIGNMENT)))
        offset = self.size
        self.tensor_hash = hashlib.sha256()
        readable: Any = tensor  # every class has `tofile`, the protocol does not yet
        readable.tofile(self)
        length = self.size - offset
        if length != tensor.nbytes:
            raise ValueError(f"tensor {tensor.name} gave {length} bytes instead of {tensor.nbytes}")
        content = (scope, self.tensor_hash.digest(), length)
        if content in known:
            self.size, self.hash = before
            self.stream.truncate(self.size)
            self.stream.seek(self.size)
            return content, known[content]
        return content, _Place(self.path.name, offset, length)

    def close(self) -> FileInfo:
        """Makes the file durable."""
        os.fsync(self.stream.fileno())
        self.stream.close()
        return FileInfo(self.size, self.hash.hexdigest())

    def _append(self, view: memoryview) -> None:
        done = 0
        while done < view.nbytes:
            done += self.stream.write(view[done:])
        self.hash.update(view)
        self.size += view.nbytes


def write_models(models: Mapping[str, ir.Model], folder: Path, progress: Progress) -> Written:
    """Writes every graph and its weights into `folder`.

    The models' initializers point into the written files afterwards.

    Raises:
        NumericalError, CheckpointError: from reading a weight.
        OSError: the disk is full, or the like.
    """
    written = Written()
    known: dict[object, _Place] = {}
    for name, model in models.items():
        progress.start(f"writing {name}", sum(v.nbytes for _, v in _external(model)), "bytes")
        data = _write_data(name, model, folder, known, written, progress)
        progress.finish()
        file = f"{name}.onnx"
        content = _serialize(model)
        write_file(folder / file, content)
        written.files[file] = FileInfo(len(content), hashlib.sha256(content).hexdigest())
        ends = _infos(model, model.graph.inputs), _infos(model, model.graph.outputs)
        written.graphs.append(GraphInfo(name, file, data, *ends))
    sync(folder)
    return written


def predicted_bytes(models: Mapping[str, ir.Model]) -> int:
    """Upper bound of what the data files will take, without asking any tensor for its bytes."""
    return sum(tensor.nbytes + ALIGNMENT for model in models.values() for _, tensor in _external(model))


def write_file(path: Path, content: bytes) -> None:
    """Writes a new file and makes it durable."""
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _external(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            raise ValueError(f"the initializer {value.name} has no value")
        if tensor.nbytes > INLINE_BYTES:
            yield value, tensor


def _write_data(
    name: str, model: ir.Model, folder: Path, known: dict[object, _Place], written: Written, progress: Progress
) -> tuple[str, ...]:
    """Writes one graph's large initializers; returns the data files that it reads, its own first."""
    own = f"{name}.onnx.data"
    data = _DataFile(folder / own, progress)
    used = set()
    try:
        for value, tensor in list(_external(model)):
            key = tensor.meta.get(DEDUP)
            if key is not None and key in known:
                place, fresh = known[key], False
                progress.advance(tensor.nbytes)
            else:
                # Graphs share what is large; for a few equal zeros it is not worth tying them together.
                content, place = data.add(tensor, known, "" if tensor.nbytes >= SHARED_BYTES else name)
                fresh = content not in known
                known[content] = place
            if key is not None:
                known[key] = place
            used.add(place.file)
            written.stored[f"{name}/{value.name}"] = place.length if fresh else 0
            value.const_value = ir.ExternalTensor(
                place.file, place.offset, place.length, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=str(value.name), base_dir=folder,
            )  # fmt: skip
        info = data.close()
    finally:
        data.stream.close()
    if own in used:
        written.files[own] = info
    else:
        (folder / own).unlink()
    _evaluate_small(name, model, written)
    return tuple(sorted(used, key=lambda file: (file != own, file)))


def _evaluate_small(name: str, model: ir.Model, written: Written) -> None:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= INLINE_BYTES:
            written.stored[f"{name}/{value.name}"] = tensor.nbytes
            if isinstance(tensor, ir.LazyTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)


def _serialize(model: ir.Model) -> bytes:
    content: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return content


def _infos(model: ir.Model, values: Any) -> tuple[TensorInfo, ...]:
    """Names, numpy's names of the types, and shapes; an input that is also an initializer has a default."""
    infos = []
    for value in values:
        if value.dtype is None or value.shape is None:
            raise ValueError(f"{value.name} has no type or no shape")
        shape = tuple(size if isinstance(size, int) else str(size.value or "?") for size in value.shape)
        dtype = value.dtype.numpy().name
        infos.append(TensorInfo(str(value.name), dtype, shape, optional=value.name in model.graph.initializers))
    return tuple(infos)
