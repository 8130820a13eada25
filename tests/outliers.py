"""Checkpoints with massive activations that compute the same, and bundles whose kernels round activations otherwise.

Rows of up_proj are multiplied by a power of two and the columns of down_proj that read them divided by it, which is
exact. What goes into down_proj then has channels that are some hundred times as large as the others, as large models
have them (Sun et al., "Massive Activations in Large Language Models", 2024), and a product whose activations are
rounded has to bear it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper
from safetensors.torch import load_file, save_file

from model.bundle import FileInfo, file_sha256, read_manifest

LEVEL = "accuracy_level"  # of MatMulNBits: 4 rounds a block's activations to 8 bits, 0 leaves them as they are


def inject(
    tensors: Mapping[str, torch.Tensor], exponent: int, channels: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The tensors of a model that computes the same, with outliers in every text layer.

    Args:
        tensors: under published names.
        exponent: of the power of two.
        channels: of each layer, chosen at random.
        seed: of the choice.
    """
    random, changed = np.random.default_rng(seed), dict(tensors)
    for name in sorted(tensors):
        if ".layers." not in name or not name.endswith(".mlp.up_proj.weight"):
            continue
        down = name.replace(".up_proj.", ".down_proj.")
        changed[name], changed[down] = tensors[name].clone(), tensors[down].clone()
        chosen = torch.from_numpy(random.choice(len(tensors[name]), channels, replace=False))
        changed[name][chosen] *= 2.0**exponent
        changed[down][:, chosen] *= 2.0**-exponent
    return changed


def write_checkpoint(source: Path, folder: Path, exponent: int, channels: int = 4) -> Path:
    """A copy of a checkpoint of one file, with outliers; its draft head gets them too."""
    shutil.copytree(source, folder)
    tensors = inject(load_file(source / "model.safetensors"), exponent, channels)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def rewrite(bundle: Path, out: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    """A copy of a bundle whose decoder's graph is another one."""
    shutil.copytree(bundle, out)
    path = out / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)
    manifest = read_manifest(out)
    files = dict(manifest.files) | {path.name: FileInfo(path.stat().st_size, file_sha256(path))}
    replace(manifest, files=files).write(out)
    return out


def exact_activations(graph: onnx.GraphProto) -> None:
    """No product rounds its activations."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == LEVEL:
                attribute.i = 0


def whole_tensor_activations(graph: onnx.GraphProto) -> None:
    """Every product's activations are rounded to 8 bits with one scale for all of them."""
    exact_activations(graph)
    nodes = []
    for i, node in enumerate(graph.node):
        if node.op_type == "MatMulNBits":
            codes = [f"{part}.{i}" for part in ("codes", "scale", "zero")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [node.input[0]], codes))
            nodes.append(helper.make_node("DequantizeLinear", codes, [f"rounded.{i}"]))
            node.input[0] = f"rounded.{i}"
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
