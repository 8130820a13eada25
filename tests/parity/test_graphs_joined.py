"""Graphs whose products are joined give what the plain ones do, bit for bit."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from exporter.passes import operator_counts
from quantize import apply
from quantize.recipe import Recipe, Rule
from quantize.scheme import Scheme
from tests.parity.onnx_graphs import WINDOW, Session

TOKENS = 9
KINDS = ["hybrid", "dense", "embedded", "draft"]
EVERYTHING = Recipe("test", (Rule("*", Scheme(4, 16)),))


def prompt(session: Session) -> dict[str, Tensor]:
    """Inputs of a first pass over two rows."""
    torch.manual_seed(0)
    inputs = session.spec.dummy_inputs(
        batch_size=2, sequence_length=TOKENS, past_sequence_length=0, window_cache_length=WINDOW + 16
    )
    return inputs | {"logits_to_keep": torch.tensor([0])}


def run(model: ir.Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    # What lies in a buffer behind the tokens has no meaning.
    return [torch.from_numpy(x[:, :, :TOKENS] if x.ndim == 4 else x) for x in outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_joined_products(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    session: Session = request.getfixturevalue(kind)
    joined, apart = session.model.clone(), session.model.clone()
    report = apply.quantize_models({"decoder": joined}, EVERYTHING)
    monkeypatch.setattr(apply, "join_products", lambda graph: 0)
    assert apply.quantize_models({"decoder": apart}, EVERYTHING) == report
    layers = len(session.module.layers)  # type: ignore[arg-type]
    products = [operator_counts(model)["MatMulNBits"] for model in (apart, joined)]
    assert products[0] - products[1] == 3 * layers
    assert operator_counts(joined)["Split"] == 2 * layers
    inputs = prompt(session)
    for one, other in zip(run(joined, inputs), run(apart, inputs), strict=True):
        assert torch.equal(one, other)
