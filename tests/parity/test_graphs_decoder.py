"""The decoder's and the draft head's graphs against eager PyTorch and transformers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from exporter.passes import operator_counts
from model import ops
from model.bundle import WINDOW_CACHE, past_key, past_value, present_key, present_value
from model.ops import resident_tokens
from model.text import Decoder
from tests.parity.onnx_graphs import WINDOW, Session, difference

TOLERANCE = 1e-4
BUFFER = WINDOW + 16


def prompt(session: Session, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a first pass: no cache, all logits."""
    torch.manual_seed(seed)
    inputs = session.spec.dummy_inputs(
        batch_size=batch, sequence_length=length, past_sequence_length=0, window_cache_length=BUFFER
    )
    return inputs | {"logits_to_keep": torch.tensor([0])}


def eager(session: Session, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The module's results under the graph's names."""
    logits, hidden, cache = session.module(*session.spec.arguments(inputs))
    values = {"logits": logits, "hidden_states": hidden, "hidden_states_out": hidden}
    for layer, (key, value) in enumerate(cache):
        values |= {present_key(layer): key, present_value(layer): value}
    return {name: values[name] for name in session.spec.outputs}


def assert_equal(session: Session, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    got, expected = session.run(inputs), eager(session, inputs)
    assert expected["logits"].abs().max() > 0.5
    held = int(resident_tokens(inputs["attention_mask"].sum(1)[:1], BUFFER, WINDOW))
    for name in (name for name, axes in session.spec.outputs.items() if WINDOW_CACHE in axes.values()):
        assert got[name].shape[2] == BUFFER
        # What lies behind the tokens that are kept has no meaning.
        got[name][:, :, held:] = expected[name][:, :, held:] = 0
    assert {name: difference(got[name], expected[name]) for name in got} == pytest.approx(
        dict.fromkeys(expected, 0.0), abs=TOLERANCE
    )
    return got


def cache_of(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Present keys and values as the next pass's past."""
    return {
        name.replace("present", "past_key_values"): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW])
@pytest.mark.parametrize("kind", ["hybrid", "narrow", "dense", "embedded", "draft"])
def test_first_pass(kind: str, length: int, request: pytest.FixtureRequest) -> None:
    session: Session = request.getfixturevalue(kind)
    assert_equal(session, prompt(session, 1, length))
    assert_equal(session, prompt(session, 2, length))


@pytest.mark.parametrize("kind", ["hybrid", "narrow", "dense", "embedded", "draft"])
def test_continuation_in_chunks(kind: str, request: pytest.FixtureRequest) -> None:
    session: Session = request.getfixturevalue(kind)
    cache: dict[str, Tensor] = {}
    whole = eager(session, prompt(session, 1, 30))["logits"]
    done = 0
    for length in (20, 5, 1, 1, 3):
        inputs = part(prompt(session, 1, 30), range(done, done + length)) | cache
        outputs = assert_equal(session, inputs)
        done += length
        assert difference(outputs["logits"], whole[:, done - length : done]) < TOLERANCE
        cache = cache_of(outputs)


def test_rotating_before_attention_is_rotating_in_it(hybrid: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prompt(hybrid, 2, 30)
    inputs["attention_mask"][1, 20:] = 0
    expected = eager(hybrid, inputs)["logits"]
    monkeypatch.setattr(ops, "FUSED_ROTARY", 1 << 20)
    assert difference(eager(hybrid, inputs)["logits"], expected) < 1e-5


def part(inputs: dict[str, Tensor], positions: range) -> dict[str, Tensor]:
    """Some positions of a prompt."""
    tokens = {"input_ids", "inputs_embeds", "hidden_states"} & set(inputs)
    chosen = {name: inputs[name][:, positions.start : positions.stop].contiguous() for name in tokens}
    return inputs | chosen | {"attention_mask": inputs["attention_mask"][:, : positions.stop].contiguous()}


def test_shared_buffers(hybrid: Session) -> None:
    """Past and present bound to the same buffers, larger than needed, give what growing caches give."""
    whole = eager(hybrid, prompt(hybrid, 1, 30))["logits"]
    rooms = {name: WINDOW + 3 if WINDOW_CACHE in axes.values() else 40 for name, axes in hybrid.spec.inputs.items()}
    spare = {name: np.zeros((1, 2, room, 16), np.float32) for name, room in rooms.items() if name.startswith("past")}
    buffers = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in spare.items()}
    done = 0
    for length in (20, 5, 1, 1, 3):
        inputs = part(prompt(hybrid, 1, 30), range(done, done + length))
        done += length
        binding = hybrid.session.io_binding()
        for name in ("input_ids", "attention_mask", "logits_to_keep"):  # bind_cpu_input refuses an optional input
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(inputs[name].numpy()))
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits", "cpu")
        hybrid.session.run_with_iobinding(binding)
        got = torch.from_numpy(binding.get_outputs()[-1].numpy())
        assert difference(got, whole[:, done - length : done]) < TOLERANCE


