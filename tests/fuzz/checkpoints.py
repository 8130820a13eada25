"""Weights of a checkpoint: safetensors headers and their index."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

from model.config import ExaoneConfig, load_config
from model.header import Entry, read_header
from model.shards import INDEX, SINGLE
from model.weights import Checkpoint
from tests.fuzz.mutators import json_bytes, spoiled, spoiled_json, spoiled_value, strict_json
from tests.fuzz.target import Target

_WIDTHS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "I64": 64, "I32": 32, "I8": 8, "U8": 8, "F4": 4}


def header_bytes(length: int, header: bytes, data: int) -> bytes:
    """A safetensors file with `data` zeros behind the header."""
    return struct.pack("<Q", length % (1 << 64)) + header + bytes(data)


def independent_header(data: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]] | None:
    """Tensor → type, shape, offset, bytes, by a reading of the format that shares nothing with ours; None: unsound."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = strict_json(data[8 : 8 + length])
        room, found, reached = len(data) - 8 - length, {}, 0
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in sorted(entries, key=lambda one: (one[1]["data_offsets"], one[0])):
            begin, end = entry["data_offsets"]
            numbers = [*entry["shape"], begin, end]
            if any(type(number) is not int or number < 0 for number in numbers) or begin != reached:
                return None
            if entry["dtype"] in _WIDTHS and 8 * (end - begin) != math.prod(entry["shape"]) * _WIDTHS[entry["dtype"]]:
                return None
            found[name] = (entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
            reached = end
    except (ValueError, TypeError, KeyError, AttributeError, struct.error):
        return None
    return found if reached == room >= 0 else None


class Header(Target):
    """A header of a few tensors, in front of as many bytes as the first one says."""

    name, codes = "header", frozenset({3})
    long = 250_000

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._good, at = dict[str, Any](), 0
        for name, dtype, shape, size in (
            ("a", "F32", [2, 3], 24), ("b", "BF16", [4], 8), ("가", "I64", [], 8), ("none", "F16", [0, 5], 0),
            ("d", "U8", [7], 7), ("e", "F8_E4M3", [3], 3),
        ):  # fmt: skip
            self._good[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        self._data = at
        self._path = scratch / "header.safetensors"

    def mutant(self, random: Random) -> bytes:
        good = {"__metadata__": {"format": "pt"}} | self._good if random.random() < 0.3 else self._good
        if random.random() < 0.3:
            raw = json.dumps(good).encode()
            return spoiled(header_bytes(len(raw), raw, self._data), random, end=8 + len(raw))
        raw = spoiled_json(json.dumps(good).encode(), good, random)
        raw += b" " * random.choice((0, 0, 0, -len(raw) % 8, 1000))
        off = random.choice((0, 0, 0, 0, 0, 0, 1, -1, 8, 1 << 62))
        return header_bytes(len(raw) + off, raw, max(0, self._data + random.choice((0, 0, 0, 0, 0, 0, 0, 1, -1, 64))))

    def run(self, data: bytes) -> list[Entry]:
        self._path.write_bytes(data)
        return list(read_header(self._path))

    def judge(self, data: bytes, accepted: list[Entry]) -> str:
        own = independent_header(data)
        if own is None:
            return "the layout is unsound"
        got = {entry.name: (entry.dtype, entry.shape, entry.offset, entry.nbytes) for entry in accepted}
        return "" if got == own else f"{got} is read, it says {own}"[:500]


class Weights(Target):
    """A whole checkpoint with a damaged header or index: opened, and compared with its configuration."""

    name, codes = "weights", frozenset({2, 3, 4})
    long = 60_000

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._folders = {SINGLE: scratch / "weights-text", INDEX: scratch / "weights-vision"}
        self._raw, self._config, self._shapes = dict[str, bytes](), dict[str, ExaoneConfig](), dict[str, Any]()
        for (name, folder), kind in zip(self._folders.items(), ("text", "vision"), strict=True):
            shutil.copytree(corpus / kind, folder, dirs_exist_ok=True)
            self._raw[name] = (folder / name).read_bytes()
            self._config[name] = load_config(folder)
            self._shapes[name] = self.run(name.encode() + b"\n" + self._raw[name])

    def mutant(self, random: Random) -> bytes:
        name = random.choice((SINGLE, SINGLE, INDEX))
        raw = self._raw[name]
        if name == INDEX:
            return name.encode() + b"\n" + spoiled_json(raw, json.loads(raw), random)
        length = int.from_bytes(raw[:8], "little")
        if random.random() < 0.4:
            return name.encode() + b"\n" + spoiled(raw, random, end=8 + length)
        header = json_bytes(spoiled_value(json.loads(raw[8 : 8 + length]), random), random)
        return name.encode() + b"\n" + struct.pack("<Q", len(header)) + header + raw[8 + length :]

    def run(self, data: bytes) -> dict[str, tuple[int, ...]]:
        name, raw = named(data)
        (self._folders[name] / name).write_bytes(raw)
        checkpoint = Checkpoint.open(self._folders[name])
        bound = checkpoint.bind(self._config[name])
        return {name: tuple(tensor.shape) for name, tensor in bound.items()}

    def judge(self, data: bytes, accepted: dict[str, tuple[int, ...]]) -> str:
        name, raw = named(data)
        if accepted != self._shapes[name]:
            return "other tensors than the model has"
        if name == SINGLE:
            return "" if independent_header(raw) is not None else "the layout is unsound"
        good, stated = (strict_json(one)["weight_map"] for one in (self._raw[name], raw))
        return "" if good == {key: str(PurePosixPath(file)) for key, file in stated.items()} else "another weight_map"


def named(data: bytes) -> tuple[str, bytes]:
    """A file's name, and what is to be in it."""
    name, _, raw = data.partition(b"\n")
    return name.decode(), raw
