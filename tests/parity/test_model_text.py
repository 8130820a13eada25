"""The text decoder against transformers, at the lengths where windows and caches go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.exaone import Exaone
from model.text import Cache, DecoderLayer
from tests import oracle

WINDOW = 8
LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW)
TOLERANCE = 1e-4
CONFIGS = {
    "hybrid": oracle.HYBRID,
    "hybrid_tied": oracle.HYBRID | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "one_kv_head": oracle.HYBRID | {"num_key_value_heads": 1, "head_dim": 16},
    "dense_tied": oracle.DENSE,
    "all_full_with_window": oracle.HYBRID | {"layer_types": ["full_attention"] * 5},
    "plain_rope": oracle.HYBRID | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Exaone]:
    raw = CONFIGS[request.param]
    reference = oracle.reference(raw, seed=len(request.param))
    return reference, oracle.ours(reference, raw)


def logits_in_chunks(model: Exaone, inputs: Tensor, chunks: list[int]) -> tuple[Tensor, list[Cache]]:
    """Logits of all positions when `inputs` goes through the cache in pieces of those sizes."""
    past, done, parts = model.decoder.empty_cache(inputs.shape[0]), 0, []
    for size in chunks:
        piece = inputs[:, done : done + size]
        done += piece.shape[1]
        mask = torch.ones(inputs.shape[0], done, dtype=torch.int64)
        logits, _, past = model.decoder(piece, mask, past, torch.zeros(1, dtype=torch.int64))
        parts.append(logits)
    assert done == inputs.shape[1]
    return torch.cat(parts, dim=1), past


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_of_every_position(pair: tuple[Any, Exaone], length: int) -> None:
    reference, model = pair
    ids = oracle.random_ids(length, seed=length)
    expected = reference(input_ids=ids, output_hidden_states=True)
    logits, hidden, _ = model(ids)
    torch.testing.assert_close(logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(hidden, expected.hidden_states[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [20, 5, 1, 1, 3, 10], [7, 1, 8, 9, 15]], ids=str)
def test_cached_passes_equal_one_pass(pair: tuple[Any, Exaone], chunks: list[int]) -> None:
    reference, model = pair
    ids = oracle.random_ids(40, seed=1)
    logits, past = logits_in_chunks(model, ids, chunks)
    torch.testing.assert_close(logits, reference(input_ids=ids).logits, atol=TOLERANCE, rtol=0)
    assert past[0][0].shape[2] == 40


def test_greedy_ids(pair: tuple[Any, Exaone]) -> None:
    reference, model = pair
    ids = oracle.random_ids(WINDOW + 1, seed=3)
    wanted = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=32,
        min_new_tokens=32,
        eos_token_id=None,
    )[0, ids.shape[1] :]
    found: list[int] = []
    step, past = ids, model.decoder.empty_cache()
    for total in range(ids.shape[1], ids.shape[1] + 32):
        logits, _, past = model.decoder(step, torch.ones(1, total, dtype=torch.int64), past, torch.ones(1).long())
        step = logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(step))
    assert found == wanted.tolist()


def test_rows_padded_on_the_right_do_not_see_one_another(pair: tuple[Any, Exaone]) -> None:
    reference, model = pair
    lengths = (3, WINDOW + 5, 1)
    rows = [oracle.random_ids(length, seed=length) for length in lengths]
    width = max(lengths)
    batch = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=99) for row in rows])
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    one = torch.ones(1, dtype=torch.int64)
    logits, _, past = model.decoder(batch, mask, model.decoder.empty_cache(3), one)
    step = torch.tensor([[100], [101], [102]])
    grown = (torch.arange(width + 1)[None] < torch.tensor(lengths)[:, None] + 1).long()
    after, _, _ = model.decoder(step, grown, past, one)
    for i, row in enumerate(rows):
        whole = torch.cat([row, step[i : i + 1]], dim=1)
        expected = reference(input_ids=whole).logits[0]
        torch.testing.assert_close(logits[i, 0], expected[-2], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(after[i, 0], expected[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_last_logits_are_kept(pair: tuple[Any, Exaone], keep: int) -> None:
    _, model = pair
    ids = oracle.random_ids(12)
    every = model(ids)[0]
    kept = model.decoder(ids, torch.ones_like(ids), model.decoder.empty_cache(), torch.tensor([keep]))[0]
    torch.testing.assert_close(kept, every[:, -keep:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sliding_window": WINDOW - 1},
        {"sliding_window": WINDOW + 1},
        {"layer_types": ["sliding_attention"] * 5},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": oracle.LLAMA3 | {"factor": 8.0}},
        {"rope_parameters": oracle.LLAMA3 | {"rope_theta": 1e4}},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_comparison_notices_a_wrong_model(wrong: dict[str, Any]) -> None:
    reference = oracle.reference(oracle.HYBRID)
    ids = oracle.random_ids(5 * WINDOW)
    logits = oracle.ours(reference, oracle.HYBRID | wrong)(ids)[0]
    assert (logits - reference(input_ids=ids).logits).abs().max() > 10 * TOLERANCE


def test_global_layers_of_a_hybrid_model_do_not_rotate() -> None:
    reference = oracle.reference(oracle.HYBRID)
    model = oracle.ours(reference, oracle.HYBRID)
    ids = oracle.random_ids(5 * WINDOW)
    layer = model.decoder.layers[2]
    assert isinstance(layer, DecoderLayer)
    layer.self_attn.rotary = True
    assert (model(ids)[0] - reference(input_ids=ids).logits).abs().max() > 10 * TOLERANCE
