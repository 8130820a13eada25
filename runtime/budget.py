"""How many layers a device has room for, and how large the cache may become there, reckoned before loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from model.bundle import DECODER, FLOAT_BYTES, GraphInfo, Manifest, WeightInfo
from model.errors import ResourceError, UsageError
from model.memory import shown, weight_bytes
from runtime.device_cache import Slot, cache_slots

# Tokens of cache that a plan makes room for: beside all layers, and beside as many of them as fit.
_LEAST_TOKENS: Final = 1024
_TOKENS: Final = 8192
# What kernels take beside weights and cache: results of a piece of a prompt, weights unpacked for a product.
_WORKSPACE: Final = 1 << 29
_WORKSPACE_SHARE: Final = 20
_LAYER: Final = "decoder.layers."
_SHARED: Final = "Export it with --target cuda --offload"


@dataclass(frozen=True)
class Room:
    """What a device has for a model.

    Attributes:
        budget: bytes that may be used; None where nobody can tell, and then everything is taken to fit.
        context: most tokens of a row.
        window_tokens: that the buffers of window layers hold.
    """

    budget: int | None
    context: int = 1 << 62
    window_tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """What goes onto a device.

    Attributes:
        host_layers: decoder layers that stay on the CPU, the first ones of the model.
        weights: bytes of all that is on the device.
        budget: bytes that may be used there; None where nobody can tell, and nothing is bounded.
        workspace: of the budget, what is kept for kernels.
    """

    host_layers: tuple[int, ...]
    weights: int
    budget: int | None
    workspace: int = 0

    @property
    def cache(self) -> int | None:
        """Bytes that the cache may take at most."""
        return None if self.budget is None else max(0, self.budget - self.weights - self.workspace)


def workspace_bytes(budget: int) -> int:
    """What is kept of a budget for kernels."""
    return max(_WORKSPACE, budget // _WORKSPACE_SHARE)


def layer_bytes(manifest: Manifest, layers: int) -> tuple[list[int], int]:
    """Stored bytes of every decoder layer, and of the rest of the decoder: embedding, last norm and head.

    The files' size is shared out as the manifest describes the weights.
    """
    parts, rest = [0.0] * layers, 0.0
    for path, weight in manifest.weights.items():
        size = _stored(weight, FLOAT_BYTES[manifest.dtype])
        number = path.removeprefix(_LAYER).partition(".")[0] if path.startswith(_LAYER) else ""
        if number.isdecimal() and int(number) < layers:
            parts[int(number)] += size
        elif path.startswith(f"{DECODER}."):
            rest += size
    decoder = manifest.graph(DECODER)
    total = weight_bytes(manifest, [decoder]) if decoder is not None else 0
    described = sum(parts) + rest
    scale = total / described if described else 0.0
    shares = [int(part * scale) for part in parts]
    return shares, total - sum(shares)


def _stored(weight: WeightInfo, float_bytes: int) -> float:
    if not weight.bits:
        return weight.parameters * float_bytes
    blocks = weight.parameters / max(1, weight.block_size)
    return weight.parameters * weight.bits / 8 + blocks * (float_bytes + (0 if weight.symmetric else weight.bits / 8))


def make_plan(
    manifest: Manifest, graphs: Sequence[GraphInfo], room: Room, gpu_layers: int | None = None, offload: bool = False
) -> Plan:
    """Which decoder layers go onto a device.

    All, if they fit; else, where that is wanted, the last ones, as many as fit beside the other graphs, the head, the
    cache of some thousand tokens and the kernels' workspace. The hidden state then crosses over once, and the head is
    where the result is wanted.

    Args:
        manifest: of the bundle.
        graphs: those to be loaded.
        room: what the device has.
        gpu_layers: number of layers asked for; None leaves it to the plan.
        offload: whether the plan may leave layers to the CPU; it does so only if that has kernels for them.

    Raises:
        UsageError: more layers are asked for than there are, or fewer, and the CPU has no kernels for the others.
        ResourceError: they do not fit, or not even one does; both numbers are named.
    """
    decoder = manifest.graph(DECODER)
    slots = cache_slots(decoder) if decoder is not None else ()
    layers = len({slot.layer for slot in slots})
    if gpu_layers is not None and gpu_layers > layers:
        raise UsageError("bad option", "gpu_layers", f"{gpu_layers} are more than the model's {layers}", "Leave it out")
    able = manifest.target != "cuda" or manifest.offload
    if gpu_layers is not None and gpu_layers < layers and not able:
        raise UsageError("bad option", "gpu_layers", "the bundle's layers have kernels on the GPU only", _SHARED)
    sizes, head = layer_bytes(manifest, layers)
    others = weight_bytes(manifest, [graph for graph in graphs if graph.name != DECODER]) + head
    workspace = 0 if room.budget is None else workspace_bytes(room.budget)
    if room.budget is None:
        count = fitting = layers
    else:
        left = room.budget - others - workspace
        whole = sum(sizes) + sum(_cache_bytes(slots, layer, room, _LEAST_TOKENS) for layer in range(layers))
        caches = [_cache_bytes(slots, layer, room, _TOKENS) for layer in range(layers)]
        fitting = layers if whole <= left else _fitting(sizes, caches, left)
        count = fitting if offload and able else layers
    count = count if gpu_layers is None else gpu_layers
    weights = others + sum(sizes[layers - count :])
    if room.budget is not None and (count > fitting or (layers and not count and gpu_layers is None)):
        needed = others + sum(sizes[layers - max(1, count) :]) + workspace
        why = f"{max(1, count)} layers and what goes with them take {shown(needed)}, {shown(room.budget)} are there"
        remedy = "Use a bundle with fewer bits, or --ep cpu"
        if fitting:
            remedy = f"With gpu_layers={fitting} it fits" if able else f"{_SHARED}: with gpu_layers={fitting} it fits"
        raise ResourceError("cannot load bundle", "device memory", why, remedy)
    return Plan(tuple(range(layers - count)), weights, room.budget, workspace)


def _fitting(sizes: Sequence[int], caches: Sequence[int], room: int) -> int:
    """How many of the last layers fit with their caches."""
    count = 0
    for size, cache in zip(reversed(sizes), reversed(caches), strict=True):
        room -= size + cache
        if room < 0:
            break
        count += 1
    return count


def _cache_bytes(slots: Sequence[Slot], layer: int, room: Room, tokens: int) -> int:
    own = [slot for slot in slots if slot.layer == layer]
    held = min(tokens, room.context)
    return sum(slot.token_bytes * (room.window_tokens if slot.fixed else held) for slot in own)
