"""The branch that graphs for the CPU take for single tokens, against eager PyTorch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from exporter.passes import operator_counts
from exporter.trace import trace_graph
from model.bundle import WINDOW_CACHE
from model.config import FULL, SLIDING, ExaoneConfig
from tests.parity.onnx_graphs import (
    WINDOW,
    Session,
    bind,
    dense_config,
    difference,
    find_spec,
    hybrid_config,
    multimodal_config,
    randomize,
    text_config,
)

TOLERANCE = 1e-4


class Chosen(Session):
    """A session that tells which branch a pass took."""

    def __init__(self, config: ExaoneConfig, name: str = "decoder", draft: bool = False, window: bool = True) -> None:
        self.spec = find_spec(config, name, draft, window)
        self.module = randomize(self.spec.build())
        self.model = bind(trace_graph(self.spec, for_cpu=True), self.module)
        choices = {node.inputs[0] for node in self.model.graph if node.op_type == "If"}
        assert len(choices) == 1  # one choice for all layers
        (choice,) = choices
        assert choice is not None
        choice.name, choice.shape, choice.type = "chosen", ir.Shape([]), ir.TensorType(ir.DataType.BOOL)
        self.model.graph.outputs.append(choice)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        proto = ir.to_proto(self.model).SerializeToString()
        self.session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


class Buffers:
    """Caches of fixed size that passes share, beside the module's own cache of one row at a time."""

    def __init__(self, session: Chosen, rows: int, capacity: int, filling: float = 0.0) -> None:
        self.session, self.rows = session, rows
        text = session.spec.config.text
        self.arrays = {
            name: np.full(
                (rows, text.num_kv_heads, WINDOW + 16 if WINDOW_CACHE in axes.values() else capacity, text.head_dim),
                filling, np.float32,
            )
            for name, axes in session.spec.inputs.items() if name.startswith("past")
        }  # fmt: skip
        self.values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()}

    def run(self, inputs: dict[str, Tensor], lengths: list[int]) -> tuple[Tensor, bool]:
        """Logits and the branch of one pass; lengths: each row's tokens after it."""
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        binding = self.session.session.io_binding()
        for name, value in (inputs | {"attention_mask": mask, "logits_to_keep": torch.tensor([0])}).items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()))
        for name, buffer in self.values.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        for name in ("logits", "chosen"):
            binding.bind_output(name, "cpu")
        self.session.session.run_with_iobinding(binding)
        logits, chosen = (value.numpy() for value in binding.get_outputs()[-2:])
        return torch.from_numpy(logits), bool(chosen)