@pytest.mark.parametrize("kind", ["hybrid", "dense"])
def test_padded_batch_then_one_token_each(kind: str, request: pytest.FixtureRequest) -> None:
    session: Session = request.getfixturevalue(kind)
    lengths = [3, 19, 11]
    inputs = prompt(session, 3, 19)
    mask = inputs["attention_mask"] * (torch.arange(19) < torch.tensor(lengths)[:, None])
    outputs = session.run(inputs | {"attention_mask": mask, "logits_to_keep": torch.tensor([1])})
    alone = [eager(session, alone_inputs(inputs, row, lengths[row])) for row in range(3)]
    for row in range(3):
        assert difference(outputs["logits"][row], alone[row]["logits"][0, -1:]) < TOLERANCE
    new = torch.tensor([[7], [8], [9]])
    longer = torch.arange(20) <= torch.tensor(lengths)[:, None]
    step = {"input_ids": new, "attention_mask": longer.long()} | cache_of(outputs)
    logits = session.run(step)["logits"]
    for row in range(3):
        ids = torch.cat((inputs["input_ids"][row : row + 1, : lengths[row]], new[row : row + 1]), 1)
        expected = eager(session, alone_inputs(inputs | {"input_ids": ids.expand(3, -1)}, row, lengths[row] + 1))
        assert difference(logits[row], expected["logits"][0, -1:]) < TOLERANCE


def alone_inputs(inputs: dict[str, Tensor], row: int, length: int) -> dict[str, Tensor]:
    """One row of a batch without its padding."""
    alone = {name: value[row : row + 1] for name, value in inputs.items() if name != "logits_to_keep"}
    ids = alone["input_ids"][:, :length]
    return alone | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "logits_to_keep": inputs["logits_to_keep"],
    }


@pytest.mark.parametrize("kind", ["hybrid", "embedded", "draft"])
def test_logits_to_keep(kind: str, request: pytest.FixtureRequest) -> None:
    session: Session = request.getfixturevalue(kind)
    inputs = prompt(session, 2, 9)
    inputs["attention_mask"][1, 5:] = 0
    every = session.run(inputs)["logits"]
    for keep, kept in ((1, 1), (3, 3), (9, 9), (50, 9)):
        some = session.run(inputs | {"logits_to_keep": torch.tensor([keep])})["logits"]
        assert difference(some[0], every[0, 9 - kept :]) < 1e-6
        if kept <= 5:
            assert difference(some[1], every[1, 5 - kept : 5]) < 1e-6
    del inputs["logits_to_keep"]
    assert difference(session.run(inputs)["logits"], every) < 1e-6


def test_logits_to_keep_while_decoding(hybrid: Session) -> None:
    first = prompt(hybrid, 1, 12)
    cache = cache_of(hybrid.run(part(first, range(9))))
    step = part(first, range(9, 12)) | cache
    every = hybrid.run(step)["logits"]
    assert every.shape[1] == 3
    assert difference(hybrid.run(step | {"logits_to_keep": torch.tensor([1])})["logits"], every[:, -1:]) < 1e-6
    del step["logits_to_keep"]
    assert difference(hybrid.run(step)["logits"], every) < 1e-6


def optional_inputs(session: Session) -> Iterable[str]:
    return (entry.name for entry in session.session.get_overridable_initializers())


