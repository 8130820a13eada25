"""Recognises quantized weights among a checkpoint's tensors.

    weight_packed, weight_scale, weight_shape[, weight_zero_point, weight_g_idx]   compressed-tensors, packed
    weight (int8), weight_scale[, weight_zero_point, weight_g_idx]                 compressed-tensors, int-quantized
    weight (float8), weight_scale or weight_scale_inv[, weight_zero_point]         FP8 of all makers
    qweight, qzeros, scales[, g_idx]                                               GPTQ, AutoAWQ

Nothing is read here but biases that the model does not have, which some GPTQ writers add as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from model.packed_layer import BYTES, PARTS, PackedLayer, Shape
from model.quantization import Quantization
from model.shards import FLOATS, TensorRef
from model.source import WeightSource

# Last parts of the names of tensors that only matter to quantized activations and caches.
IGNORED = frozenset(
    f"{what}{part}"
    for what in ("input", "output", "activation", "k", "v", "q", "kv", "prob")
    for part in ("_scale", "_scale_ub", "_zero_point", "_global_scale")
)


@dataclass(frozen=True)
class Assembled:
    """What a checkpoint's tensors mean.

    Attributes:
        sources: name of a plain tensor, or the name a quantized layer's plain weight would have → weight.
        ignored: names of tensors that only quantized activations and caches need, and of biases of zeros.
    """

    sources: dict[str, WeightSource] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def assemble(
    tensors: Mapping[str, TensorRef], quantization: Quantization, shape_of: Callable[[str], Shape | None]
) -> Assembled:
    """Puts the parts of quantized weights together.

    Args:
        tensors: name in the files → place.
        quantization: what the configuration says.
        shape_of: shape of a tensor that the model needs, by its published name; None for one that it does not need.
            Layers it does not need are left as they are.

    Raises:
        CheckpointError: a part is missing, or of another type or shape than the configuration means.
    """
    done = Assembled()
    modules: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        module, _, last = name.rpartition(".")
        if last in IGNORED and shape_of(name) is None:
            done.ignored.append(name)
        elif last in PARTS or (last == "weight" and ref.dtype in BYTES):
            modules.setdefault(module, {})[last] = ref
        else:
            done.sources[name] = ref
    for module, parts in modules.items():
        name = f"{module}.weight"
        shape = shape_of(name)
        if shape is None or len(shape) != 2:
            done.sources.update({ref.name: ref for ref in parts.values()})
            continue
        done.sources[name] = PackedLayer(name, shape, parts, quantization).weight()
        bias = tensors.get(f"{module}.bias")
        if bias is not None and shape_of(bias.name) is None and bias.dtype in FLOATS and not bias.read().any():
            del done.sources[bias.name]
            done.ignored.append(bias.name)
    return done
