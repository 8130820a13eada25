"""A graph's external data file while it grows: aligned tensors, read back and hashed before they count."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter import disk
from exporter.journal import Tensor
from model.bundle import FileInfo
from model.errors import ResourceError

ALIGNMENT = 4096  # a page, so that a runtime can map a tensor where it lies


class DataFile:
    """An external data file.

    Bytes behind `size` are not part of it, whatever an earlier run or a tensor taken back left there.

    Args:
        path: of the file, which may be there from an earlier run.
        advance: is told the bytes of tensors written, or found written.

    Attributes:
        size: bytes so far, with tensors that are not settled yet.
    """

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self.path, self.size = path, 0
        self._advance = advance
        self._handle = disk.open_file(path)
        self._settled = 0
        self._hash = hashlib.sha256()
        self._tensor_hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        """What a tensor's `tofile` calls."""
        view = memoryview(data).cast("B")
        disk.write_at(self._handle, view, self.size, self.path)
        disk.start_writing(self._handle, self.size, view.nbytes)
        self._tensor_hash.update(view)
        self.size += view.nbytes
        self._advance(view.nbytes)
        return view.nbytes

    def add(self, tensor: ir.TensorProtocol, name: str) -> Tensor:
        """Appends a tensor."""
        offset = aligned(self.size)
        if offset > self.size:
            disk.write_at(self._handle, memoryview(bytes(offset - self.size)), self.size, self.path)
        self.size = offset
        self._tensor_hash = hashlib.sha256()
        readable: Any = tensor  # every class has `tofile`, the protocol does not yet
        readable.tofile(self)
        length = self.size - offset
        if length != tensor.nbytes:
            raise ValueError(f"tensor {name} gave {length} bytes instead of {tensor.nbytes}")
        return Tensor(name, self.path.name, offset, length, self._tensor_hash.hexdigest())

    def take_back(self, size: int) -> None:
        """Forgets what was added behind `size`, which was the file's size before."""
        self.size = size

    def settle(self, tensors: Iterable[Tensor]) -> None:
        """Makes the tensors added since last time durable, and reads them back.

        Raises:
            ResourceError: the file does not hold what was written.
        """
        disk.sync(self._handle, self.path)
        if not self._read_back(tensors):
            why = "what is read back is not what was written"
            raise ResourceError("cannot write bundle", self.path.name, why, "Check this machine's disk and memory")

    def accept(self, tensors: Iterable[Tensor]) -> bool:
        """Goes on behind tensors that an earlier run wrote, if they lie where they would now and their hashes hold."""
        wanted = tuple(tensors)
        end = self._settled
        for tensor in wanted:
            if (tensor.file, tensor.offset) != (self.path.name, aligned(end)):
                return False
            end = tensor.offset + tensor.length
        if not self._read_back(wanted):
            return False
        self.size = end
        for tensor in wanted:
            self._advance(tensor.length)
        return True

    def close(self) -> FileInfo:
        """Gives the file its length and makes it durable."""
        if os.fstat(self._handle).st_size != self.size:
            disk.truncate(self._handle, self.size, self.path)
            disk.sync(self._handle, self.path)
        self.release()
        return FileInfo(self.size, self._hash.hexdigest())

    def release(self) -> None:
        """Closes the file as it is; a second time does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _read_back(self, tensors: Iterable[Tensor]) -> bool:
        """Hashes tensors from the file, for the whole file's hash too; False, and nothing counts, if one is wrong."""
        whole, end = self._hash.copy(), self._settled
        for tensor in tensors:
            gap = b"".join(disk.read_at(self._handle, end, tensor.offset - end))
            if gap != bytes(tensor.offset - end):
                return False
            whole.update(gap)
            own = hashlib.sha256()
            for block in disk.read_at(self._handle, tensor.offset, tensor.length):
                own.update(block)
                whole.update(block)
            if own.hexdigest() != tensor.sha256:
                return False
            end = tensor.offset + tensor.length
        self._hash, self._settled = whole, end
        return True


def aligned(size: int) -> int:
    """Where the next tensor begins behind `size` bytes."""
    return size + -size % ALIGNMENT
