"""The graphs for CUDA, run on the CPU with nodes of the same meaning where it has no kernels, against eager PyTorch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from exporter.cuda_passes import NEXT_IDS
from exporter.graphs import GraphSpec, graph_specs
from exporter.passes_weights import FACTOR
from exporter.trace import trace_graph
from model.bundle import DECODER, MTP, VISION_ENCODER, WINDOW_CACHE
from model.config import ExaoneConfig
from model.load import load_exaone
from model.mtp import DraftHead
from model.numerics import PLAIN, Numerics, numerics_for
from model.text import Decoder
from model.vision import VisionEncoder
from tests import cuda_on_cpu, outliers, tiny
from tests.parity.onnx_graphs import (
    WINDOW,
    bind,
    dense_config,
    difference,
    hybrid_config,
    multimodal_config,
    randomize,
    vision_config,
)

HALF = numerics_for("cuda", "fp16")
EXACT = Numerics(device=True)  # of float32
TOLERANCE = 0.02  # of the largest value, after four layers in 11 bits
CONFIGS = {"dense": dense_config(), "hybrid": hybrid_config(), "multimodal": multimodal_config()}


def spec_of(config: ExaoneConfig, name: str, numerics: Numerics = HALF) -> GraphSpec:
    return next(spec for spec in graph_specs(config, True, numerics=numerics) if spec.name == name)


def bind_scaled(model: ir.Model, module: nn.Module) -> ir.Model:
    """A plain module's weights in a graph, with the factors that it asks for."""
    bind(model, module)
    for value in model.graph.initializers.values():
        factor = value.metadata_props.get(FACTOR)
        if factor is not None and value.const_value is not None:
            scaled = (value.const_value.numpy().astype(np.float32) * float(factor)).astype(
                value.const_value.numpy().dtype
            )
            value.const_value = ir.tensor(scaled, name=value.name)
    return model


