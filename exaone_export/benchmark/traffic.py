"""What a bundle weighs, and what of it one decoded token reads."""

from __future__ import annotations

from model.bundle import DECODER, Manifest, WeightInfo
from model.config import ExaoneConfig

_FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def bundle_bytes(manifest: Manifest) -> int:
    """Bytes of all files that the manifest lists."""
    return sum(info.size for info in manifest.files.values())


def weight_bytes_per_token(manifest: Manifest, config: ExaoneConfig) -> int:
    """Bytes of weights that one pass of the decoder reads for one token.

    Every matrix of the decoder and its output layer, codes, scales and zero points, as the manifest has them, and one
    row of the embedding; a table that both are stored in counts as the output layer.
    """
    total, float_bytes = 0.0, _FLOAT_BYTES.get(manifest.dtype, 4)
    for path, weight in manifest.weights.items():
        if path.endswith(".embed_tokens"):
            total += _stored_bytes(weight, float_bytes) / config.text.vocab_size
        elif path.startswith(f"{DECODER}."):
            total += _stored_bytes(weight, float_bytes)
    return round(total)


def _stored_bytes(weight: WeightInfo, float_bytes: int) -> float:
    if weight.bits == 0:
        return weight.parameters * float_bytes
    blocks = weight.parameters / weight.block_size if weight.block_size else 0
    zero_points = 0 if weight.symmetric else blocks * weight.bits / 8
    return weight.parameters * weight.bits / 8 + blocks * float_bytes + zero_points
