"""Every node of the graphs for CUDA has a kernel there for its types, or works on shapes; and what recipes become."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state

from exporter.bind import bind
from exporter.builder import CONTRIB
from exporter.cuda_kernels import notes, place, types_of
from exporter.cuda_passes import NEXT_IDS
from exporter.cuda_table import SIGNATURES
from exporter.export import ExportOptions, export_checkpoint
from exporter.graphs import graph_specs
from exporter.passes_names import LAYER
from exporter.trace import trace_graph
from model.bundle import DECODER, EMBEDDING, MTP, VISION_ENCODER, read_manifest
from model.config import ExaoneConfig, load_config
from model.errors import UsageError
from model.numerics import PLAIN, numerics_for
from model.weights import Checkpoint
from quantize.apply import Quantizer
from quantize.cuda import slow_products, why_slow
from quantize.recipe import load_recipe, parse_recipe
from tests import tiny

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Cosines and sines of at most one row for each row or column of patches, and the length of the longest segment, which
# is a shape: a few hundred numbers, for which there is no kernel at this version of the standard.
SMALL = {"Cos", "Sin", "ReduceMax"}
# The encoder runs once for each image; its shapes depend on the grid, which the CPU has to know.
READ_ON_THE_CPU = {VISION_ENCODER}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders by kind."""
    root = tmp_path_factory.mktemp("cuda")
    return {kind: tiny.make_checkpoint(root / kind, kind) for kind in ("vlm", "hybrid", "dense")}


@cache
def traced(source: Path, dtype: str, task: str) -> dict[str, ir.Model]:
    config = config_of(source, task)
    specs = graph_specs(config, Checkpoint.open(source).has_draft_head, numerics=numerics_for("cuda", dtype))
    return {spec.name: trace_graph(spec, TYPES[dtype]) for spec in specs}


def config_of(source: Path, task: str) -> ExaoneConfig:
    config = load_config(source)
    return config if task == "auto" else replace(config, task=task)


def graphs(source: Path, dtype: str, recipe: str = "none", task: str = "auto") -> dict[str, ir.Model]:
    """The graphs that an export for CUDA would write."""
    models = {name: model.clone() for name, model in traced(source, dtype, task).items()}
    config = config_of(source, task)
    bind(models, Checkpoint.open(source).bind(config), config)
    Quantizer(None if recipe == "none" else load_recipe(recipe)).for_target("cuda")(models)
    return models


def check(models: dict[str, ir.Model]) -> None:
    for name, model in models.items():
        placement = place(model.graph)
        found = [f"{x.node}: {x.why}" for x in placement.fallbacks if x.op_type not in SMALL]
        assert found == [], name
        assert {x.op_type for x in placement.fallbacks} <= (SMALL if name in READ_ON_THE_CPU else set())
        if name in (DECODER, MTP):
            assert placement.to_host == []
            assert placement.to_device == []
            assert placement.capturable
        assert len(placement.device) > len(placement.host)
        unlabelled = [node.name for node in model.graph.all_nodes() if not node.metadata_props.get(LAYER)]
        assert unlabelled == []


