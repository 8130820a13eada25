"""Turns a checkpoint of the EXAONE 4.0 kind into GGUF files; runs in llama.cpp's own environment (numpy, gguf).

    python peers_gguf.py CHECKPOINT FOLDER Q4_0 Q8_0 Q4_K_M

FOLDER gets bf16.gguf, of the checkpoint's very bytes, and one file for each type, made by llama.cpp's own quantizer
with its defaults. There is no vocabulary in them: they run on token ids.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURE = "exaone4"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(checkpoint: Path) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Name and bfloat16 patterns of every tensor, mapped, not read."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}, not BF16")
            begin = 8 + size + entry["data_offsets"][0]
            yield name, np.memmap(path, np.uint16, "r", begin, tuple(entry["shape"]))


def gguf_name(name: str) -> str:
    """llama.cpp's name of a published tensor."""
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}.weight"


def rope_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    """What llama.cpp divides the rotary frequencies by, [head_dim / 2]: the rule called "llama3"."""
    scaling = config["rope_scaling"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * float(config["rope_theta"]) ** exponents)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (blend + (1 - blend) / scaling["factor"])).astype(np.float32)


def write(checkpoint: Path, path: Path) -> None:
    """One GGUF file of the checkpoint's values; matrices stay bfloat16, norms become float32."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tensor("rope_freqs.weight", rope_factors(config))
    for name, bits in tensors(checkpoint):
        if bits.ndim == 1:
            writer.add_tensor(gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(gguf_name(name), bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, path: Path, kind: str) -> None:
    """Runs llama.cpp's quantizer with its defaults for a type."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = os.cpu_count() or 1
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(parameters))
    if code:
        raise SystemExit(f"llama_model_quantize fails with {code} for {kind}")


def main() -> None:
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "bf16.gguf"
    write(checkpoint, source)
    for kind in sys.argv[3:]:
        quantize(source, folder / f"{kind}.gguf", kind)
        print(kind, (folder / f"{kind}.gguf").stat().st_size, file=sys.stderr)
    source.unlink()


if __name__ == "__main__":
    main()
