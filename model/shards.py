"""The safetensors files of a checkpoint folder: which they are, whether they are sound, and where each tensor lies.

Structure is validated by the safetensors library. Bytes are then read with plain reads at known offsets and never
mapped into memory: mapped pages would count as memory of this process.
"""

from __future__ import annotations

import json
import logging
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from model.errors import BundleError, CheckpointError
from model.jsonfile import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WHAT = "cannot read checkpoint"
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "Download or copy the file again"

log = logging.getLogger("exaone_export.model")


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies: `nbytes` bytes at `offset` of `file`. `dtype` is safetensors' name ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def read(self) -> NDArray[Any]:
        """The whole tensor, in its own dtype (float32, float16 or ml_dtypes.bfloat16).

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
        view, done = flat.data, 0
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset + start)
            while done < count:
                step = stream.readinto(view[done:])
                if not step:
                    raise CheckpointError(WHAT, self.file.name, "the file became shorter while it was read", _AGAIN)
                done += step
        return flat.view(dtype)


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
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or "\0" in name or ":" in name or ".." in parts:
        raise BundleError("refusing checkpoint", repr(name[:80]), "a file name that leads outside the folder")
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
    except (OSError, RuntimeError) as reason:  # RuntimeError: links in a circle
        raise CheckpointError(WHAT, name[:80], getattr(reason, "strerror", None) or "it cannot be opened") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(WHAT, name, "it is not an ordinary file")
    return path


def _lexists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _nothing_usable(folder: Path) -> CheckpointError:
    names = sorted(entry.name for entry in folder.iterdir())
    pickled = next((name for name in names if name.endswith(_PICKLED)), None)
    if pickled:
        return CheckpointError(
            WHAT, pickled, "pickled weights can run code and are never opened",
            "Use the safetensors files of the same model, or convert it",
        )  # fmt: skip
    return CheckpointError(WHAT, folder.name, f"neither {SINGLE} nor {INDEX} is in the folder", "Check the folder")


def _open_indexed(folder: Path, index: Path) -> tuple[dict[str, TensorRef], tuple[Path, ...]]:
    raw = read_json_object(index, CheckpointError, WHAT)
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(WHAT, INDEX, "weight_map is not an object of file names")
    names = sorted(set(weight_map.values()))
    paths = [ordinary_file(folder, name) for name in names]
    tensors: dict[str, TensorRef] = {}
    for path in paths:
        for name, ref in _read_header(path).items():
            if name in tensors:
                both = f"it is in {tensors[name].file.name} and in {path.name}"
                raise CheckpointError(WHAT, name, both, "Keep one of the two")
            tensors[name] = ref
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(WHAT, name[:120], f"{INDEX} puts it in {shard}, where it is not", _AGAIN)
        if tensors[name].file != folder / shard:
            found = tensors[name].file.name
            raise CheckpointError(WHAT, name[:120], f"{INDEX} puts it in {shard}, but it is in {found}", _AGAIN)
    metadata = raw.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(ref.nbytes for ref in tensors.values())
    if stated is not None and stated != actual:
        log.warning("%s says %s bytes of weights, the files hold %d", INDEX, stated, actual)
    return tensors, (*paths, index)


def _read_header(path: Path) -> dict[str, TensorRef]:
    try:
        with safe_open(path, framework="np"):
            pass  # opening checks the header, the names, and that the ranges tile the file exactly
    except SafetensorError as reason:
        raise CheckpointError(WHAT, path.name, _explain(path, str(reason)), _AGAIN) from None
    except OSError as reason:
        raise CheckpointError(WHAT, path.name, reason.strerror or "it cannot be opened") from None
    start, header = _header(path)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = TensorRef(name, entry["dtype"], tuple(entry["shape"]), path, start + begin, end - begin)
    return tensors


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        raw = json.loads(stream.read(length))
    if not isinstance(raw, dict):
        raise ValueError("the header is not an object")
    return 8 + length, raw


def _explain(path: Path, reason: str) -> str:
    """What a refusal of the safetensors library means, with the numbers that matter."""
    size = path.stat().st_size
    if size < 8:
        return f"{size} bytes, too short for a safetensors header"
    if "not fully covered" in reason:
        start, header = _header(path)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        need = start + max(ends, default=0)
        if need != size:
            return f"the file is {'cut short' if size < need else 'too long'}: {size} bytes, {need} expected"
    short = reason.removeprefix("Error while deserializing header: ")
    return f"not a sound safetensors file ({short[:120]})"
