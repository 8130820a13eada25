"""Ways to spoil a sound checkpoint; each returns a function of its folder."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.shards import INDEX, SINGLE
from tests import tiny

Spoil = Callable[[Path], object]
Tensors = dict[str, NDArray[Any]]
DELETED = ...
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def entry(shape: list[int], begin: float, end: float, dtype: object = "F32") -> dict[str, Any]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def content(data: bytes, name: str = SINGLE) -> Spoil:
    """A file with these bytes."""
    return lambda folder: (folder / name).write_bytes(data)


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file as the header says; `length` is what it claims of the header, if not the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header(header: object, data: bytes = b"", length: int | None = None) -> Spoil:
    """Weights with this header instead of the checkpoint's."""
    return content(safetensors_bytes(header, data, length))


def edited_header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """The checkpoint's own header, changed; its weights stay."""

    def spoil(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        parsed = json.loads(raw[8:end])
        change(parsed)
        (folder / SINGLE).write_bytes(safetensors_bytes(parsed, raw[end:]))

    return spoil


def resized(change: int, name: str = SINGLE) -> Spoil:
    """A file cut, or extended with zeros."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size + change)


@lru_cache
def sound_tensors(config: str, dtype: str) -> Tensors:
    """The tensors of a tiny checkpoint, by the text of its config.json."""
    return tiny.make_tensors(json.loads(config), dtype=dtype)


def weights(change: Callable[[Tensors], object], dtype: str = "fp32") -> Spoil:
    """Other tensors, saved properly in one file."""

    def spoil(folder: Path) -> None:
        sound = sound_tensors((folder / "config.json").read_text(), dtype)
        tensors = {name: array.copy() for name, array in sound.items()}
        change(tensors)
        tiny.save_tensors(folder, tensors)

    return spoil


def with_tensor(name: str, value: NDArray[Any]) -> Spoil:
    """One tensor more, or another one."""
    return weights(lambda tensors: tensors.update({name: value}))


def without(*names: str) -> Spoil:
    """Some tensors less."""
    return weights(lambda tensors: [tensors.pop(name) for name in names])


def config(part: str | None = None, /, **changes: Any) -> Spoil:
    """Other values in config.json, or in an object inside it; `...` removes a key."""

    def spoil(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        place = raw if part is None else raw[part]
        place |= changes
        for key in [key for key, value in place.items() if value is DELETED]:
            del place[key]
        (folder / "config.json").write_text(json.dumps(raw))

    return spoil


def config_literal(key: str, literal: str, part: str | None = None) -> Spoil:
    """A value that `json.dumps` would not write."""

    def spoil(folder: Path) -> None:
        config(part, **{key: "@literal@"})(folder)
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"@literal@"', literal))

    return spoil


def index(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Another model.safetensors.index.json."""

    def spoil(folder: Path) -> None:
        raw = json.loads((folder / INDEX).read_text())
        change(raw)
        (folder / INDEX).write_text(json.dumps(raw))

    return spoil


def replaced(name: str, make: Callable[[Path], object] | None = None) -> Spoil:
    """Something else in a file's place, or nothing."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        if make is not None:
            make(folder / name)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""

    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def sparse(size: int) -> Callable[[Path], object]:
    """A file of zeros that takes no room."""

    def make(path: Path) -> None:
        with path.open("wb") as stream:
            stream.truncate(size)

    return make


def poisoned(name: str, value: float, *places: tuple[int, ...], dtype: str = "fp32") -> Spoil:
    """A value inside one tensor, at some places."""

    def change(tensors: Tensors) -> None:
        for place in places:
            tensors[name][place] = np.asarray(value, tensors[name].dtype)

    return weights(change, dtype)
