"""What a bundle weighs, and what of it one decoded token reads: told from the graphs themselves.

Whatever a recipe makes of a weight, its bytes are the initializers of the nodes that run for every token. A node reads
all of an initializer, but for tables, of which it looks up one row for a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from model.bundle import DECODER, EMBEDDING, Manifest, bundle_path
from runtime.cache import CacheLayout
from runtime.onnx_file import read_onnx
from runtime.onnx_parts import OnnxFile

# Inputs of operators that are tables: embeddings with their scales and zero points, cosines and sines of a position.
_TABLES: Final = {
    "Gather": (0,),
    "com.microsoft.GatherBlockQuantized": (0, 2, 3),
    "com.microsoft.GroupQueryAttention": (7, 8),
    "com.microsoft.RotaryEmbedding": (2, 3),
}


def bundle_bytes(manifest: Manifest) -> int:
    """Bytes of all files that the manifest lists."""
    return sum(info.size for info in manifest.files.values())


def weight_bytes_per_token(folder: Path, manifest: Manifest) -> int:
    """Bytes of weights that a pass for one token reads, of the decoder and, where there is one, the embedding's graph.

    What two nodes read counts twice, though it is stored once: a table that is both embedding and output layer counts
    as the output layer, and one row more.

    Raises:
        BundleError: a graph's file is none.
    """
    graphs = [graph for name in (EMBEDDING, DECODER) if (graph := manifest.graph(name)) is not None]
    return sum(_bytes_read(read_onnx(bundle_path(folder, graph.file))) for graph in graphs)


def cache_bytes_per_token(manifest: Manifest, window: int | None, depth: int) -> int:
    """Bytes of keys and values of one row that a token with `depth` tokens before it reads.

    Args:
        manifest: of a bundle that generates.
        window: of the model's sliding layers; those that keep their window only have no more to read.
        depth: tokens in the cache.
    """
    decoder = manifest.graph(DECODER)
    if decoder is None:
        return 0
    layout = CacheLayout.of(decoder, window)
    return layout.size(layout.window).of(depth)


def _bytes_read(graph: OnnxFile) -> int:
    total = 0
    for node in graph.nodes:
        tables = _TABLES.get(node.op, ())
        for place, name in enumerate(node.inputs):
            tensor = graph.initializers.get(name)
            if tensor is not None:
                rows = tensor.shape[0] if place in tables and tensor.shape else 1
                total += tensor.nbytes // max(1, rows)
    return total
