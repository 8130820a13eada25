"""Whether the graphs of a bundle fit each other and config.json, told from the manifest before any is opened.

What a graph takes and gives is compared with the manifest when it is opened (`GraphSession`); here the manifest is held
to be right about each, and what is looked for is a graph of another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from model.bundle import DECODER, EMBEDDING, MANIFEST, MTP, VISION_ENCODER, Manifest, int8_cache, past_key
from model.config import ExaoneConfig
from model.errors import BundleError, printable
from model.tasks import GENERATION, HEAD_OUTPUTS, graphs_of


def check_agreement(manifest: Manifest, config: ExaoneConfig) -> None:
    """Looks whether all graphs are there, and compares sizes that they and the configuration have in common.

    Raises:
        BundleError: names what is missing, or the graph, the tensor and both sizes.
    """
    _check_complete(manifest, config)
    sizes = {
        (graph.name, tensor.name, axis): size
        for graph in manifest.graphs
        for tensor in (*graph.inputs, *graph.outputs)
        for axis, size in enumerate(tensor.shape)
    }
    for (graph, tensor, axis), wanted in _wanted(manifest, config):
        size = sizes.get((graph, tensor, axis))
        if isinstance(size, int) and size != wanted:
            info = manifest.graph(graph)
            where = Path(info.file).name if info is not None else graph
            why = f"{printable(tensor, 60)!r} has {size} where config.json and the other graphs have {wanted}"
            raise BundleError("damaged bundle", where, why, "Take all files from one export")
    decoder = manifest.graph(DECODER)
    layers = sum(tensor.name.endswith(".key") for tensor in decoder.inputs) if decoder is not None else 0
    if decoder is not None and layers not in (0, config.text.num_layers):
        why = f"it has caches for {layers} layers, config.json has {config.text.num_layers}"
        raise BundleError("damaged bundle", Path(decoder.file).name, why, "Take all files from one export")


def _check_complete(manifest: Manifest, config: ExaoneConfig) -> None:
    for name in graphs_of(config.task, vision=config.vision is not None):
        if manifest.graph(name) is None:
            why = f"config.json asks for a graph {name!r} that it does not list"
            raise BundleError("damaged bundle", MANIFEST, why, "Export the model again")
    decoder, outputs = manifest.graph(DECODER), HEAD_OUTPUTS.get(config.task)
    if decoder and outputs and tuple(tensor.name for tensor in decoder.outputs) != outputs:
        why = f"its decoder does not give {' and '.join(outputs)}, which {config.task} needs"
        raise BundleError("damaged bundle", MANIFEST, why, "Export the model again")


def _wanted(manifest: Manifest, config: ExaoneConfig) -> Iterator[tuple[tuple[str, str, int], int]]:
    """Graph, tensor and axis, and the size that is expected there, if it is a number at all."""
    text, vision = config.text, config.vision
    yield (EMBEDDING, "image_features", 1), text.hidden_size
    yield (VISION_ENCODER, "image_features", 1), text.hidden_size
    if vision is not None:
        yield (VISION_ENCODER, "pixel_values", 1), vision.patch_dim
    for graph in (EMBEDDING, DECODER, MTP):
        yield (graph, "inputs_embeds", 2), text.hidden_size
        yield (graph, "hidden_states", 2), text.hidden_size
    for graph in (DECODER, MTP):
        info = manifest.graph(graph)
        if manifest.task in GENERATION:
            yield (graph, "logits", 2), text.vocab_size
        layers = 0 if info is None else sum(tensor.name.endswith(".key") for tensor in info.inputs)
        for layer in range(layers):
            yield (graph, past_key(layer), 1), text.num_kv_heads
            if not int8_cache(info):
                yield (graph, past_key(layer), 3), text.head_dim