def tokens(session: Chosen, rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """What a graph takes for each token, without masks and caches."""
    torch.manual_seed(seed)
    inputs = session.spec.dummy_inputs(
        batch_size=rows, sequence_length=length, past_sequence_length=0, window_cache_length=WINDOW + 16
    )
    return {name: inputs[name] for name in ("input_ids", "inputs_embeds", "hidden_states") if name in inputs}


def part(inputs: dict[str, Tensor], rows: slice, positions: slice) -> dict[str, Tensor]:
    return {name: value[rows, positions].contiguous() for name, value in inputs.items()}


def expected(session: Chosen, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [length, vocab] of one row that is read at once."""
    length = next(iter(inputs.values())).shape[1]
    full = session.spec.dummy_inputs(
        batch_size=1, sequence_length=length, past_sequence_length=0, window_cache_length=WINDOW + 16
    )
    full |= inputs | {"attention_mask": torch.ones((1, length), dtype=torch.long), "logits_to_keep": torch.tensor([0])}
    logits: Tensor = session.module(*session.spec.arguments(full))[0]
    return logits[0]


@pytest.fixture(scope="module")
def dense() -> Chosen:
    return Chosen(dense_config())


@pytest.fixture(scope="module")
def hybrid() -> Chosen:
    return Chosen(hybrid_config())


@pytest.fixture(scope="module")
def narrow() -> Chosen:
    """Heads of 8, which turn before attention."""
    text = text_config(head_dim=8, num_layers=2, layer_types=(SLIDING, FULL))
    return Chosen(ExaoneConfig("exaone4", text, None, None, 1, (2,), 0))


@pytest.fixture(scope="module")
def embedded() -> Chosen:
    return Chosen(multimodal_config(), draft=True)


@pytest.mark.parametrize("kind", ["dense", "hybrid", "narrow", "embedded"])
def test_prompts_in_pieces_then_single_tokens(kind: str, request: pytest.FixtureRequest) -> None:
    session: Chosen = request.getfixturevalue(kind)
    inputs = tokens(session, 1, 40)
    whole, buffers, done = expected(session, inputs), Buffers(session, 1, 42), 0
    taken = []
    # The first is a whole prompt of one token; later ones are past the window.
    for length in (1, 8, 1, 11, 1, 4, 1, 1, *[1] * 3, 2, *[1] * 7):
        logits, chosen = buffers.run(part(inputs, slice(None), slice(done, done + length)), [done + length])
        assert difference(logits[0], whole[done : done + length]) < TOLERANCE
        done += length
        taken.append((length, chosen))
    assert done == 40
    assert all(chosen == (length == 1) for length, chosen in taken)


def test_what_lies_beyond_the_tokens_is_not_seen(dense: Chosen) -> None:
    """As after a rewind: the buffer is full of something else."""
    inputs = tokens(dense, 1, 20)
    whole, buffers = expected(dense, inputs), Buffers(dense, 1, 26, filling=100.0)
    buffers.run(part(inputs, slice(None), slice(0, 17)), [17])
    for position in (17, 18, 19, 18, 19):  # two of them twice
        logits, chosen = buffers.run(part(inputs, slice(None), slice(position, position + 1)), [position + 1])
        assert chosen
        assert difference(logits[0], whole[position : position + 1]) < TOLERANCE
    for name, array in buffers.arrays.items():
        assert (array[:, :, 20:] == 100.0).all(), name


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_rows_of_different_lengths_and_one_that_has_ended(kind: str, request: pytest.FixtureRequest) -> None:
    session: Chosen = request.getfixturevalue(kind)
    inputs, lengths = tokens(session, 3, 30), [14, 20, 5]
    buffers = Buffers(session, 3, 28)
    buffers.run(part(inputs, slice(None), slice(0, 20)), lengths)
    wholes = [expected(session, part(inputs, slice(row, row + 1), slice(0, 30))) for row in range(3)]
    for step in range(4):
        going = [length + 1 for length in lengths[:2]] + ([lengths[2] + 1] if step < 2 else [1])
        new = {
            name: torch.stack([value[row, length - 1 : length] for row, length in enumerate(going)])
            for name, value in inputs.items()
        }
        logits, chosen = buffers.run(new, going)
        assert chosen
        for row in range(3 if step < 2 else 2):
            assert difference(logits[row, 0], wholes[row][going[row] - 1]) < TOLERANCE
        lengths = going


def test_caches_that_grow_by_copying(dense: Chosen) -> None:
    inputs = tokens(dense, 1, 30)
    whole = expected(dense, inputs)
    cache = {name: torch.zeros(1, 2, 0, 16) for name in dense.spec.inputs if name.startswith("past")}
    done = 0
    for length in (20, 1, 1, 8):
        new = part(inputs, slice(None), slice(done, done + length))
        done += length
        ones = {"attention_mask": torch.ones((1, done), dtype=torch.long), "logits_to_keep": torch.tensor([0])}
        outputs = dense.run(new | ones | cache)
        assert outputs["chosen"] == (length == 1)
        assert difference(outputs["logits"][0], whole[done - length : done]) < TOLERANCE
        cache = {
            name.replace("present", "past_key_values"): value
            for name, value in outputs.items() if name.startswith("present.")
        }  # fmt: skip


def test_unshared_past_stays_as_it_is(dense: Chosen) -> None:
    inputs = tokens(dense, 1, 20)
    whole, buffers = expected(dense, inputs), Buffers(dense, 1, 22)
    buffers.run(part(inputs, slice(None), slice(0, 19)), [19])
    before = {name: torch.from_numpy(array.copy()) for name, array in buffers.arrays.items()}
    ones = {"attention_mask": torch.ones((1, 20), dtype=torch.long), "logits_to_keep": torch.tensor([0])}
    outputs = dense.run(part(inputs, slice(None), slice(19, 20)) | ones | before)
    assert outputs["chosen"]
    assert difference(outputs["logits"][0], whole[19:]) < TOLERANCE
    for name, value in before.items():
        assert (value.numpy() == buffers.arrays[name]).all()
        assert not value[:, :, 19].any()
        assert outputs[name.replace("past_key_values", "present")][:, :, 19].any()


def test_only_caches_that_are_seen_whole_and_in_float32(dense: Chosen, hybrid: Chosen) -> None:
    for session, layers, lowered in ((dense, 2, 2), (hybrid, 4, 4)):
        counts = operator_counts(session.model)
        assert counts["If"] == lowered
        assert counts["GroupQueryAttention"] == layers + lowered
        assert [node.op_type for node in session.model.graph].count("GroupQueryAttention") == layers - lowered
    half = trace_graph(find_spec(dense_config(), "decoder"), torch.float16, for_cpu=True)
    assert "If" not in operator_counts(half)
    full = trace_graph(find_spec(hybrid_config(), "decoder", window_cache=False), for_cpu=True)
    assert operator_counts(full)["If"] == 1


def test_names_are_readable_and_single(dense: Chosen) -> None:
    nodes = list(dense.model.graph.all_nodes())
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    assert "layers.1.self_attn/If" in names
    assert {node.metadata_props["layer_ann"] for node in nodes} == {"embed", "layers.0", "layers.1", "head"}


@pytest.mark.parametrize(("depth", "same"), [(-1e30, True), (0.0, False)])
def test_sinks_weigh_nothing(dense: Chosen, depth: float, same: bool) -> None:
    """How deep they are changes no bit; that they are there would, if they were not."""
    inputs, results = tokens(dense, 2, 20), []
    for change in (False, True):
        model = ir.from_proto(ir.to_proto(dense.model))
        (sinks,) = {node.inputs[11] for node in model.graph.all_nodes() if len(node.inputs) > 11}
        assert sinks is not None
        assert sinks.const_value is not None
        if change:
            sinks.const_value = ir.tensor(np.full(sinks.const_value.shape.numpy(), depth, np.float32), name=sinks.name)
        changed = Chosen.__new__(Chosen)
        changed.spec = dense.spec
        proto = ir.to_proto(model).SerializeToString()
        changed.session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
        buffers = Buffers(changed, 2, 24)
        buffers.run(part(inputs, slice(None), slice(0, 19)), [19, 19])
        logits, chosen = buffers.run(part(inputs, slice(None), slice(19, 20)), [20, 20])
        assert chosen
        results.append(logits)
    assert torch.equal(*results) == same
