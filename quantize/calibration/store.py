"""What calibrated weights became: one file for each step, written whole, and weights that are read from there.

    <folder>/000-vision_encoder.patch_embed.safetensors     codes, scales and zero points, and what they were made from
    <folder>/000-vision_encoder.patch_embed.states          hidden states behind the step, while a later one reads them

A file counts if it was made from the same weights, prompts and recipe, and its bytes are what they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from exporter import disk
from exporter.bind import READS, write_array
from quantize.lazy import LazyParts, LazyWeight
from quantize.scheme import AnyArray

_RECORD = "calibration"
INPUT_SCALE = "input_scale"  # float32 [K], what the inputs of a weight are divided by
FORMAT = 1


class Store:
    """The files of one calibration.

    Args:
        fingerprint: another text for other weights, prompts or rules.

    Attributes:
        folder: of the files, known once the calibration begins.
    """

    def __init__(self, fingerprint: str = "") -> None:
        self.fingerprint = fingerprint
        self.folder: Path | None = None
        self._places: dict[str, Path] = {}

    def path(self, number: int, stage: str, kind: str) -> Path:
        """Of a step's file: kind is "safetensors" or "states"."""
        if self.folder is None:
            raise ValueError("the calibration has not begun")
        return self.folder / f"{number:03}-{stage}.{kind}"

    def write(self, number: int, stage: str, weights: Mapping[str, Mapping[str, AnyArray]], states: str) -> None:
        """Makes a step durable; from now on it is done.

        Args:
            number, stage: which.
            weights: module path → its packed parts.
            states: sha256 of its hidden states, which are durable already.
        """
        # Bytes, since not every reader knows every float type; shapes are known to those who read.
        arrays = {
            f"{path}/{part}": np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for path, some in weights.items()
            for part, array in some.items()
        }
        record = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "stage": stage,
            "states": states,
            "sha256": _digest(arrays),
        }
        path = self.path(number, stage, "safetensors")
        fresh = path.with_suffix(".fresh")
        disk.write_file(fresh, save(arrays, {_RECORD: json.dumps(record, sort_keys=True)}))
        disk.remove_file(path)
        disk.rename(fresh, path)
        disk.sync_folder(path.parent)
        self._remember(path, arrays)

    def find(self, number: int, stage: str) -> str | None:
        """The sha256 of the hidden states behind a step that an earlier run did; None if it did not, or not so."""
        path = self.path(number, stage, "safetensors")
        try:
            with safe_open(path, framework="numpy") as file:
                record = json.loads((file.metadata() or {}).get(_RECORD, "null"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError, ValueError):
            return None
        wanted = {"format": FORMAT, "fingerprint": self.fingerprint, "stage": stage, "sha256": _digest(arrays)}
        if not isinstance(record, dict) or {key: record.get(key) for key in wanted} != wanted:
            return None
        self._remember(path, arrays)
        return str(record.get("states"))

    def read(self, module: str, part: str) -> AnyArray:
        """The bytes of one part of a weight, uint8 [bytes].

        Raises:
            ValueError: nothing became of that weight, which is a fault of this package.
        """
        name = f"{module}/{part}"
        if name not in self._places:
            raise ValueError(f"{module} was not calibrated")
        with safe_open(self._places[name], framework="numpy") as file:
            values: AnyArray = file.get_tensor(name)
        return values

    def _remember(self, path: Path, names: Mapping[str, AnyArray]) -> None:
        self._places |= dict.fromkeys(names, path)


class StoredWeight(LazyParts):
    """A weight that is quantized while calibrating, and written from the store.

    Args:
        weight: the same one without the store; calibrating gives it its statistics.
        module: path of the module whose inputs it is calibrated on.
        store: where its parts will be.
    """

    def __init__(self, weight: LazyWeight, module: str, store: Store) -> None:
        super().__init__(weight.source, weight.scheme, weight.threads)
        self.weight, self.module, self._store = weight, module, store

    @property
    def scale_type(self) -> ir.DataType:
        """What scales are stored in."""
        return self.weight.scale_type

    @property
    def key(self) -> str:
        """The same for two weights exactly if their parts are the same bytes."""
        return f"{super().key}|calibrated"

    def part_type(self, part: str) -> ir.DataType:
        """What a part's elements are."""
        return self.weight.part_type(part)

    def take(self, part: str) -> AnyArray:
        """One part, shaped as the kernel wants it."""
        return self._store.read(self.module, part).view(self.part_type(part).numpy()).reshape(self.shapes[part])

    def write_codes(self, file: Any) -> None:
        """Writes the codes' bytes."""
        write_array(self._store.read(self.module, "codes"), file)

    def _packer(self) -> Callable[[slice], dict[str, AnyArray]]:
        raise ValueError(f"{self.module} is not quantized where it is written")


class Factor(ir.LazyTensor):
    """What the inputs of a stored weight are multiplied by, [K], as an initializer.

    Args:
        name: of the initializer.
        columns: K.
        dtype: of the activations.
        module: path of the module whose inputs decided.
        store: where the scale will be.
    """

    __slots__ = ("_module", "_store")

    def __init__(self, name: str, columns: int, dtype: ir.DataType, module: str, store: Store) -> None:
        super().__init__(self._evaluate, dtype, ir.Shape((columns,)), name=name)
        self._module, self._store = module, store
        self.meta[READS] = ()

    def _evaluate(self) -> ir.TensorProtocol:
        scale = self._store.read(self._module, INPUT_SCALE).view(np.float32)
        factor = np.float32(1) / scale  # as `quantize.nodes.scale_inputs` has it
        return ir.tensor(factor.astype(self.dtype.numpy()), dtype=self.dtype, name=self.name)


def _digest(arrays: Mapping[str, Any]) -> str:
    whole = hashlib.sha256()
    for name in sorted(arrays):
        whole.update(f"{name} {arrays[name].nbytes}\n".encode())
        whole.update(arrays[name].data)
    return whole.hexdigest()
