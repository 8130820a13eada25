"""How much noise quantization put on each weight: signal over noise, read piece by piece from source and bundle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.parallel import in_order, thread_count
from model.bundle import Manifest
from model.progress import Progress
from model.source import WeightSource
from quantize.stored import StoredWeight, stored_weights

Floats = npt.NDArray[np.float64]
_CHUNK = 1 << 19  # weights that a thread compares at a time


@dataclass(frozen=True)
class LayerNoise:
    """What quantization did to one weight.

    Attributes:
        path: of its module.
        snr_db: signal over noise of what the layer gives, in decibels: of the weight, each input channel weighted with
            its mean square on the prompts and taken as independent of the others. Rounding of activations is not in
            it. For a table, whose rows are looked up, as `weight_snr_db`.
        weight_snr_db: signal over noise of the weight itself, in decibels.
        scheme: how it is stored, e.g. "int4 g128".
        parameters: number of weights.
    """

    path: str
    snr_db: float
    weight_snr_db: float
    scheme: str
    parameters: int


@contextmanager
def input_powers(model: nn.Module) -> Iterator[dict[str, Floats]]:
    """Gathers the sum of squares of every input of each linear layer while the model runs in the block.

    Yields:
        Module path → float64 [K], filled as it goes.
    """
    found: dict[str, Floats] = {}

    def watch(path: str, module: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            square = given[0].detach().float().pow(2).flatten(0, -2).sum(0).double().numpy()
            found[path] = found[path] + square if path in found else square

        return module.register_forward_pre_hook(add)

    handles = [watch(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def measure_layers(
    folder: Path,
    manifest: Manifest,
    source: Mapping[str, WeightSource],
    powers: Mapping[str, Floats],
    progress: Progress,
) -> list[LayerNoise]:
    """Compares every quantized weight with the source's, the noisiest first; weights that are exact are left out.

    Args:
        folder: the bundle.
        manifest: its.
        source: canonical name → weight, as `Checkpoint.bind` gives them.
        powers: as `input_powers` gathered them.
        progress: told of every weight.
    """
    weights = {name.removesuffix(".weight"): weight for name, weight in source.items() if name.endswith(".weight")}
    shapes = {path: weight.shape for path, weight in weights.items()}
    known = [path for path, info in manifest.weights.items() if info.bits and path in shapes]
    progress.start("comparing weights", sum(math.prod(shapes[path]) for path in known), "weights")
    found = []
    for graph in manifest.graphs:
        model = ir.load(folder / graph.file)
        for stored in stored_weights(graph.name, model.graph, shapes):
            if stored.path in manifest.weights:
                found.append(_noise(stored, weights[stored.path], manifest, powers.get(stored.path)))
            progress.advance(math.prod(stored.shape))
    progress.finish()
    return sorted((noise for noise in found if noise.snr_db != math.inf), key=lambda noise: noise.snr_db)


def _noise(stored: StoredWeight, source: WeightSource, manifest: Manifest, power: Floats | None) -> LayerNoise:
    rows, columns = stored.shape
    weighting = np.ones(columns) if power is None or len(power) != columns or not power.any() else power
    step = max(1, _CHUNK // columns)
    pieces = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    read = source.open()

    def sums(piece: tuple[int, int]) -> Floats:
        start, stop = piece
        wanted = np.asarray(read(start, stop)).reshape(stop - start, columns).astype(np.float32)
        noise = stored.read(start, stop) - wanted
        squares = [np.einsum("nk,nk->k", part, part, dtype=np.float64) for part in (wanted, noise)]
        return np.array([total for square in squares for total in (square @ weighting, square.sum())])

    weighted, plain, weighted_noise, plain_noise = sum(in_order(sums, pieces, thread_count(None)), np.zeros(4))
    info = manifest.weights[stored.path]
    scheme = f"int{info.bits}" + ("" if info.activations == "int8" else f" g{info.block_size}")
    return LayerNoise(
        stored.path, _decibels(weighted, weighted_noise), _decibels(plain, plain_noise), scheme, rows * columns
    )


def _decibels(signal: float, noise: float) -> float:
    """10 log10 of a ratio; infinite where there is no noise, NaN kept."""
    if noise == 0:
        return math.inf
    return float(10 * np.log10(signal / noise)) if signal else -math.inf