@pytest.mark.parametrize("recipe", ["none", "int4", "int8"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_node_has_a_kernel(dtype: str, recipe: str, sources: dict[str, Path]) -> None:
    models = graphs(sources["vlm"], dtype, recipe)
    assert set(models) == {VISION_ENCODER, EMBEDDING, DECODER, MTP}
    check(models)
    names = {value.name for value in models[DECODER].graph.outputs}
    assert NEXT_IDS in names
    labels = {node.metadata_props[LAYER] for node in models[DECODER].graph}
    assert {"embed", "layers.0", "head"} <= labels


def test_heads(sources: dict[str, Path]) -> None:
    models = graphs(sources["hybrid"], "fp16", task="feature-extraction")
    placement = place(models[DECODER].graph)
    assert placement.fallbacks == []


def test_graphs_for_the_cpu_are_seen_through(sources: dict[str, Path]) -> None:
    """Float32 attention has no kernel, and neither has Equal: the check finds both and says why."""
    config = load_config(sources["vlm"])
    specs = [spec for spec in graph_specs(config, False, numerics=PLAIN) if spec.name != VISION_ENCODER]
    models = {spec.name: trace_graph(spec) for spec in specs}
    placement = place(models[DECODER].graph)
    assert {x.op_type for x in placement.fallbacks} == {"GroupQueryAttention"}
    assert "does not take" in placement.fallbacks[0].why
    assert "T = float" in placement.fallbacks[0].why
    assert not placement.capturable
    assert placement.to_device  # its way of choosing rows mixes shapes with what lies on the device
    found = place(models[EMBEDDING].graph).fallbacks
    assert {x.op_type for x in found} == {"Equal"}
    assert "another version than 19" in found[0].why
    sentences = notes(models)
    assert any(sentence.startswith(f"{len(found)} nodes of embedding have no CUDA kernel") for sentence in sentences)


def test_types_and_attributes(sources: dict[str, Path]) -> None:
    models = graphs(sources["hybrid"], "fp16", "int4")
    check(models)
    graph = models[DECODER].graph
    types = types_of(graph)
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert all(len(node.inputs) == 16 and node.inputs[14] is not None for node in attention)
    assert all(node.attributes["qk_norm_epsilon"].as_float() > 0 for node in attention)
    assert all(node.inputs[1] is None and node.inputs[2] is None for node in attention)  # one product for all three
    residual = [node for node in graph if node.op_type == "Add" and node.metadata_props[LAYER].startswith("layers.")]
    assert len(residual) == 2 * len(attention)
    assert all(types[node.outputs[0]] == "float" for node in residual)
    operators = {node.op_type for node in graph}
    assert {"QuickGelu", "MatMulNBits"} <= operators
    assert not operators & {"If", "Scan", "Loop", "Sigmoid", "DynamicQuantizeLinear"}
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    assert all("accuracy_level" not in node.attributes and len(node.inputs) == 3 for node in products)
    assert {node.attributes["block_size"].as_int() for node in products} <= {16, 32}


def test_the_table_names_what_onnxruntime_knows(sources: dict[str, Path]) -> None:
    """Inputs by their places, and attributes by their names, are those of the installed onnxruntime's own operators."""
    schemas = {
        (schema.domain, schema.name): schema
        for schema in onnxruntime_pybind11_state.get_all_operator_schema()
        if (schema.domain, schema.name) in SIGNATURES
    }
    assert set(schemas) == set(SIGNATURES)
    for key, signature in SIGNATURES.items():
        assert tuple(parameter.typeStr for parameter in schemas[key].inputs) == signature.inputs, key
        assert tuple(parameter.typeStr for parameter in schemas[key].outputs) == signature.outputs, key
    names = [parameter.name for parameter in schemas[CONTRIB, "GroupQueryAttention"].inputs]
    assert names[14:] == ["q_norm_weight", "k_norm_weight"]
    used = [node for model in graphs(sources["vlm"], "fp16", "int4").values() for node in model.graph.all_nodes()]
    for node in used:
        if (node.domain, node.op_type) in schemas:
            assert set(node.attributes) <= set(schemas[node.domain, node.op_type].attributes), node.name


def test_a_bundle(tmp_path: Path, sources: dict[str, Path]) -> None:
    report = export_checkpoint(
        sources["dense"], tmp_path / "out", ExportOptions(target="cuda"), Quantizer(load_recipe("int8"))
    )
    assert (report.dtype, report.target) == ("fp16", "cuda")
    manifest = read_manifest(tmp_path / "out")
    decoder = manifest.graph(DECODER)
    assert decoder is not None
    assert {tensor.name: tensor.dtype for tensor in decoder.outputs}[NEXT_IDS] == "int64"
    assert not any("no CUDA kernel" in note for note in manifest.notes)
    models = {graph.name: ir.load(tmp_path / "out" / graph.file) for graph in manifest.graphs}
    check(models)
    float32 = [name for name, value in models[DECODER].graph.initializers.items() if value.dtype == ir.DataType.FLOAT]
    assert all("layernorm" in name for name in float32 if "." in name)


def test_float32_has_no_attention_kernel(tmp_path: Path, sources: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="takes fp16 and bf16 only"):
        export_checkpoint(sources["dense"], tmp_path / "out", ExportOptions(dtype="fp32", target="cuda"))
    assert ExportOptions().dtype == "fp32"
    assert ExportOptions(target="cuda").dtype == "fp16"


OWN = """
name = "own"
[[rule]]
match = "*"
bits = 4
block_size = 256
symmetric = false
"""


def test_recipes_for_cuda() -> None:
    for name in ("int4", "int8"):
        recipe = load_recipe(name)
        assert recipe.for_target("cpu") == recipe
        schemes = [rule.scheme for rule in recipe.for_target("cuda").rules if rule.scheme is not None]
        assert all(scheme.symmetric and scheme.block_size in (32, 64, 128) for scheme in schemes)
        assert parse_recipe(recipe.to_toml(), name) == recipe
    own = parse_recipe(OWN, "own")
    assert own.for_target("cuda") == own
    for wrong, why in (
        ("gpu = {}", "unknown key"),
        ("cuda = 3", "tables are wanted"),
        ("cuda = {bits = 8}", "unknown"),
    ):
        with pytest.raises(UsageError, match=why):
            parse_recipe(f"{OWN}\n[target]\n{wrong}\n", "own")
    with pytest.raises(UsageError, match="block_size is 7"):
        parse_recipe(f"{OWN}\n[target.cuda]\nblock_size = 7\n", "own")


def test_own_recipes_are_warned_of(sources: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    models = {name: model.clone() for name, model in traced(sources["hybrid"], "fp16", "auto").items()}
    config = load_config(sources["hybrid"])
    bind(models, Checkpoint.open(sources["hybrid"]).bind(config), config)
    Quantizer(parse_recipe(OWN, "own")).for_target("cuda")(models)
    assert any("leave CUDA's fast kernels because of" in record.message for record in caplog.records)
    assert why_slow(64, 256, 4, 32, zero_points=False) == ""
    assert why_slow(64, 256, 4, 256, zero_points=False) == "blocks of 256"
    assert why_slow(64, 256, 4, 32, zero_points=True) == "zero points"
    assert "no multiple of 64" in why_slow(96, 256, 4, 32, zero_points=False)
    assert why_slow(96, 256, 8, 32, zero_points=False) == ""
    assert slow_products({}) == []
