"""Streams graphs to disk: ``<graph>.onnx`` with the structure, ``<graph>.onnx.data`` with the weights, or other names.

One initializer at a time is asked for its bytes, which go straight to the file; nothing is kept. Equal tensors, of one
graph or of two, are stored once. The same models give the same bytes. With a journal, parts that an earlier run
finished are checked and kept, and their tensors are asked for nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter import disk, parts
from exporter.bind import DEDUP
from exporter.datafile import ALIGNMENT, DataFile
from exporter.journal import Entry, Journal, Tensor
from exporter.layout import OWN, Naming
from exporter.parts import INLINE_BYTES, Part, tensor_of
from model.bundle import FileInfo, GraphInfo, TensorInfo
from model.progress import Progress

__all__ = ["ALIGNMENT", "INLINE_BYTES", "Guard", "Written", "predicted_bytes", "write_models"]

SHARED_BYTES = 1 << 20  # from this size on, tensors of equal content are stored once for all graphs


@dataclass
class Written:
    """What was written.

    Attributes:
        graphs: in the order of the models.
        files: name → size and sha256.
        stored: "<graph>/<initializer>" → bytes it takes, 0 where it shares an earlier one's.
        resumed_parts, resumed_bytes: what of it an earlier run had written.
    """

    graphs: list[GraphInfo] = field(default_factory=list)
    files: dict[str, FileInfo] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    resumed_parts: int = 0
    resumed_bytes: int = 0


@dataclass(frozen=True)
class Guard:
    """What happens around each part.

    Attributes:
        journal: of finished parts; None keeps none.
        confirm: called before a part counts; raises if the source has changed.
        release: told each source file that no tensor will be read from any more; None if nobody wants to know.
    """

    journal: Journal | None = None
    confirm: Callable[[], None] | None = None
    release: Callable[[Path], None] | None = None


def write_models(
    models: Mapping[str, ir.Model],
    folder: Path,
    progress: Progress,
    guard: Guard = Guard(),
    naming: Naming = OWN,
) -> Written:
    """Writes every graph and its weights into `folder`, in files that are called as `naming` says.

    The models' initializers point into the written files afterwards.

    Raises:
        NumericalError, CheckpointError: from reading a weight.
        ResourceError: the disk gives back something else than was written.
        OSError: the disk is full, or the like.
    """
    plan = {name: parts.split(name, model) for name, model in models.items()}
    for home in naming.folders:
        if not (folder / home).is_dir():  # an interrupted export may have made it
            disk.make_folder(folder / home)
    writer = _Writer(folder, progress, guard, plan, naming)
    for name, model in models.items():
        writer.write(name, model)
    for home in (*naming.folders, ""):
        disk.sync_folder(folder / home)
    return writer.written


def predicted_bytes(models: Mapping[str, ir.Model]) -> int:
    """Upper bound of what the data files will take, without asking any tensor for its bytes."""
    initializers = (value for model in models.values() for value in model.graph.initializers.values())
    sizes = (tensor_of(value).nbytes for value in initializers if parts.is_large(tensor_of(value)))
    return sum(size + ALIGNMENT for size in sizes)


class _Writer:
    """Writes graphs one after another, and remembers what is stored where."""

    def __init__(
        self, folder: Path, progress: Progress, guard: Guard, plan: Mapping[str, list[Part]], naming: Naming
    ) -> None:
        self.folder, self.progress, self.guard, self.plan = folder, progress, guard, plan
        self.naming = naming
        self.written = Written()
        self._places: dict[object, Tensor] = {}
        self._small: dict[object, bytes] = {}
        self._last_reads = parts.last_reads([part for some in plan.values() for part in some])

    def write(self, name: str, model: ir.Model) -> None:
        """Writes one graph."""
        self.progress.start(f"writing {name}", parts.total_bytes(self.plan[name]), "bytes")
        data = self._write_data(name)
        self.progress.finish()
        self._count_small(name, model)
        file = self.naming.file(name)
        content = _serialize(model)
        disk.write_file(self.folder / file, content)
        self.written.files[file] = FileInfo(len(content), hashlib.sha256(content).hexdigest())
        ends = _infos(model, model.graph.inputs), _infos(model, model.graph.outputs)
        self.written.graphs.append(GraphInfo(name, file, data, *ends))

    def _write_data(self, graph: str) -> tuple[str, ...]:
        """Writes one graph's parts; returns the data files that it reads, its own first."""
        path = self.folder / self.naming.data_file(graph)
        home, own = path.parent, path.name
        data = DataFile(path, self.progress.advance)
        used: set[str] = set()
        try:
            disk.sync_folder(home)
            for part in self.plan[graph]:
                used.update(self._write_part(graph, part, data))
            info = data.close()
        finally:
            data.release()
        if own in used:
            self.written.files[self.naming.data_file(graph)] = info
        else:
            disk.remove_file(path)
        ordered = sorted(used, key=lambda file: (file != own, file))
        return tuple((home / file).relative_to(self.folder).as_posix() for file in ordered)

    def _write_part(self, graph: str, part: Part, data: DataFile) -> list[str]:
        """Writes a part, or finds it written; returns the files that its tensors are in."""
        guard, journal = self.guard, self.guard.journal
        entry = journal.take(part.name) if journal is not None else None
        if journal is not None and entry is not None and not self._accept(graph, part, entry, data):
            journal.reject()
            entry = None
        if entry is None:
            entry = self._make(graph, part, data)
            if guard.confirm is not None:
                guard.confirm()
            if journal is not None:
                journal.append(entry)
        else:
            self.written.resumed_parts += 1
        self._bind(graph, part, entry)
        if guard.release is not None:
            for path in sorted(self._last_reads.get(part.name, ())):
                guard.release(path)
        return [tensor.file for tensor in entry.tensors]

    def _make(self, graph: str, part: Part, data: DataFile) -> Entry:
        """Asks a part's tensors for their bytes and makes them durable."""
        tensors, fresh = [], []
        for value in part.large:
            tensor, name = tensor_of(value), str(value.name)
            place, new = self._places.get(self._key(graph, tensor)), False
            if place is not None:
                self.progress.advance(tensor.nbytes)
            else:
                before = data.size
                added = data.add(tensor, name)
                place = self._places.get(self._content(graph, added))
                if place is None:
                    place, new = added, True
                    fresh.append(added)
                else:
                    data.take_back(before)
            tensors.append(replace(place, name=name))
            self._remember(graph, value, place, fresh=new)
        small = {str(value.name): self._evaluate(tensor_of(value)) for value in part.small}
        if fresh:
            data.settle(fresh)
        return Entry(part.name, tuple(tensors), small)

    def _accept(self, graph: str, part: Part, entry: Entry, data: DataFile) -> bool:
        """Whether a part lies on the disk as its entry says, and as it would be written now."""
        small = {str(value.name): tensor_of(value).nbytes for value in part.small}
        large = [(str(value.name), tensor_of(value).nbytes) for value in part.large]
        if small != {name: len(content) for name, content in entry.small.items()}:
            return False
        if large != [(tensor.name, tensor.length) for tensor in entry.tensors]:
            return False
        fresh: dict[object, Tensor] = {}
        for value, tensor in zip(part.large, entry.tensors, strict=True):
            content = self._content(graph, tensor)
            place = self._places.get(self._key(graph, tensor_of(value))) or self._places.get(content)
            place = place or fresh.setdefault(content, tensor)
            if replace(place, name=tensor.name) != tensor:
                return False
        if not data.accept(fresh.values()):
            return False
        for value, tensor in zip(part.large, entry.tensors, strict=True):
            new = tensor in fresh.values()
            self.progress.advance(0 if new else tensor.length)
            self.written.resumed_bytes += tensor.length if new else 0
            self._remember(graph, value, tensor, fresh=new)
        for value in part.small:
            key = tensor_of(value).meta.get(DEDUP)
            if key is not None:
                self._small[key] = entry.small[str(value.name)]
        return True

    def _remember(self, graph: str, value: ir.Value, place: Tensor, *, fresh: bool) -> None:
        key = self._key(graph, tensor_of(value))
        if key is not None:
            self._places[key] = place
        self._places.setdefault(self._content(graph, place), place)
        self.written.stored[f"{graph}/{value.name}"] = place.length if fresh else 0

    def _evaluate(self, tensor: ir.TensorProtocol) -> bytes:
        key = tensor.meta.get(DEDUP)
        if key in self._small:
            return self._small[key]
        content = tensor.numpy().tobytes()
        if key is not None:
            self._small[key] = content
        return content

    def _bind(self, graph: str, part: Part, entry: Entry) -> None:
        """Lets the initializers of a finished part point to their bytes."""
        home = (self.folder / self.naming.file(graph)).parent
        for value, place in zip(part.large, entry.tensors, strict=True):
            tensor = tensor_of(value)
            value.const_value = ir.ExternalTensor(
                place.file, place.offset, place.length, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=str(value.name), base_dir=home,
            )  # fmt: skip
        for value in part.small:
            tensor = tensor_of(value)
            flat = np.frombuffer(entry.small[str(value.name)], tensor.dtype.numpy())
            array = flat.reshape(tuple(tensor.shape.numpy()))
            value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=value.name)

    def _count_small(self, graph: str, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            if not parts.is_large(tensor_of(value)):
                self.written.stored[f"{graph}/{value.name}"] = tensor_of(value).nbytes

    def _key(self, graph: str, tensor: ir.TensorProtocol) -> object:
        """The same for tensors that are known to be equal before they are read; None for one that is like no other."""
        key = tensor.meta.get(DEDUP)
        return key if key is None or self.naming.shared else (graph, key)

    def _content(self, graph: str, tensor: Tensor) -> object:
        """The same for tensors stored once: graphs share what is large, but a few zeros should not tie them."""
        shared = self.naming.shared and tensor.length >= SHARED_BYTES
        return "" if shared else graph, tensor.sha256, tensor.length


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
