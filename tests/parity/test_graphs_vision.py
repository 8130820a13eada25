"""The vision encoder's and the embedding's graphs against the same modules in eager PyTorch."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from exporter import lowering_segments
from exporter.lowering_segments import tile_size
from exporter.passes import operator_counts
from tests.parity.onnx_graphs import Session, difference, multimodal_config, session_of, vision_config

GRIDS = {
    "2x2": [(1, 2, 2)],
    "8x12": [(1, 8, 12)],
    "34x10": [(1, 34, 10)],
    "14x22": [(1, 14, 22)],
    "several": [(1, 2, 2), (1, 34, 10), (1, 4, 16), (1, 14, 22)],
    "video": [(2, 8, 12)],
    "video and images": [(1, 6, 4), (3, 10, 6), (1, 2, 8)],
}


@pytest.fixture(scope="module")
def vision() -> Session:
    return session_of(multimodal_config(), "vision_encoder")


@pytest.fixture(scope="module")
def embedding() -> Session:
    return session_of(multimodal_config(), "embedding")


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_image_features(vision: Session, grids: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(1)
    inputs = vision.spec.dummy_inputs(grids=grids)
    expected = vision.module(*vision.spec.arguments(inputs))
    assert expected.abs().max() > 0.5
    assert difference(vision.run(inputs)["image_features"], expected) < 1e-4


LONG = [(1, 26, 22), (1, 4, 4), (2, 18, 16)]


def one_full_block(**changes: object) -> Session:
    wanted = {"depth": 1, "fullatt_block_indexes": (0,)} | changes
    return session_of(dataclasses.replace(multimodal_config(), vision=vision_config(**wanted)), "vision_encoder")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_segments_longer_than_one_tile(monkeypatch: pytest.MonkeyPatch, kv_heads: int) -> None:
    monkeypatch.setattr(lowering_segments, "LARGEST_TILE", 256)
    session = one_full_block(num_kv_heads=kv_heads)
    inputs = session.spec.dummy_inputs(grids=LONG)
    assert 26 * 22 > 2 * 256 > 256 < 18 * 16
    expected = session.module(*session.spec.arguments(inputs))
    assert difference(session.run(inputs)["image_features"], expected) < 1e-4


def test_half_precision_takes_small_tiles() -> None:
    config = dataclasses.replace(multimodal_config(), vision=vision_config(depth=1, fullatt_block_indexes=(0,)))
    session = session_of(config, "vision_encoder", dtype=torch.float16)
    assert "MultiHeadAttention" not in operator_counts(session.model)
    inputs = session.spec.dummy_inputs("fp16", grids=LONG)
    expected = session.module.float()(*(x.float() if x.is_floating_point() else x for x in inputs.values()))
    assert difference(session.run(inputs)["image_features"], expected) < 2e-2


def test_vision_operators(vision: Session) -> None:
    counts = operator_counts(vision.model)
    # Two window blocks; the one full block's kernel keeps no scores, inside its loop over tiles.
    assert (counts["Attention"], counts["MultiHeadAttention"], counts["Scan"]) == (2, 1, 1)
    assert counts["SimplifiedLayerNormalization"] == 2 * 3 + 1
    assert counts["MatMul"] == 1 + 3 * 5 + 2
    # One rotation each of queries and keys; queries, keys and values into windows and the results back; queries into
    # tiles, and back from a loop whose results have no declared type; the rest of the gathers is about positions.
    assert counts["RotaryEmbedding"] == 2 * 3
    assert sum(_moves_patches(node) for node in vision.model.graph) == 2 * 4 + 1
    assert not {"SegmentAttention", "CastLike", "Identity", "Constant", "Pad", "SplitToSequence"} & set(counts)
    assert all(node.op_type != "Transpose" for node in vision.model.graph)
    assert not vision.model.functions
    assert counts["Cast"] <= 3


def _moves_patches(node: ir.Node) -> bool:
    return node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT


def test_tiles() -> None:
    assert tile_size(32) == 2048
    assert [tile_size(heads, ir.DataType.FLOAT16) for heads in (4, 16, 32, 64)] == [256, 256, 128, 64]


def test_no_result_has_as_many_rows_and_columns_as_there_are_patches() -> None:
    """Every float result of a run over 900 patches, the loop's included, holds a bounded number of values a patch."""
    session = one_full_block(depth=2)
    model = session.model
    patches, config = 900, session.spec.config.vision
    assert config is not None
    kept = [
        value
        for node in model.graph
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT and value not in model.graph.outputs
    ]
    model.graph.outputs.extend(kept)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    every = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {name: value.numpy() for name, value in session.spec.dummy_inputs(grids=[(1, 30, 30)]).items()}
    largest = max(value.size for value in every.run(None, feeds))
    # The widest are queries, keys and values in one.
    assert largest == 2 * config.hidden_size * patches < patches**2


@pytest.mark.parametrize("tokens", [0, 1, 7, 15])
@pytest.mark.parametrize("batch", [1, 2])
def test_merged_embeddings(embedding: Session, batch: int, tokens: int) -> None:
    inputs = embedding.spec.dummy_inputs(batch_size=batch, sequence_length=9, image_tokens=min(tokens, 9 * batch))
    expected = embedding.module(*embedding.spec.arguments(inputs))
    assert torch.equal(embedding.run(inputs)["inputs_embeds"], expected)


def test_placeholders_anywhere(embedding: Session) -> None:
    ids = torch.tensor([[150, 3, 151, 150], [5, 150, 6, 7]])
    features = torch.arange(4.0)[:, None].expand(4, 48).contiguous()
    embeds = embedding.run({"input_ids": ids, "image_features": features})["inputs_embeds"]
    assert embeds[ids >= 150][:, 0].tolist() == [0, 1, 2, 3]


def test_embedding_operators(embedding: Session) -> None:
    counts = operator_counts(embedding.model)
    assert counts["Gather"] == 2
    assert sum(counts.values()) <= 32
