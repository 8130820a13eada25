"""Peak memory and speed of `export --quantize int4` on random weights of EXAONE 4.0 1.2B's real shape (2.6 GB in bf16).

    python benchmarks/export_memory.py [FOLDER] [--quantize int4] [--shards 1] [--layers 30] [--keep]

FOLDER gets the checkpoint and the bundle (default: a temporary folder); both are removed afterwards unless --keep.
The limit is 2.5 times the largest tensor in float32 plus 700 MiB, libraries included; the exit code tells if it held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.config import parse_config  # noqa: E402
from model.weights import expected_tensors  # noqa: E402

MIB = 1 << 20
BLOCK = 1 << 22  # random values kept; every tensor starts somewhere else in them
CONFIG: dict[str, Any] = {
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
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "sliding_window": None,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "pad_token_id": 0,
}


class RandomValues:
    """bfloat16 patterns of normally distributed values, repeated from one block."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        values = self.rng.standard_normal(BLOCK, np.float32) * np.float32(0.02)
        self.block = (values.view(np.uint32) >> 16).astype(np.uint16)

    def write(self, stream: BinaryIO, count: int, norm: bool) -> None:
        """Appends `count` values to the file."""
        if norm:
            stream.write(np.full(count, 0x3F80, np.uint16).tobytes())
            return
        at = int(self.rng.integers(BLOCK))
        while count:
            part = self.block[at : at + count]
            stream.write(part.data)
            count, at = count - part.size, 0


def write_checkpoint(folder: Path, layers: int, shards: int) -> tuple[int, int]:
    """Writes config.json and safetensors files; returns bytes of weights and the largest tensor's size in float32."""
    folder.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {
        "model." + name.removeprefix("decoder."): shape
        for name, shape in expected_tensors(parse_config(config), draft=False).items()
    }
    names, values = list(tensors), RandomValues(0)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        weight_map |= dict.fromkeys(part, file)
        write_safetensors(folder / file, part, values)
    total = sum(2 * int(np.prod(shape)) for shape in tensors.values())
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total, 4 * max(int(np.prod(shape)) for shape in tensors.values())


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], values: RandomValues) -> None:
    """Streams one file: length of the header, header, data."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            values.write(stream, int(np.prod(shape)), norm=len(shape) == 1)


@contextlib.contextmanager
def work_folder(given: Path | None, keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="export-memory-")) if given is None else given
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if not keep:
            for name in ("checkpoint", "bundle"):
                shutil.rmtree(folder / name, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    with work_folder(arguments.folder, arguments.keep) as folder:
        source, out = folder / "checkpoint", folder / "bundle"
        weights, largest = write_checkpoint(source, arguments.layers, arguments.shards)
        started = time.monotonic()
        command = [sys.executable, "-m", "exaone_export", "export", str(source), str(out)]
        done = subprocess.run(
            [*command, "--quantize", arguments.quantize, "--json"],
            stdout=subprocess.PIPE,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        seconds = time.monotonic() - started
        report = json.loads(done.stdout)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    limit = 2.5 * largest + 700 * MIB
    print(f"checkpoint     {weights / 1e9:.2f} GB bf16, largest tensor {largest / MIB:.0f} MiB in float32")
    print(f"bundle         {report['bytes'] / 1e9:.2f} GB, {report['bits_per_weight']:.2f} bits per weight")
    print(f"time           {seconds:.1f} s, {weights / 1e6 / seconds:.0f} MB/s of checkpoint")
    print(f"peak memory    {peak / MIB:.0f} MiB, limit {limit / MIB:.0f} MiB: {'ok' if peak <= limit else 'EXCEEDED'}")
    return 0 if peak <= limit else 1


if __name__ == "__main__":
    raise SystemExit(main())
