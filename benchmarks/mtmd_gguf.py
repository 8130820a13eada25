"""Turns the vision encoder of an EXAONE 4.5 checkpoint into llama.cpp's files; runs in its environment (numpy, gguf).

    python -m benchmarks.mtmd_gguf CHECKPOINT FOLDER

FOLDER gets mmproj.gguf, of the checkpoint's very weights: matrices stay bfloat16; norms, biases and the patch embedding
become float32, as llama.cpp's own converter has it. Beside it text.gguf, one layer of a text model without use, because
an encoder is not loaded without the model it belongs to.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers_gguf import tensors
from benchmarks.vision_worker import MMPROJ, TEXT

PREFIX = "model.visual."
PATCHES = "patch_embed.proj.weight"
EPSILON = 1e-6  # fixed in transformers' vision blocks
BLOCK = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"merger.ln_q": "v.post_ln", "merger.mlp.0": "mm.0", "merger.mlp.2": "mm.2"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a published tensor of the encoder, whose prefix has been removed."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    number, _, rest = stem.removeprefix("blocks.").partition(".")
    return f"v.blk.{number}.{BLOCK[rest]}.{kind}"


def pattern(full: list[int], depth: int) -> int:
    """Every how many blocks one sees the whole image, which is all that llama.cpp can be told; 0 where all do.

    SystemExit where it is not so.
    """
    if full == list(range(depth)):
        return 0
    every = full[0] + 1 if full else depth + 1
    if full != list(range(every - 1, depth, every)):
        raise SystemExit(f"full attention in blocks {full} follows no rule that llama.cpp knows")
    return every


def floats(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_encoder(checkpoint: Path, path: Path) -> None:
    """The encoder's file."""
    gguf = import_module("gguf")
    config = json.loads((checkpoint / "config.json").read_text())["vision_config"]
    pixels = json.loads((checkpoint / "preprocessor_config.json").read_text())
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("exaone4_5")
    writer.add_vision_projection_dim(config["out_hidden_size"])
    writer.add_vision_image_size(560)  # of which the image's own size takes the place
    writer.add_vision_patch_size(config["patch_size"])
    writer.add_vision_embedding_length(config["hidden_size"])
    writer.add_vision_feed_forward_length(config["intermediate_size"])
    writer.add_vision_block_count(config["depth"])
    writer.add_vision_head_count(config["num_heads"])
    writer.add_uint32("clip.vision.attention.head_count_kv", config["num_key_value_heads"])
    writer.add_vision_attention_layernorm_eps(EPSILON)
    writer.add_vision_use_silu(True)
    writer.add_vision_spatial_merge_size(config["spatial_merge_size"])
    writer.add_vision_n_wa_pattern(pattern(config["fullatt_block_indexes"], config["depth"]))
    writer.add_vision_window_size(config["window_size"])
    writer.add_vision_image_mean(pixels["image_mean"])
    writer.add_vision_image_std(pixels["image_std"])
    writer.add_vision_min_pixels(pixels["min_pixels"])
    writer.add_vision_max_pixels(pixels["max_pixels"])
    for name, bits in tensors(checkpoint):
        if not name.startswith(PREFIX):
            continue
        short = name.removeprefix(PREFIX)
        if short == PATCHES:  # one convolution for each of the two frames
            for frame, suffix in enumerate(("", ".1")):
                writer.add_tensor(f"v.patch_embd.weight{suffix}", np.ascontiguousarray(floats(bits[:, :, frame])))
        elif bits.ndim == 1:
            writer.add_tensor(gguf_name(short), floats(bits))
        else:
            writer.add_tensor(gguf_name(short), bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    _close(writer)


def write_text(width: int, path: Path) -> None:
    """A text model of one narrow layer whose tokens are the bytes."""
    gguf = import_module("gguf")
    heads, inner, key_width = 1, 32, 32
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_key_length(key_width)
    writer.add_value_length(key_width)
    writer.add_rope_dimension_count(key_width)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types(kinds)
    shapes = {"token_embd": (len(words), width), "output": (len(words), width), "output_norm": (width,)}
    for name, shape in {
        "attn_norm": (width,), "attn_q": (key_width, width), "attn_k": (key_width, width), "attn_v": (key_width, width),
        "attn_output": (width, key_width), "ffn_norm": (width,), "ffn_gate": (inner, width), "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }.items():  # fmt: skip
        shapes[f"blk.0.{name}"] = shape
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    _close(writer)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    width = json.loads((checkpoint / "config.json").read_text())["vision_config"]["out_hidden_size"]
    write_text(width, folder / TEXT)
    write_encoder(checkpoint, folder / MMPROJ)


if __name__ == "__main__":
    main()
