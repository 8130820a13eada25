"""The vision encoder's and the embedding's graphs against the same modules in eager PyTorch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

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


def test_a_segment_longer_than_one_tile() -> None:
    config = dataclasses.replace(multimodal_config(), vision=vision_config(depth=1, fullatt_block_indexes=(0,)))
    session = session_of(config, "vision_encoder")
    inputs = session.spec.dummy_inputs(grids=[(1, 26, 22), (1, 4, 4), (2, 18, 16)])
    assert 26 * 22 > 2 * tile_size(4) > 18 * 16
    expected = session.module(*session.spec.arguments(inputs))
    assert difference(session.run(inputs)["image_features"], expected) < 1e-4


def test_vision_operators(vision: Session) -> None:
    counts = operator_counts(vision.model)
    # Two window blocks, and the one full block's inside its loop over tiles.
    assert (counts["Attention"], counts["Scan"]) == (3, 1)
    assert counts["SimplifiedLayerNormalization"] == 2 * 3 + 1
    assert counts["MatMul"] == 1 + 3 * 5 + 2
    assert not {"SegmentAttention", "CastLike", "Identity", "Constant", "Transpose", "SplitToSequence"} & set(counts)
    assert not vision.model.functions
    assert counts["Cast"] <= 3


def test_scores_of_a_tile_stay_inside_the_budget() -> None:
    assert [tile_size(heads) for heads in (4, 16, 32, 64)] == [256, 256, 128, 64]


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
