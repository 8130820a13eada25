"""All graphs of one checkpoint together, against golden data made outside this repository."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exporter.graphs import graph_specs
from model.exaone import Exaone
from tests import oracle
from tests.parity.onnx_graphs import Session, difference, multimodal_config, session_of

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def graphs() -> dict[str, Session]:
    model: Exaone = oracle.tiny45()
    return {spec.name: Session(spec, getattr(model, spec.name)) for spec in graph_specs(model.config, draft=True)}


def empty_cache(session: Session) -> dict[str, Tensor]:
    inputs = session.spec.dummy_inputs(batch_size=1, past_sequence_length=0)
    return {name: value for name, value in inputs.items() if name.startswith("past_key_values.")}


def grown(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("present", "past_key_values"): v for k, v in outputs.items() if k.startswith("present.")}


def embed(graphs: dict[str, Session], ids: Tensor, features: Tensor | None = None) -> Tensor:
    if features is None:
        features = torch.zeros(0, graphs["embedding"].spec.config.text.hidden_size)
    return graphs["embedding"].run({"input_ids": ids, "image_features": features})["inputs_embeds"]


@pytest.mark.parametrize("name", ["vision_encoder", "embedding", "decoder", "mtp"])
def test_half_precision_stays_close(name: str) -> None:
    session = session_of(multimodal_config(), name, draft=True, dtype=torch.float16)
    prompt: dict[str, Any] = {"batch_size": 1, "past_sequence_length": 0}
    shapes = {} if name in ("vision_encoder", "embedding") else prompt
    torch.manual_seed(0)
    inputs = session.spec.dummy_inputs(**shapes)
    expected = session.module(*session.spec.arguments(inputs))
    expected = expected if isinstance(expected, Tensor) else expected[0]
    halves = {key: value.half() if value.is_floating_point() else value for key, value in inputs.items()}
    got = session.run(halves)[next(iter(session.spec.outputs))]
    assert got.dtype == torch.float16
    assert difference(got, expected) < 0.01


def test_draft_logits(graphs: dict[str, Session]) -> None:
    golden = {name: torch.from_numpy(value) for name, value in np.load(oracle.TINY45 / "mtp_golden.npz").items()}
    ids = golden["ids"]
    every = {"logits_to_keep": torch.zeros(1, dtype=torch.int64)}
    target = graphs["decoder"].run(
        {"inputs_embeds": embed(graphs, ids), "attention_mask": torch.ones_like(ids)}
        | empty_cache(graphs["decoder"])
        | every
    )
    assert difference(target["logits"], golden["logits"]) < TOLERANCE
    assert difference(target["hidden_states"], golden["hidden"]) < TOLERANCE
    count = ids.shape[1] - 1
    draft = graphs["mtp"].run(
        {"inputs_embeds": embed(graphs, ids[:, 1:]), "hidden_states": target["hidden_states"][:, :count]}
        | {"attention_mask": torch.ones(1, count, dtype=torch.int64)}
        | empty_cache(graphs["mtp"])
        | every
    )
    assert difference(draft["logits"], golden["mtp_logits"][:, :count]) < TOLERANCE
    assert difference(draft["hidden_states_out"], golden["mtp_hidden"][:, :count]) < TOLERANCE


def test_image_prompt_and_its_greedy_continuation(graphs: dict[str, Session]) -> None:
    golden = np.load(oracle.TINY45 / "generate_golden.npz")
    ids, grid = torch.from_numpy(golden["input_ids"]), torch.from_numpy(golden["grid_thw"])
    pixels = torch.from_numpy(oracle.golden_pixels())
    features = graphs["vision_encoder"].run({"pixel_values": pixels, "image_grid_thw": grid})["image_features"]
    step = {"inputs_embeds": embed(graphs, ids, features), "attention_mask": torch.ones_like(ids)}
    outputs = graphs["decoder"].run(step | empty_cache(graphs["decoder"]))
    np.testing.assert_allclose(outputs["logits"][0, -1].numpy(), golden["last_logits"], atol=TOLERANCE)
    found: list[int] = []
    for total in range(ids.shape[1] + 1, ids.shape[1] + 1 + golden["generated"].size):
        found.append(int(outputs["logits"][0, -1].argmax()))
        step = {
            "inputs_embeds": embed(graphs, torch.tensor([found[-1:]])),
            "attention_mask": torch.ones(1, total, dtype=torch.int64),
        }
        outputs = graphs["decoder"].run(step | grown(outputs))
    assert found == golden["generated"].ravel().tolist()
