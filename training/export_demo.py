"""Writes the averaged weights of a training state as a checkpoint folder with the published names, in bfloat16."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exaone_export.demo import checkpoint_folder
from model.exaone import Exaone
from training.make_tokenizer import write as write_tokenizer
from training.shape import CONFIG, new_model

PUBLISHED = (
    ("decoder.lm_head.", "lm_head."),
    ("decoder.", "model.language_model."),
    ("embedding.", "model.language_model."),
    ("vision_encoder.", "model.visual."),
    ("mtp.", "mtp."),
)
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [1.0, 1.0, 1.0],
    "image_std": [1.0, 1.0, 1.0],
    "min_pixels": 784,
    "max_pixels": 112896,
    "size": {"shortest_edge": 784, "longest_edge": 112896},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
GENERATION = {"bos_token_id": 1, "eos_token_id": 53, "pad_token_id": 0, "do_sample": False}


def published_tensors(model: Exaone) -> dict[str, Tensor]:
    """Weights under their published names, bfloat16."""
    tensors = {}
    for name, parameter in model.named_parameters():
        prefix, replacement = next(pair for pair in PUBLISHED if name.startswith(pair[0]))
        tensors[replacement + name.removeprefix(prefix)] = parameter.detach().to(torch.bfloat16)
    patches = "model.visual.patch_embed.proj.weight"
    tensors[patches] = tensors[patches].unflatten(1, (3, 2, 14, 14))
    return {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}


def main() -> None:
    """Reads STATE, writes FOLDER."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path, help="state.safetensors of a training run")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    model, stored = new_model(0), load_file(options.state)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(stored["average." + name])
    options.folder.mkdir(parents=True, exist_ok=True)
    template = checkpoint_folder() / "chat_template.jinja"
    if options.folder.resolve() != template.parent.resolve():
        shutil.copyfile(template, options.folder / template.name)
    save_file(published_tensors(model), options.folder / "model.safetensors", metadata={"format": "pt"})
    (options.folder / "model.safetensors").chmod(0o644)
    for name, content in (
        ("config", CONFIG),
        ("preprocessor_config", PREPROCESSOR),
        ("generation_config", GENERATION),
    ):
        text = json.dumps(content, indent=2) + "\n"
        (options.folder / f"{name}.json").write_text(text, encoding="utf-8")
    write_tokenizer(options.folder)


if __name__ == "__main__":
    main()
