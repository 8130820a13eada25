"""Traced models: names, determinism, types, and nothing of the machine they were traced on."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from exporter.graphs import graph_specs
from exporter.passes import operator_counts, run_passes
from exporter.trace import trace_graph
from model.exaone import Exaone
from tests.parity.onnx_graphs import dense_config, find_spec, multimodal_config

NAMES = ("vision_encoder", "embedding", "decoder", "mtp")


def proto_bytes(model: ir.Model) -> bytes:
    """The model's bytes; weights without data become tensors of no data."""
    for value in model.graph.initializers.values():
        if value.const_value is None and value.shape is not None:
            value.const_value = ir.ExternalTensor(
                "weights", 0, 0, ir.DataType.FLOAT, shape=value.shape, name=str(value.name)
            )
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def models() -> dict[str, ir.Model]:
    return {spec.name: trace_graph(spec) for spec in graph_specs(multimodal_config(), draft=True)}


def test_graphs_of_a_model() -> None:
    assert [spec.name for spec in graph_specs(multimodal_config(), draft=True)] == list(NAMES)
    assert [spec.name for spec in graph_specs(multimodal_config(), draft=False)] == list(NAMES[:3])
    assert [spec.name for spec in graph_specs(dense_config(), draft=True)] == ["decoder"]
    outputs = find_spec(multimodal_config(), "decoder", draft=True).outputs
    assert set(outputs) - set(find_spec(multimodal_config(), "decoder").outputs) == {"hidden_states"}


def test_weights_keep_their_names_and_have_no_data(models: dict[str, ir.Model]) -> None:
    whole = Exaone(multimodal_config(), draft=True)
    for name, model in models.items():
        part = getattr(whole, name)
        parameters = dict(part.named_parameters(remove_duplicate=False))
        weights = {key: value for key, value in model.graph.initializers.items() if value.const_value is None}
        assert set(weights) - {"cos", "sin"} == set(parameters)
        for key, value in weights.items():
            expected = list((parameters[key] if key in parameters else getattr(part, key)).shape)
            transposed = value.metadata_props.get("transposed") == "1"
            assert value.shape is not None
            assert list(value.shape) == (expected[::-1] if transposed else expected), key
            assert transposed == (key in parameters and len(expected) == 2 and "embed_tokens" not in key), key


def test_a_tied_head_is_a_weight_of_its_own() -> None:
    model = trace_graph(find_spec(dense_config(), "decoder"))
    assert {"embed_tokens.weight", "lm_head.weight"} <= set(model.graph.initializers)
    assert model.graph.initializers["lm_head.weight"].shape == ir.Shape([48, 160])


def test_nodes_are_named_and_labelled(models: dict[str, ir.Model]) -> None:
    decoder = models["decoder"]
    names = [node.name for model in models.values() for node in model.graph]
    assert "layers.3.mlp.down_proj/MatMul" in names
    assert "lm_head/MatMul" in names
    for model in models.values():
        inside = [node.name for node in model.graph]
        assert len(set(inside)) == len(inside)
        assert all(set(node.metadata_props) == {"layer_ann"} for node in model.graph.all_nodes())
    labels = [node.metadata_props["layer_ann"] for node in decoder.graph]
    assert set(labels) == {"embed", "head", *(f"layers.{i}" for i in range(4))}
    assert labels[-1] == "head"
    by_name = {node.name: node.metadata_props["layer_ann"] for node in decoder.graph}
    assert by_name["layers.2.self_attn/GroupQueryAttention"] == "layers.2"
    assert {node.metadata_props["layer_ann"] for node in models["embedding"].graph} == {"embed"}


def test_tracing_again_gives_the_same_bytes(models: dict[str, ir.Model]) -> None:
    for spec in graph_specs(multimodal_config(), draft=True)[1:3]:
        again = trace_graph(spec)
        data = proto_bytes(again)
        assert data == proto_bytes(models[spec.name].clone())
        assert str(Path(__file__).parents[2]).encode() not in data
        assert b"pkg.torch" not in data
        assert b".py" not in data


def test_passes_have_nothing_left_to_do(models: dict[str, ir.Model]) -> None:
    model = models["decoder"].clone()
    before = operator_counts(model)
    counts = run_passes(model)
    assert operator_counts(model) == before
    assert not any(counts[name] for name in ("fold_transposes", "fix_reshapes", "lower_segment_attention"))


@pytest.mark.parametrize(
    ("dtype", "onnx_type"), [(torch.float16, ir.DataType.FLOAT16), (torch.bfloat16, ir.DataType.BFLOAT16)]
)
def test_other_types_of_weights(dtype: torch.dtype, onnx_type: ir.DataType) -> None:
    for spec in graph_specs(multimodal_config(), draft=True):
        model = trace_graph(spec, dtype)
        types = {value.dtype for value in model.graph.initializers.values() if value.const_value is None}
        assert types == {onnx_type}
        assert model.graph.outputs[0].dtype == onnx_type
    assert torch.get_default_dtype() == torch.float32
