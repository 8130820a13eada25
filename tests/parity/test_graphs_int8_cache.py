"""Graphs whose keys and values are integers, against eager models: with floats, and with the same codes as floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter import lowering_int8
from exporter.passes import operator_counts
from exporter.trace import trace_graph
from model import ops
from model.bundle import WINDOW_CACHE
from model.config import FULL, SLIDING, ExaoneConfig
from tests.parity.onnx_graphs import (
    WINDOW,
    bind,
    dense_config,
    difference,
    find_spec,
    hybrid_config,
    multimodal_config,
    randomize,
    text_config,
)

LENGTH = 60
RING = WINDOW + 5
KINDS = ("hybrid", "dense", "narrow", "embedded", "draft")
PLANS = ([60], [20] + [1] * 40, [1] * 60, [7, 9, 1, 1, 14, 1, 1, 20, 1, 1, 1, 1, 2])
# Of queries and attention weights 13 bits are kept. Now and then a code is the next one, which layers above enlarge.
SAME_CODES, OF_ONE_LAYER, OF_SHARP_ATTENTION = 1e-2, 3e-3, 2e-2
FLOATS = 0.03  # of the largest logit


class Graph:
    """A session over a traced graph, and its eager module."""

    def __init__(self, config: ExaoneConfig, name: str = "decoder", *, sharp: float = 1.0, loud: float = 1.0) -> None:
        self.spec = find_spec(config, name, config.mtp is not None, window_cache=False)
        self.module = randomize(self.spec.build())
        for path, parameter in self.module.named_parameters():
            if path.endswith("q_norm.weight"):
                parameter.data *= sharp
            if path.endswith("v_proj.weight"):
                parameter.data[: parameter.shape[0] // 2] *= loud
        self.model = bind(trace_graph(self.spec, for_cpu=True, int8_cache=True), self.module)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        proto = ir.to_proto(self.model).SerializeToString()
        self.session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])

    def tokens(self, rows: int, length: int = LENGTH) -> dict[str, Tensor]:
        torch.manual_seed(length)
        inputs = self.spec.dummy_inputs(batch_size=rows, sequence_length=length, past_sequence_length=0)
        return {name: inputs[name] for name in ("input_ids", "inputs_embeds", "hidden_states") if name in inputs}

    def eager(self, inputs: dict[str, Tensor], pieces: list[int]) -> Tensor:
        """Logits of every position of one row, read in pieces."""
        text, done, logits = self.spec.config.text, 0, []
        nothing = torch.zeros(1, text.num_kv_heads, 0, text.head_dim)
        layers: Any = self.module.layers
        past = [(nothing, nothing)] * len(layers)
        for piece in pieces:
            done += piece
            given = [value[:, done - piece : done] for value in inputs.values()]
            outputs = self.module(*given, torch.ones(1, done, dtype=torch.int64), past, torch.tensor([0]))
            logits.append(outputs[0])
            past = outputs[-1]
        return torch.cat(logits, 1)


class Buffers:
    """Caches that passes share. They are full of what must not be seen."""

    def __init__(self, graph: Graph, rows: int, ring: int = RING, capacity: int = LENGTH + 3) -> None:
        self.graph = graph
        self.values: dict[str, tuple[NDArray[Any], Any]] = {}
        for entry in graph.session.get_inputs():
            if entry.name.startswith("past"):
                slots = ring if WINDOW_CACHE in entry.shape else capacity
                dtype = {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8}.get(entry.type, np.float32)
                filling = 1e4 if dtype is np.float32 else 100
                typed: NDArray[Any] = np.full((rows, entry.shape[1], slots, entry.shape[3]), filling, dtype)
                self.values[entry.name] = typed, onnxruntime.OrtValue.ortvalue_from_numpy(typed)

    def run(self, inputs: dict[str, Tensor], lengths: list[int]) -> Tensor:
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        binding = self.graph.session.io_binding()
        feeds = inputs | {"attention_mask": mask, "logits_to_keep": torch.tensor([0])}
        held = {name: np.ascontiguousarray(value.numpy()) for name, value in feeds.items()}
        for name, array in held.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name, (_, buffer) in self.values.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits", "cpu")
        self.graph.session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[-1].numpy())


def read(graph: Graph, inputs: dict[str, Tensor], pieces: list[int], **sizes: int) -> Tensor:
    buffers, done, logits = Buffers(graph, 1, **sizes), 0, []
    for piece in pieces:
        done += piece
        logits.append(buffers.run({name: value[:, done - piece : done] for name, value in inputs.items()}, [done]))
    return torch.cat(logits, 1)


def rounded(x: Tensor, heads: int) -> Tensor:
    """Keys or values [batch, sequence, heads * width] after 8 bits with one scale for each token and head."""
    parts = x.unflatten(-1, (heads, -1))
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((parts / scale).round() * scale).flatten(-2)


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets eager attention see what the cache would hold: a single token all of it, longer passes what came before."""
    original = ops._group_query_attention

    def attention(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, past_key, past_value, lengths, total, cos, sin, heads, kv_heads, window, rotary, *rest = (
            given
        )
        sequence = query.shape[1]
        if rotary:
            query = ops._rotate_rows(query, heads, lengths, total, (cos, sin))
            key = ops._rotate_rows(key, kv_heads, lengths, total, (cos, sin))
        shared = past_key, past_value, lengths, total, cos, sin, heads, kv_heads, window, False, *rest
        kept = original(query, rounded(key, kv_heads), rounded(value, kv_heads), *shared)
        out = kept[0] if sequence == 1 else original(query, key, value, *shared)[0]
        return out, *kept[1:]

    monkeypatch.setattr(ops, "_group_query_attention", attention)


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    narrow = text_config(head_dim=8, num_layers=2, layer_types=(SLIDING, FULL))
    return {
        "hybrid": Graph(hybrid_config()),
        "dense": Graph(dense_config()),
        "narrow": Graph(ExaoneConfig("exaone4", narrow, None, None, 1, (2,), 0)),
        "embedded": Graph(multimodal_config()),
        "draft": Graph(multimodal_config(), "mtp"),
        "sharp": Graph(hybrid_config(), sharp=6.0),
        "loud": Graph(hybrid_config(), loud=1e6),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_near_to_floats(graphs: dict[str, Graph], kind: str) -> None:
    """Prompts past the window in pieces, single tokens, both in turns."""
    graph = graphs[kind]
    inputs = graph.tokens(1)
    wanted = graph.eager(inputs, [LENGTH])
    for pieces in PLANS:
        got = read(graph, inputs, pieces)
        assert difference(got, wanted) < FLOATS * float(wanted.abs().max())
        assert float(torch.cosine_similarity(got, wanted, -1).min()) > 0.999
    assert difference(read(graph, inputs, [LENGTH]), wanted) < 1e-4  # nothing was cached before


@pytest.mark.usefixtures("codes")
@pytest.mark.parametrize("kind", [*KINDS, "sharp", "loud"])
def test_nothing_is_lost_but_by_the_codes(graphs: dict[str, Graph], kind: str) -> None:
    """Also where one weight of attention is many times all others, and one head's values a million times another's."""
    graph = graphs[kind]
    inputs = graph.tokens(1)
    for pieces in PLANS:
        wanted = graph.eager(inputs, pieces)
        error = (read(graph, inputs, pieces) - wanted).norm() / wanted.norm()
        assert float(error) < {"draft": OF_ONE_LAYER, "sharp": OF_SHARP_ATTENTION}.get(kind, SAME_CODES)


@pytest.mark.parametrize("ring", [WINDOW + 1, WINDOW + 2, 40])
@pytest.mark.parametrize("capacity", [LENGTH, 10 * LENGTH])
def test_sizes_of_buffers(graphs: dict[str, Graph], ring: int, capacity: int) -> None:
    """Rings that turn at any place; buffers that are mostly empty, for which single tokens go the other way."""
    inputs = graphs["hybrid"].tokens(1)
    wanted = graphs["hybrid"].eager(inputs, [LENGTH])
    for pieces in PLANS[1:]:
        got = read(graphs["hybrid"], inputs, pieces, ring=ring, capacity=capacity)
        assert difference(got, wanted) < FLOATS * float(wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[3, 8, 1], [24, 2, 9], [1, 1, 1]])
def test_rows_of_different_lengths(graphs: dict[str, Graph], kind: str, lengths: list[int]) -> None:
    """A padded first pass, longer than rings too, then one token for each row far beyond the window."""
    graph, rows = graphs[kind], len(lengths)
    inputs, buffers, done = graph.tokens(rows), Buffers(graph, rows), list(lengths)
    wanted = torch.cat([graph.eager({n: x[i : i + 1] for n, x in inputs.items()}, [LENGTH]) for i in range(rows)])
    limit = FLOATS * float(wanted.abs().max())
    got = buffers.run({name: x[:, : max(lengths)] for name, x in inputs.items()}, done)
    for row, length in enumerate(lengths):
        assert difference(got[row, :length], wanted[row, :length]) < limit
    for _ in range(3 * WINDOW):
        new = {name: torch.stack([x[row, at : at + 1] for row, at in enumerate(done)]) for name, x in inputs.items()}
        done = [length + 1 for length in done]
        got = buffers.run(new, done)
        for row, end in enumerate(done):
            assert difference(got[row, -1], wanted[row, end - 1]) < limit


def test_too_small_caches_are_refused(graphs: dict[str, Graph]) -> None:
    graph = graphs["dense"]
    with pytest.raises(Exception, match="indice"):
        read(graph, graph.tokens(1), [20], capacity=19)


def test_what_the_graph_is_made_of(graphs: dict[str, Graph]) -> None:
    graph = graphs["hybrid"]
    counts = operator_counts(graph.model)
    assert counts["If"] == counts["GroupQueryAttention"] == 4
    assert counts["MatMulIntegerToFloat"] == 2 * 4
    types = {entry.name: (entry.type, entry.shape[2:]) for entry in graph.session.get_inputs() if "past" in entry.name}
    assert types["past_key_values.0.key"] == ("tensor(uint8)", [WINDOW_CACHE, 16])
    assert types["past_key_values.3.value"] == ("tensor(int8)", ["past_sequence_length", 16])
    assert types["past_key_values.3.value_scale"] == ("tensor(float)", ["past_sequence_length", 1])
    present = [entry.name.replace("present", "past_key_values") for entry in graph.session.get_outputs()[-16:]]
    assert present == list(types)


def test_queries_must_be_normalised(graphs: dict[str, Graph]) -> None:
    with pytest.raises(ValueError, match="norm"):
        lowering_int8._gain(ir.Value(name="query"))
