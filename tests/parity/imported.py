"""Quantized checkpoints as bundles, each architecture traced once, and what to compare them with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from exporter import export as export_room
from exporter.export import ExportOptions, export_checkpoint
from model.bundle import Manifest, read_manifest
from model.config import ExaoneConfig
from model.progress import Progress
from quantize.apply import import_models
from quantize.join import GROUPS
from tests.quantized_writers import FORMATS, QuantizedCheckpoint, make_quantized

AnyArray = npt.NDArray[Any]
TRACE = export_room._trace

# Every group divides; more than one of each size in a row, and an odd number of them somewhere.
TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
DENSE = TEXT | {"layer_types": ["full_attention"] * 2}
VISION = {"depth": 2, "fullatt_block_indexes": [1], "out_hidden_size": 256}
SHAPES: dict[str, dict[str, Any]] = {"hybrid": TEXT, "dense": DENSE, "vlm": TEXT | {"vision": VISION}}


@contextmanager
def traced_once() -> Iterator[None]:
    """Exports trace what has been traced before no second time."""
    seen: dict[tuple[Any, ...], dict[str, ir.Model]] = {}

    def trace(config: ExaoneConfig, draft: bool, options: ExportOptions, progress: Progress) -> dict[str, ir.Model]:
        plain = replace(config, quantization=None)
        key = (repr(plain), draft, options.dtype, options.kv_cache)
        if key not in seen:
            seen[key] = TRACE(plain, draft, options, progress)
        return {name: model.clone() for name, model in seen[key].items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_room, "_trace", trace)
        yield


@dataclass(frozen=True)
class Imported:
    """A quantized checkpoint and its bundle."""

    checkpoint: QuantizedCheckpoint
    bundle: Path

    @cached_property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        return read_manifest(self.bundle)

    @cached_property
    def decoder(self) -> Graph:
        """The decoder's graph with its weights."""
        return Graph(self.bundle / "decoder.onnx")


def exact_import(folder: Path, form: str, kind: str, **options: Any) -> Imported:
    """Writes and exports a checkpoint so that the kernels do not round activations either."""
    checkpoint = make_quantized(folder, FORMATS[form], kind, **SHAPES[kind])
    export_checkpoint(
        checkpoint.folder,
        folder / "bundle",
        ExportOptions(**options),
        lambda models: import_models(models, accuracy_level=0),
    )
    return Imported(checkpoint, folder / "bundle")


class Graph:
    """An .onnx file with its weights."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self._weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._makers = {name: node for node in self.model.graph.node for name in node.output}

    def weight(self, name: str) -> AnyArray | None:
        """An initializer, or None."""
        return numpy_helper.to_array(self._weights[name]) if name in self._weights else None

    def reader(self, name: str) -> onnx.NodeProto:
        """The node that reads an initializer."""
        return next(node for node in self.model.graph.node if name in node.input)

    def stored_in(self, module: str) -> tuple[str, slice]:
        """The module whose product a linear layer is part of, and its rows there."""
        for joined, members in GROUPS.items():
            for place, member in enumerate(members):
                whole = module.removesuffix(member) + joined
                if module.endswith(member) and f"{whole}.weight_q" in self._weights:
                    split = self.reader(self.reader(f"{whole}.weight_q").output[0])
                    sizes = self.weight(split.input[1])
                    assert sizes is not None
                    ends = np.cumsum(sizes)
                    return whole, slice(ends[place] - sizes[place], ends[place])
        return module, slice(None)

    def count(self, op: str) -> int:
        """How many nodes of a kind there are."""
        return sum(node.op_type == op for node in self.model.graph.node)

    def columns(self, name: str, width: int) -> AnyArray:
        """Which of the module's inputs each column of a quantized weight is for: a Gather in front may reorder them."""
        maker = self._makers.get(self.reader(name).input[0])
        order = self.weight(maker.input[1]) if maker is not None and maker.op_type == "Gather" else None
        return np.arange(width) if order is None else order


@dataclass(frozen=True)
class StoredWeight:
    """A MatMulNBits weight, unpacked: codes, scale and zero point of every single weight [N, K]."""

    codes: AnyArray
    scales: AnyArray
    zero_points: AnyArray


def stored_weight(graph: Graph, module: str) -> StoredWeight:
    """What a bundle holds for a linear layer, by the definition of the operator, columns in the module's order."""
    whole, own = graph.stored_in(module)
    name = f"{whole}.weight_q"
    node = graph.reader(name)
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    bits, block, width = attributes["bits"], attributes["block_size"], attributes["K"]
    packed, scales = graph.weight(name), graph.weight(f"{whole}.weight_scales")
    assert packed is not None
    assert scales is not None
    packed, scales = packed[own], scales[own]
    rows, blocks = packed.shape[:2]
    codes = _lanes(packed.reshape(rows, -1), bits)[:, :width]
    zero_points = graph.weight(f"{whole}.weight_zero_points")
    if zero_points is None:
        zeros = np.full((rows, blocks), 1 << (bits - 1), np.uint8)
    else:
        zeros = _lanes(zero_points[own].reshape(rows, -1), bits)[:, :blocks]
    at = np.arange(width) // block
    back = np.argsort(graph.columns(name, width))
    each = scales.reshape(rows, blocks)[:, at][:, back]
    return StoredWeight(codes[:, back], each, zeros[:, at][:, back])


def _lanes(packed: AnyArray, bits: int) -> AnyArray:
    if bits == 8:
        return packed
    lanes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    lanes[:, 0::2], lanes[:, 1::2] = packed & 15, packed >> 4
    return lanes


def transformers_model(folder: Path) -> Any:
    """transformers' model of a float checkpoint."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    multimodal = json.loads((folder / "config.json").read_text())["model_type"] == "exaone4_5"
    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def token_ids(count: int, seed: int = 0) -> list[int]:
    """Ordinary tokens."""
    found: list[int] = np.random.default_rng(seed).integers(100, 512, count).tolist()
    return found


def greedy(model: Any, ids: list[int], count: int, **media: Any) -> list[int]:
    """transformers' greedy tokens; the end of turn is a token like any other."""
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, eos_token_id=None, **media
    )
    found: list[int] = out[0, len(ids) :].tolist()
    return found
