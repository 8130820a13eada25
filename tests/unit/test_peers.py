"""What the comparison with other engines rests on: the same model for all of them, and ratios of the same round."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks import peers, peers_envs, peers_gguf, peers_models, peers_table, peers_twin
from benchmarks.synthetic import config_of
from model.config import parse_config
from model.rotary import inverse_frequencies
from tests.tiny import make_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", "dense", dtype="bf16", sharded=2, assets=False)


def _tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.array(bits) for name, bits in peers_gguf.tensors(folder)}


def test_the_twin_has_the_same_weights_under_other_names(checkpoint: Path, tmp_path: Path) -> None:
    peers_twin.as_qwen3(checkpoint, tmp_path / "twin")
    ours, twin = _tensors(checkpoint), _tensors(tmp_path / "twin")
    assert len(twin) == len(ours)
    for name, bits in ours.items():
        other = name.replace("post_attention_layernorm", "input_layernorm")
        other = other.replace("post_feedforward_layernorm", "post_attention_layernorm")
        np.testing.assert_array_equal(twin[other], bits)
    index = json.loads((tmp_path / "twin" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(twin)
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("qwen3", 4)


def test_the_tokenizer_has_as_many_tokens_as_the_model(checkpoint: Path, tmp_path: Path) -> None:
    peers_twin.with_tokenizer(checkpoint, tmp_path / "named")
    tokenizer = Tokenizer.from_file(str(tmp_path / "named" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.decode(tokenizer.encode("ab 한").ids) == "ab 한"
    assert _tensors(tmp_path / "named").keys() == _tensors(checkpoint).keys()
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 4


def test_every_tensor_has_a_name_in_gguf(checkpoint: Path) -> None:
    names = [peers_gguf.gguf_name(name) for name in _tensors(checkpoint)]
    assert len(set(names)) == len(names) == 4 * 11 + 2
    assert {"token_embd.weight", "output_norm.weight", "blk.3.post_ffw_norm.weight"} <= set(names)


def test_gguf_rotates_as_we_do() -> None:
    config = config_of("4.0-1.2b", None)
    exponents = np.arange(0, 64, 2) / 64
    frequencies = 1 / float(config["rope_theta"]) ** exponents / peers_gguf.rope_factors(config)
    ours = inverse_frequencies(parse_config(config).text.rope, 64)
    np.testing.assert_allclose(frequencies, ours, rtol=1e-6)


def test_only_ratios_of_a_round_are_taken() -> None:
    # The machine is half as fast in the second round: the ratio stays, whatever the medians are.
    found = peers_table.ratio([1.0, 2.0, 1.0], [2.0, 4.0, 3.0])
    assert found == peers_table.Ratio(2.0, 2.0, 3.0)


def test_the_table_shows_what_was_measured() -> None:
    baseline = peers_table.Measured("slow", 100.0, "1", [1.0], 2 * 10**9, {8: [4.0, 4.0]}, {0: [0.5, 0.5], 8: [1.0]})
    other = peers_table.Measured("fast", 50.0, "2", [0.5], 10**9, {8: [2.0, 1.0]}, {0: [0.25, 0.5]})
    rows = peers_table.table([baseline, other], baseline, 8, [0, 8]).splitlines()
    assert rows[2] == "| slow | 100 | 2 | 2.0 | 1.0 | 1.00 | 2000 |"
    assert rows[3] == "| fast | 50 | 5 (× 3.00; 2.00–4.00) | 2.7 (× 1.50; 1.00–2.00) | – | 0.50 | 1000 |"
    report = peers_table.as_json([baseline, other], baseline)
    assert report[1]["ratios"]["prefill"] == {"8": {"median": 3.0, "least": 2.0, "most": 4.0}}


def test_ours_are_set_against_every_other() -> None:
    one = peers_table.Measured("one", 1.0, prefill={8: [1.0, 2.0]}, decode={0: [0.5, 1.0]}, ours=True)
    two = peers_table.Measured("two", 1.0, prefill={8: [4.0, 4.0]}, decode={0: [0.5, 0.5], 8: [1.0]}, ours=True)
    them = peers_table.Measured("them", 1.0, prefill={8: [2.0, 8.0]}, decode={0: [1.0, 1.0], 8: [3.0]})
    rows = peers_table.against([one, them, two], 8, [0, 8]).splitlines()
    assert rows[0] == "|  | over | prefill 8 | decode after 0 | decode after 8 |"
    assert rows[2:] == [
        "| one | them | 3.00 (2.00–4.00) | 1.50 (1.00–2.00) | – |",
        "| two | them | 1.25 (0.50–2.00) | 2.00 (2.00–2.00) | 3.00 (3.00–3.00) |",
    ]
    assert peers_table.against([one, two], 8, [0]) == peers_table.against([them], 8, [0]) == ""
    report = peers_table.as_json([one, them], them)
    assert report[0]["against"]["them"]["prefill"] == {"8": {"median": 3.0, "least": 2.0, "most": 4.0}}
    assert report[1]["against"] == {}


def test_an_environment_of_other_versions_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = Path(sys.executable)
    assert peers_envs._complete(here, peers_envs.Environment((f"numpy=={np.__version__}",)))
    assert not peers_envs._complete(here, peers_envs.Environment(("numpy==0.0.1",)))
    assert not peers_envs._complete(here, peers_envs.Environment((), removed=("numpy",)))
    assert not peers_envs._complete(tmp_path / "python", peers_envs.Environment(()))


def test_a_failed_step_says_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ends with 3: no luck"):
        peers_envs.logged([sys.executable, "-c", "print('no luck'); raise SystemExit(3)"], tmp_path / "log")


def test_a_model_is_made_once_and_never_half(checkpoint: Path, tmp_path: Path) -> None:
    environments = peers_envs.Environments(tmp_path / "envs", tmp_path / "logs")
    models = peers_models.Models(checkpoint, tmp_path / "models", environments, tmp_path / "logs")
    calls: list[Path] = []

    def fail(out: Path) -> None:
        out.mkdir()
        calls.append(out)
        raise SystemExit("no")

    for _ in range(2):
        with pytest.raises(SystemExit):
            models._made("one", fail)
    path = models._made("one", lambda out: out.mkdir())
    assert models._made("one", fail) == path
    assert len(calls) == 2


def test_our_engine_takes_its_turn(tmp_path: Path) -> None:
    import exaone_export as ee

    bundle = tmp_path / "bundle"
    ee.export(make_checkpoint(tmp_path / "tiny", "dense", assets=False), bundle)
    contender = peers_models.Models.bundle("tiny", bundle)
    options = Namespace(
        work=tmp_path, threads=1, loads=1, prefill=8, new_tokens=3, rounds=2, deep_rounds=1, contexts=[0, 8, 12],
        vocabulary=512,
    )  # fmt: skip
    with ExitStack() as stack:
        entrants = [peers.enter(contender, options, stack) for _ in range(2)]
        peers.measure(entrants, options)
    for entrant in entrants:
        assert {context: len(times) for context, times in entrant.measured.decode.items()} == {0: 2, 8: 2, 12: 1}
        assert min(min(times) for times in entrant.measured.prefill.values()) > 0
        assert entrant.measured.peak_bytes > 10**7
        assert len(entrant.measured.load_s) == 1
        assert entrant.measured.version.startswith("onnxruntime ")
