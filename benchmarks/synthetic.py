"""Checkpoints of the published shapes that take no room on the disk, and the reader that gives their weights.

The safetensors files are sparse: true headers, names, shapes and sizes, and holes where the weights would be. In the
process that exports them, every read of a tensor gives bfloat16 values from a block of normally distributed ones
instead, from a place of its own for each tensor, so that no two tensors are equal. That copies as many bytes as reading
from the page cache does; a disk's own time is not in it.

    python -m benchmarks.synthetic REPORT.json COMMAND...     # exaone-export COMMAND... with that reader
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from model import shards
from model.config import parse_config
from model.weights import expected_tensors, published

SEED = 45
BLOCK = (1 << 22) + 1  # values kept, 8 MB; not a multiple of a row, so that rows differ
SHARD_BYTES = 5 * 10**9

_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SMALL: dict[str, Any] = {
    "architectures": ["Exaone4ForCausalLM"],
    "model_type": "exaone4",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": _ROPE,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "pad_token_id": 0,
}
_LARGE: dict[str, Any] = {
    "architectures": ["Exaone4_5_ForConditionalGeneration"],
    "model_type": "exaone4_5",
    "text_config": {
        "model_type": "exaone4_5_text",
        "vocab_size": 153600,
        "hidden_size": 5120,
        "intermediate_size": 27392,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_scaling": _ROPE,
        "sliding_window": 4096,
        "sliding_window_pattern": "LLLG",
    },
    "vision_config": {
        "model_type": "exaone4_5_vision",
        "depth": 28,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_heads": 32,
        "num_key_value_heads": 8,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [6, 13, 20, 27],
        "out_hidden_size": 5120,
        "in_channels": 3,
        "hidden_act": "silu",
    },
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "image_token_id": 67,
    "video_token_id": 68,
    "vision_start_token_id": 73,
    "vision_end_token_id": 74,
    "bos_token_id": 1,
    "eos_token_id": 53,
    "pad_token_id": 0,
}
MODELS = {"4.0-1.2b": _SMALL, "4.5-33b": _LARGE}


class Values:
    """The bfloat16 patterns (uint16) of all tensors, and what giving them out has cost."""

    def __init__(self) -> None:
        values = np.random.default_rng(SEED).standard_normal(BLOCK, np.float32) * np.float32(0.02)
        self._block: NDArray[np.uint16] = (values.view(np.uint32) >> 16).astype(np.uint16)
        self._lock = threading.Lock()
        self.seconds, self.bytes = 0.0, 0

    @staticmethod
    def place(name: str) -> int:
        """Where a tensor begins in the block."""
        return zlib.crc32(name.encode()) % BLOCK

    def read(self, name: str, first: int, count: int) -> NDArray[np.uint16]:
        """Values first..first + count of a tensor."""
        started = time.thread_time()
        result = np.empty(count, np.uint16)
        at, done = (self.place(name) + first) % BLOCK, 0
        while done < count:
            part = self._block[at : at + count - done]
            result[done : done + part.size] = part
            done, at = done + part.size, 0
        with self._lock:
            self.seconds += time.thread_time() - started
            self.bytes += result.nbytes
        return result


def config_of(model: str, layers: int | None) -> dict[str, Any]:
    """A model's config.json, with another number of text layers."""
    config = MODELS[model]
    if layers is None:
        return config
    change = {"num_hidden_layers": layers}
    return config | ({"text_config": config["text_config"] | change} if "text_config" in config else change)


def write_checkpoint(folder: Path, config: dict[str, Any], *, real: bool) -> dict[str, tuple[int, ...]]:
    """Writes config.json and safetensors files, sparse or with their values; returns name → shape."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    parsed = parse_config(config)
    shapes = expected_tensors(parsed, draft=parsed.mtp is not None)
    tensors = {published(name, text_only=parsed.vision is None): shape for name, shape in shapes.items()}
    if len({Values.place(name) for name in tensors}) != len(tensors):
        raise SystemExit("two tensors would be equal: choose another BLOCK")
    values = Values() if real else None
    groups = _shards(tensors)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        _write_safetensors(folder / file, {name: tensors[name] for name in names}, values)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * sum(map(math.prod, tensors.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def _shards(tensors: dict[str, tuple[int, ...]]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in tensors.items():
        nbytes = 2 * math.prod(shape)
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return groups


def _write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], values: Values | None) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if values is None:
            stream.truncate(8 + len(text) + at)
        else:
            for name, shape in tensors.items():
                _write_values(stream, values, name, math.prod(shape))


def _write_values(stream: BinaryIO, values: Values, name: str, count: int) -> None:
    for first in range(0, count, BLOCK):
        stream.write(values.read(name, first, min(BLOCK, count - first)).data)


def install() -> Values:
    """From now on, every read of a tensor in this process gives its synthetic values."""
    values = Values()

    def give(ref: shards.TensorRef, start: int, count: int) -> NDArray[Any]:
        return values.read(ref.name, start // 2, count // 2).view(shards.DTYPES[ref.dtype])

    shards.TensorRef._bytes = give  # type: ignore[assignment, method-assign]
    return values


def main() -> int:
    """Runs the command line with the synthetic reader and writes what reading has cost."""
    report, *command = sys.argv[1:]
    from exaone_export.cli import main as run

    values = install()
    started = time.process_time()
    code = run(command)
    Path(report).write_text(
        json.dumps(
            {
                "read_seconds": values.seconds,
                "read_bytes": values.bytes,
                "cpu_seconds": time.process_time() - started,
            }
        )
    )
    return code


if __name__ == "__main__":
    raise SystemExit(main())
