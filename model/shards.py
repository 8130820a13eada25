"""The safetensors files of a checkpoint folder: which they are, whether they are sound, and where each tensor lies.

Structure is validated by the safetensors library. Bytes are then read with plain reads at known offsets and never
mapped into memory: mapped pages would count as memory of this process.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model.errors import BundleError, CheckpointError, printable
from model.header import AGAIN, read_header
from model.header import WHAT as WHAT
from model.jsonfile import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    # Parts of quantized weights.
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
FLOATS = ("F32", "F16", "BF16")  # what a weight that is not quantized may be
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

log = logging.getLogger("exaone_export.model")

# Waits until a file's bytes are there, and gives the path to read them from for as long as the block lasts.
Gate = Callable[[Path], AbstractContextManager[Path]]


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies: `nbytes` bytes at `offset` of `file`. `dtype` is safetensors' name ("BF16").

    With a `gate`, `file` has the true header and size, but its bytes are wherever the gate says.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    gate: Gate | None = field(default=None, compare=False, repr=False)

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """The stored tensors that the values come from: itself."""
        return (self,)

    @property
    def label(self) -> str:
        """How it is quantized: not at all."""
        return ""

    def open(self) -> Callable[[int, int], NDArray[Any]]:
        """What reads rows, for many calls."""
        return self.rows

    def read(self) -> NDArray[Any]:
        """The whole tensor, in its own dtype (float32, float16, ml_dtypes.bfloat16, or that of `DTYPES`).

        Raises:
            CheckpointError: the dtype is none of those, or the file has become shorter.
        """
        if not self.shape:
            return self._bytes(0, self.nbytes).reshape(())
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop of the first dimension. Raises as `read`."""
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return self._bytes(start * row, (stop - start) * row).reshape(stop - start, *self.shape[1:])

    def _bytes(self, start: int, count: int) -> NDArray[Any]:
        dtype = DTYPES.get(self.dtype)
        if dtype is None:
            raise CheckpointError(WHAT, self.name, f"values of type {self.dtype} are not supported")
        flat = np.empty(count, np.uint8)
        place = nullcontext(self.file) if self.gate is None else self.gate(self.file)
        with place as path:
            self._fill(flat.data, path, self.offset + start)
        return flat.view(dtype)

    def _fill(self, view: memoryview, path: Path, position: int) -> None:
        done = 0
        try:
            with path.open("rb", buffering=0) as stream:
                stream.seek(position)
                while done < len(view):
                    step = stream.readinto(view[done:])
                    if not step:
                        why = "the file became shorter while it was read"
                        raise CheckpointError(WHAT, self.file.name, why, AGAIN)
                    done += step
        except OSError as reason:
            raise CheckpointError(WHAT, self.file.name, reason.strerror or "it cannot be read", AGAIN) from None


def open_shards(folder: Path) -> tuple[dict[str, TensorRef], tuple[Path, ...]]:
    """Finds and validates a checkpoint's safetensors files, without reading a weight.

    Returns:
        Tensor name → place, and the files (shards, and the index where there is one).

    Raises:
        CheckpointError: a file is missing, damaged or inconsistent with the index; only pickled weights are there.
        BundleError: a name in the index or a link leads outside the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(WHAT, folder.name, "not a folder", "Name a folder with config.json and safetensors")
    if _lexists(folder / SINGLE):
        path = ordinary_file(folder, SINGLE)
        return _read_header(path), (path,)
    if not _lexists(folder / INDEX):
        raise _nothing_usable(folder)
    index = ordinary_file(folder, INDEX)
    return _open_indexed(folder, index)


def ordinary_file(folder: Path, name: str) -> Path:
    """The path of a checkpoint's file, known to be a plain file that belongs to the checkpoint.

    A symbolic link may lead elsewhere in the folder, or to ``blobs`` of the hub cache that the folder is part of.

    Raises:
        BundleError: the name or a link leads outside.
        CheckpointError: missing, or a folder, pipe or device.
    """
    refuse_way_out(name)
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
            raise BundleError(
                "refusing checkpoint", name, "a link that leads outside the folder", "Copy the file itself"
            )
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(WHAT, name, "the file does not exist", "Download the missing file") from None
    except (OSError, RuntimeError, ValueError) as reason:  # links in a circle; a name that no file can have
        raise CheckpointError(WHAT, name, getattr(reason, "strerror", None) or "it cannot be opened") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(WHAT, name, "it is not an ordinary file")
    return path


def refuse_way_out(name: str) -> None:
    """Refuses a file name from an index that is absolute, climbs, or means something else on another system.

    Raises:
        BundleError: with the name.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or "\0" in name or ":" in name or ".." in parts:
        raise BundleError("refusing checkpoint", repr(name[:80]), "a file name that leads outside the folder")


def _lexists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _nothing_usable(folder: Path) -> CheckpointError:
    names = sorted(entry.name for entry in folder.iterdir())
    pickled = next((name for name in names if name.endswith(PICKLED)), None)
    if pickled:
        return CheckpointError(
            WHAT, pickled, "pickled weights can run code and are never opened",
            "Use the safetensors files of the same model, or convert it",
        )  # fmt: skip
    return CheckpointError(WHAT, folder.name, f"neither {SINGLE} nor {INDEX} is in the folder", "Check the folder")


def _open_indexed(folder: Path, index: Path) -> tuple[dict[str, TensorRef], tuple[Path, ...]]:
    raw = read_json_object(index, CheckpointError, WHAT)
    weight_map = _weight_map(raw)
    paths = [ordinary_file(folder, name) for name in sorted(set(weight_map.values()))]
    tensors: dict[str, TensorRef] = {}
    for path in paths:
        for name, ref in _read_header(path).items():
            if name in tensors:
                both = f"it is in {tensors[name].file.name} and in {path.name}"
                raise CheckpointError(WHAT, name, both, "Keep one of the two")
            tensors[name] = ref
    _compare_with_index(tensors, weight_map)
    metadata = raw.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(ref.nbytes for ref in tensors.values())
    if stated is not None and stated != actual:
        log.warning("%s says %s bytes of weights, the files hold %d", INDEX, printable(str(stated), 40), actual)
    return tensors, (*paths, index)


def _weight_map(raw: Mapping[str, Any]) -> dict[str, str]:
    """Tensor name → shard, every shard a name in the folder itself."""
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(WHAT, INDEX, "weight_map is not an object of file names")
    for shard in sorted(set(weight_map.values())):
        refuse_way_out(shard)
        if len(PurePosixPath(shard).parts) > 1:
            raise CheckpointError(
                WHAT, INDEX, f"the shard {printable(shard, 80)} is not in the checkpoint's own folder"
            )
    return {name: str(PurePosixPath(shard)) for name, shard in weight_map.items()}


def _compare_with_index(tensors: Mapping[str, TensorRef], weight_map: Mapping[str, str]) -> None:
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(WHAT, name, f"{INDEX} puts it in {shard}, where it is not", AGAIN)
        if tensors[name].file.name != shard:
            found = tensors[name].file.name
            raise CheckpointError(WHAT, name, f"{INDEX} puts it in {shard}, but it is in {found}", AGAIN)
    for name, ref in tensors.items():
        if name not in weight_map:
            raise CheckpointError(WHAT, name, f"it is in {ref.file.name}, but {INDEX} does not list it", AGAIN)


def _read_header(path: Path) -> dict[str, TensorRef]:
    return {
        entry.name: TensorRef(entry.name, entry.dtype, entry.shape, path, entry.offset, entry.nbytes)
        for entry in read_header(path)
    }