class Cuda:
    """A graph for CUDA in half precision, on the CPU, and the plain module in float32 whose weights it has."""

    def __init__(self, config: ExaoneConfig, name: str) -> None:
        self.spec, self.plain = spec_of(config, name), spec_of(config, name, PLAIN)
        self.module = randomize(self.plain.build())
        self.model = bind_scaled(trace_graph(self.spec, torch.float16), self.module)
        self.session = cuda_on_cpu.session(cuda_on_cpu.lower_for_cpu(self.model.clone()))

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        kinds = {value.name: value.type for value in self.session.get_inputs()}
        feeds = {
            name: value.to(torch.float16 if kinds.get(name) == "tensor(float16)" else value.dtype).numpy()
            for name, value in inputs.items()
        }
        names = [value.name for value in self.session.get_outputs()]
        return {
            name: torch.from_numpy(value) for name, value in zip(names, self.session.run(names, feeds), strict=True)
        }

    def eager(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, hidden, _ = self.module(*self.plain.arguments(inputs))
        return logits, hidden


@cache
def cuda(kind: str, name: str = DECODER) -> Cuda:
    return Cuda(CONFIGS[kind], name)


def prompt(graph: Cuda, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs of a first pass with all logits; window layers' buffers are as large as the window."""
    torch.manual_seed(1)
    inputs = graph.plain.dummy_inputs(
        batch_size=batch, sequence_length=length, past_sequence_length=0, window_cache_length=WINDOW
    )
    return inputs | {"logits_to_keep": torch.tensor([0])}


def close(got: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(got).all()
    assert difference(got, expected) <= TOLERANCE * float(expected.abs().max())


def tokens_of(inputs: dict[str, Tensor]) -> list[str]:
    return [name for name in ("input_ids", "inputs_embeds", "hidden_states") if name in inputs]


@pytest.mark.parametrize("length", [1, WINDOW - 1, 5 * WINDOW])
@pytest.mark.parametrize(("kind", "name"), [("dense", DECODER), ("hybrid", DECODER), ("multimodal", MTP)])
def test_first_pass(kind: str, name: str, length: int) -> None:
    graph = cuda(kind, name)
    inputs = prompt(graph, 2, length)
    got, (logits, _) = graph.run(inputs), graph.eager(inputs)
    close(got["logits"], logits)
    if name == DECODER:
        assert torch.equal(got[NEXT_IDS], got["logits"].argmax(-1))


@pytest.mark.parametrize("kind", ["dense", "hybrid", "multimodal"])
def test_decoding_with_a_mask_of_fixed_width(kind: str) -> None:
    """As a captured graph is run: buffers and mask are as wide as the room, and only its ones say how much is used."""
    graph, room = cuda(kind), 40
    whole = prompt(graph, 1, 30)
    expected, _ = graph.eager(whole)
    cache_: dict[str, Tensor] = {
        name: torch.zeros(1, 2, WINDOW if WINDOW_CACHE in axes.values() else room, 16)
        for name, axes in graph.plain.inputs.items()
        if name.startswith("past_key_values.")
    }
    done = 0
    for length in (20, 1, 1, 5, 1, 1, 1):
        part = {name: whole[name][:, done : done + length] for name in tokens_of(whole)}
        done += length
        width = done if done == length else room  # a first pass is told by its mask being as wide as the pass
        mask = torch.zeros(1, width, dtype=torch.int64)
        mask[:, :done] = 1
        got = graph.run(part | cache_ | {"attention_mask": mask, "logits_to_keep": torch.tensor([1])})
        close(got["logits"], expected[:, done - 1 : done])
        assert torch.equal(got[NEXT_IDS], got["logits"].argmax(-1))
        presents = {name: got[name.replace("past_key_values", "present")] for name in cache_}
        assert all(value.shape == cache_[name].shape for name, value in presents.items())
        cache_ = presents


@pytest.mark.parametrize("keep", [0, 1, 3, 50])
def test_rows_for_the_head(keep: int) -> None:
    graph = cuda("dense")
    inputs = prompt(graph, 2, 9) | {"logits_to_keep": torch.tensor([keep])}
    inputs["attention_mask"][1, 6:] = 0
    got, (logits, _) = graph.run(inputs)["logits"], graph.eager(inputs)
    assert got.shape == logits.shape
    for row, valid in enumerate((9, 6)):
        first = 0 if keep == 0 else max(0, min(keep, 9) - valid)  # rows in front of a row's first token mean nothing
        last = valid if keep == 0 else got.shape[1]
        close(got[row, first:last], logits[row, first:last])


@pytest.mark.parametrize(
    "grids", [[(1, 4, 6)], [(1, 22, 10), (2, 8, 12), (1, 2, 2)], [(1, 18, 30)], [(1, 2, 34), (1, 16, 16)]]
)
def test_images(grids: list[tuple[int, int, int]]) -> None:
    graph = cuda("multimodal", VISION_ENCODER)
    inputs = graph.plain.dummy_inputs(grids=grids)
    close(graph.run(inputs)["image_features"], graph.module(*graph.plain.arguments(inputs)))


def test_packed_layout() -> None:
    """token_offset and cumulative_sequence_length are what the operator's documentation asks for."""
    graph = cuda("multimodal", VISION_ENCODER)
    model = graph.model.clone()
    packed = [node for node in model.graph if node.op_type == "PackedMultiHeadAttention"]
    layouts = {(node.inputs[4], node.inputs[5]): None for node in packed}
    assert len(packed) == 3
    assert len(layouts) == 2  # windows, and frames
    values = [value for layout in layouts for value in layout if value is not None]
    model = cuda_on_cpu.lower_for_cpu(model)
    names = [value.name for value in values]
    inputs = graph.plain.dummy_inputs(grids=[(1, 10, 18), (2, 4, 6)])
    run = cuda_on_cpu.session(model, values)
    feeds = {"pixel_values": inputs["pixel_values"].half().numpy(), "image_grid_thw": inputs["image_grid_thw"].numpy()}
    offsets, ends, frame_offsets, frame_ends = run.run(names, feeds)
    assert ends.tolist()[-1] == frame_ends.tolist()[-1] == 180 + 48
    assert frame_ends.tolist() == [0, 180, 204, 228]
    sizes = np.diff(ends).tolist()  # 8 x 8 patches, cut off at the right and below
    assert sizes == [64, 64, 16, 16, 16, 4, 24, 24]
    for offset, lengths in ((offsets, sizes), (frame_offsets, [180, 24, 24])):
        longest = max(lengths)
        assert offset.shape == (len(lengths), longest)
        places = [row * longest + i for row, length in enumerate(lengths) for i in range(length)]
        empty = sorted(set(range(offset.size)) - set(places))
        assert offset.reshape(-1).tolist() == places + empty


def test_nothing_grows_with_the_square_of_the_image() -> None:
    """Four times the patches, four times the values of every tensor at most."""
    model = cuda("multimodal", VISION_ENCODER).model.clone()
    for node in list(model.graph):
        if node.op_type == "PackedMultiHeadAttention":  # keeps no scores; here its result is as large
            identity = ir.node("Identity", [node.inputs[0]])
            identity.outputs[0].type = node.inputs[0].type if node.inputs[0] is not None else None
            model.graph.insert_before(node, [identity])
            node.outputs[0].replace_all_uses_with(identity.outputs[0])
            model.graph.remove(node, safe=True)
    model = cuda_on_cpu.lower_for_cpu(model)
    inner = [value for node in model.graph for value in node.outputs]
    run = cuda_on_cpu.session(model, inner)
    width, sizes = vision_config().patch_dim, []
    for side in (32, 64):
        grid = np.array([[1, side, side]])
        feeds = {"pixel_values": np.zeros((side * side, width), np.float16), "image_grid_thw": grid}
        sizes.append([value.size for value in run.run(None, feeds)])
    assert max(sizes[1]) >= 4096 * 64
    assert [(a, b) for a, b in zip(*sizes, strict=True) if b > 4 * a + 64] == []


def overflowing(module: nn.Module) -> nn.Module:
    """Gains and weights so large that half precision overflows in the residual stream and in front of norms."""
    for name, parameter in module.named_parameters():
        if name.endswith(("layernorm.weight", "down_proj.weight")):
            parameter.data = parameter.data * 2.0**14
        if name.endswith("embed_tokens.weight"):
            parameter.data = parameter.data * 2.0**13
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            parameter.data = parameter.data * 2.0**-14
    return module


def half_logits(exact: Decoder, numerics: Numerics) -> Tensor:
    """Logits of a decoder with another's weights, in half precision where its numerics do not say otherwise."""
    ids = torch.arange(40)[None] % exact.config.vocab_size
    kind = torch.float32 if numerics == EXACT else torch.float16
    module = Decoder(exact.config, embeds=True, numerics=numerics)
    module.load_state_dict(exact.state_dict())
    for name, parameter in module.named_parameters():
        residual = numerics.wide and name.endswith("layernorm.weight")
        parameter.data = parameter.data.to(torch.float32 if residual else kind)
    module.cos, module.sin = exact.cos.to(kind), exact.sin.to(kind)
    with torch.no_grad():
        logits: Tensor = module(ids, torch.ones_like(ids), module.empty_cache(), torch.zeros(1, dtype=torch.int64))[0]
    return logits.float()


def test_half_precision_overflows_where_it_is_not_kept_in_range() -> None:
    """The residual stream passes 65,504 and so does what down_proj gives; with a fraction of both nothing overflows."""
    exact = randomize(Decoder(hybrid_config().text, embeds=True))
    assert isinstance(exact, Decoder)
    overflowing(exact)
    peak: dict[str, float] = {}
    for name, module in exact.named_modules():
        if name.endswith("down_proj") or name == "layers.3":

            def note(_: nn.Module, __: object, out: object, name: str = name) -> None:
                tensor = out[0] if isinstance(out, tuple) else out
                assert isinstance(tensor, Tensor)
                peak[name] = float(tensor.abs().max())

            module.register_forward_hook(note)
    ids = torch.arange(40)[None] % exact.config.vocab_size
    exact(ids, torch.ones_like(ids), exact.empty_cache(), torch.zeros(1, dtype=torch.int64))
    assert peak["layers.3"] > 65504
    assert peak["layers.3.mlp.down_proj"] > 65504
    assert not torch.isfinite(half_logits(exact, PLAIN)).all()
    close(half_logits(exact, HALF), half_logits(exact, EXACT))


@pytest.mark.parametrize(("exponent", "overflows"), [(8, False), (14, True)])
def test_outliers(exponent: int, overflows: bool, tmp_path: Path) -> None:
    """Channels that are thousands of times as large as others, as large models have them."""
    source = tiny.make_checkpoint(tmp_path / "source", "hybrid")
    exact = load_exaone(outliers.write_checkpoint(source, tmp_path / "outliers", exponent)).decoder
    assert torch.isfinite(half_logits(exact, PLAIN)).all() == (not overflows)
    close(half_logits(exact, HALF), half_logits(exact, EXACT))


@pytest.mark.parametrize("kind", ["text", "draft", "vision"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_keeps_numbers_in_range_changes_nothing(kind: str, dtype: str) -> None:
    config = multimodal_config()
    vision, mtp = config.vision, config.mtp
    assert vision is not None
    assert mtp is not None

    def made(numerics: Numerics) -> nn.Module:
        if kind == "vision":
            return VisionEncoder(vision, numerics)
        text = config.text
        return Decoder(text, numerics=numerics) if kind == "text" else DraftHead(text, mtp, numerics=numerics)

    plain, other = randomize(made(PLAIN)), made(numerics_for("cuda", dtype)).eval()
    other.load_state_dict(plain.state_dict())
    torch.manual_seed(0)
    if kind == "vision":
        grids = torch.tensor([(1, 22, 10), (2, 8, 12), (1, 2, 2)])
        arguments: tuple[object, ...] = (torch.randn(220 + 192 + 4, vision.patch_dim), grids)
    else:
        x, mask = torch.randn(2, 30, 48), torch.ones(2, 30, dtype=torch.int64)
        empty = [(torch.zeros(2, 2, 0, 16),) * 2] * (4 if kind == "text" else 1)
        arguments = (*([x] if kind == "text" else [x, x.flip(1)]), mask, empty, torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        one, two = plain(*arguments), other(*arguments)
    one, two = (value[0] if isinstance(value, tuple) else value for value in (one, two))
    assert difference(one, two) < 1e-5