def test_operators(hybrid: Session, embedded: Session, draft: Session) -> None:
    layers = hybrid.spec.config.text.num_layers
    for session, count in ((hybrid, layers), (embedded, layers), (draft, 1)):
        counts = operator_counts(session.model)
        assert counts["GroupQueryAttention"] == count
        assert counts["SimplifiedLayerNormalization"] == 4 * count + (3 if session is draft else 1)
        assert counts["MatMul"] == 7 * count + (2 if session is draft else 1)
        assert counts["Reshape"] <= 4 * count + 3
        assert not {"Transpose", "Identity", "CastLike", "Constant", "Concat"} & set(counts) or session is draft
        assert not session.model.functions
        assert list(optional_inputs(session)) == ["logits_to_keep"]


def test_windows_and_rotation_are_per_layer(hybrid: Session, dense: Session) -> None:
    def attributes(session: Session) -> list[tuple[int, int, int]]:
        nodes = [node for node in session.model.graph if node.op_type == "GroupQueryAttention"]
        names = ("local_window_size", "do_rotary")
        nodes_evict = [int("sliding_window_cache" in node.attributes) for node in nodes]
        assert nodes_evict == [int(node.attributes["local_window_size"].as_int() > 0) for node in nodes]
        return [(*(node.attributes[name].as_int() for name in names), len(node.inputs)) for node in nodes]  # type: ignore[misc]

    assert attributes(hybrid) == [(WINDOW, 1, 9)] * 3 + [(-1, 0, 7)]
    assert attributes(dense) == [(-1, 1, 9)] * 2


def test_transformers_agrees(hybrid: Session) -> None:
    transformers = pytest.importorskip("transformers")
    text = hybrid.spec.config.text
    rope = {
        "rope_type": "llama3", "rope_theta": text.rope.theta, "factor": text.rope.factor,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    }  # fmt: skip
    config = transformers.Exaone4Config(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers, num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads, head_dim=text.head_dim, rms_norm_eps=text.rms_norm_eps,
        max_position_embeddings=text.max_position_embeddings, tie_word_embeddings=False,
        sliding_window=WINDOW, layer_types=list(text.layer_types), rope_parameters=rope,
    )  # fmt: skip
    reference = transformers.Exaone4ForCausalLM(config).eval()
    module = hybrid.module
    assert isinstance(module, Decoder)
    own = {
        name if name.startswith("lm_head.") else f"model.{name}": value for name, value in module.state_dict().items()
    }
    reference.load_state_dict(own)
    inputs = prompt(hybrid, 1, 5 * WINDOW)
    with torch.no_grad():
        expected = reference(inputs["input_ids"]).logits
    assert difference(hybrid.run(inputs)["logits"], expected) < TOLERANCE


def test_inputs_and_outputs_are_the_contracts(embedded: Session, draft: Session) -> None:
    Shapes = dict[str, list[int | str]]

    def ends(session: Session) -> tuple[Shapes, Shapes]:
        runner = session.session
        inputs = {entry.name: entry.shape for entry in runner.get_inputs()}
        return inputs, {entry.name: entry.shape for entry in runner.get_outputs()}

    cache: list[int | str] = ["batch_size", 2, "past_sequence_length", 16]
    window: list[int | str] = ["batch_size", 2, "window_cache_length", 16]
    inputs, outputs = ends(embedded)
    assert inputs["inputs_embeds"] == ["batch_size", "sequence_length", 48]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs[past_key(3)] == cache
    assert inputs[past_value(0)] == outputs[present_key(2)] == window
    assert outputs["logits"] == ["batch_size", "kept_length", 160]
    assert outputs[present_value(3)] == ["batch_size", 2, "total_sequence_length", 16]
    assert outputs["hidden_states"] == ["batch_size", "sequence_length", 48]
    inputs, outputs = ends(draft)
    assert list(inputs) == ["inputs_embeds", "hidden_states", "attention_mask", past_key(0), past_value(0)]
    assert list(outputs) == ["logits", "hidden_states_out", present_key(0), present_value(0)]
    assert inputs[past_key(0)] == outputs[present_value(0)] == window
