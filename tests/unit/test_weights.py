from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from model.config import load_config, parse_config
from model.errors import CheckpointError
from model.weights import Checkpoint, canonical, check_complete, expected_tensors, published
from tests import tiny


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    return tiny.make_checkpoint(tmp_path / "hybrid", "hybrid")


def edit(folder: Path, kind: str, change: Any) -> None:
    tensors = tiny.make_tensors(json.loads((folder / "config.json").read_text()))
    change(tensors)
    tiny.save_tensors(folder, tensors)


def check(folder: Path) -> None:
    check_complete(Checkpoint.open(folder), load_config(folder))


# Tensor names


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "language_model.model.", "language_model.", "model.language_model.model."]
)
def test_every_spelling_of_text_names(prefix: str) -> None:
    assert canonical(f"{prefix}layers.3.mlp.up_proj.weight") == "decoder.layers.3.mlp.up_proj.weight"
    assert canonical(f"{prefix}norm.weight") == "decoder.norm.weight"
    assert canonical(f"{prefix}embed_tokens.weight") == "embedding.embed_tokens.weight"


def test_names_of_text_only_models() -> None:
    assert canonical("model.embed_tokens.weight", text_only=True) == "decoder.embed_tokens.weight"
    assert (
        canonical("model.layers.0.self_attn.q_norm.weight", text_only=True)
        == "decoder.layers.0.self_attn.q_norm.weight"
    )
    assert canonical("lm_head.weight", text_only=True) == "decoder.lm_head.weight"


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "language_model.lm_head.weight", "model.language_model.lm_head.weight"]
)
def test_head_names(name: str) -> None:
    assert canonical(name) == "decoder.lm_head.weight"


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_vision_names(prefix: str) -> None:
    assert canonical(f"{prefix}blocks.0.attn.qkv.bias") == "vision_encoder.blocks.0.attn.qkv.bias"
    assert canonical(f"{prefix}merger.mlp.2.weight") == "vision_encoder.merger.mlp.2.weight"


def test_draft_head_names() -> None:
    assert canonical("mtp.layers.0.mlp.up_proj.weight") == "mtp.layers.0.mlp.up_proj.weight"
    assert canonical("model.mtp.fc.weight") == "mtp.fc.weight"


@pytest.mark.parametrize(
    "name", ["../../etc/x", "model.rotary.inv_freq", "transformer.h.0.weight", "layers", "a\0b", "norm.weight.x"]
)
def test_unknown_names(name: str) -> None:
    assert canonical(name) is None


# Reading


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_opens_one_file_or_shards(tmp_path: Path, kind: str, shards: int) -> None:
    folder = tiny.make_checkpoint(tmp_path / "c", kind, sharded=shards)
    config, checkpoint = load_config(folder), Checkpoint.open(folder)
    check_complete(checkpoint, config)
    assert checkpoint.has_draft_head == (kind == "vlm")
    assert len(checkpoint.files) == (1 if shards == 1 else shards + 1)
    refs = checkpoint.bind(config)
    assert set(refs) >= set(expected_tensors(config, draft=kind == "vlm")) | {"decoder.lm_head.weight"}


def test_published_tensor_count_of_the_small_text_model() -> None:
    raw = tiny.make_config("dense", num_hidden_layers=30, layer_types=["full_attention"] * 30)
    assert len(tiny.make_tensors(raw)) == 332  # as in the published file


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_reads_values_and_rows_exactly(tmp_path: Path, dtype: str) -> None:
    folder = tiny.make_checkpoint(tmp_path / "c", "hybrid", dtype=dtype)
    wanted = tiny.make_tensors(tiny.make_config("hybrid"), dtype=dtype)
    for name, ref in Checkpoint.open(folder).tensors.items():
        assert ref.read().dtype == wanted[name].dtype
        np.testing.assert_array_equal(ref.read(), wanted[name])
        np.testing.assert_array_equal(ref.rows(1, 3), wanted[name][1:3])


def test_tied_parameters_share_their_place(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "c", "dense")
    refs = Checkpoint.open(folder).bind(load_config(folder))
    assert refs["decoder.lm_head.weight"] == refs["decoder.embed_tokens.weight"]
    folder = tiny.make_checkpoint(tmp_path / "v", "vlm")
    refs = Checkpoint.open(folder).bind(load_config(folder))
    assert refs["mtp.lm_head.weight"] == refs["decoder.lm_head.weight"]


def test_published_golden_checkpoint_of_every_architecture_part(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from model.load import load_exaone

    for kind in tiny.KINDS:
        folder = tiny.make_checkpoint(tmp_path / kind, kind, dtype="bf16")
        wanted = tiny.make_tensors(tiny.make_config(kind), dtype="bf16")
        model = load_exaone(folder)
        assert (model.mtp is not None) == (kind == "vlm")
        for name, parameter in model.named_parameters():
            stored = wanted[tiny.published_name(name, kind == "vlm")].astype(np.float32)
            assert torch.equal(parameter, torch.from_numpy(stored).view(parameter.shape))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_published_is_the_inverse_of_canonical(kind: str) -> None:
    text_only = kind != "vlm"
    for name in expected_tensors(parse_config(tiny.make_config(kind)), draft=not text_only):
        assert published(name, text_only) == tiny.published_name(name, not text_only)
        assert canonical(published(name, text_only), text_only) == name


def test_stored_rotary_frequencies_are_passed_over(hybrid: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(hybrid, "hybrid", lambda tensors: tensors.update({name: np.ones(8, np.float32)}))
    check_complete(Checkpoint.open(hybrid), load_config(hybrid))


# What the configuration asks for; damaged files are in tests/faults


def test_shard_that_shrinks_while_it_is_read(hybrid: Path) -> None:
    refs = Checkpoint.open(hybrid).tensors
    last = max(refs.values(), key=lambda ref: ref.offset)
    os.truncate(last.file, last.offset + 3)
    with pytest.raises(CheckpointError, match="became shorter"):
        last.read()


def test_missing_tensors_are_listed_with_the_count_of_the_rest(hybrid: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "layers.2" in name]:
            del tensors[name]

    edit(hybrid, "hybrid", drop)
    with pytest.raises(
        CheckpointError, match=r"missing tensors: model\.layers\.2\.self_attn\.q_proj\.weight, .* and 6 more"
    ):
        check(hybrid)


def test_missing_head_of_an_untied_model(hybrid: Path) -> None:
    edit(hybrid, "hybrid", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing tensors: lm_head\.weight\."):
        check(hybrid)


@pytest.mark.parametrize("name", ["../../etc/x", "model.layers.0.self_attn.q_proj.bias", "x" * 65536, "nul\0"])
def test_unexpected_tensors(hybrid: Path, name: str) -> None:
    edit(hybrid, "hybrid", lambda tensors: tensors.update({name: np.zeros(2, np.float32)}))
    with pytest.raises(CheckpointError, match="unexpected tensor") as caught:
        check(hybrid)
    assert len(str(caught.value)) < 500


def test_shapes_name_both_sides(hybrid: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit(hybrid, "hybrid", lambda tensors: tensors.update({name: np.zeros((64, 64), np.float32)}))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight: shape \[64, 64\], but config\.json means \[32, 64\]"):
        check(hybrid)


@pytest.mark.parametrize("dtype", [np.int8, np.float64, ml_dtypes.float8_e4m3fn])
def test_unsupported_types_are_named(hybrid: Path, dtype: Any) -> None:
    name = "model.norm.weight"
    edit(hybrid, "hybrid", lambda tensors: tensors.update({name: np.ones(64, dtype)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: values of type \w+ are not supported"):
        check(hybrid)


def test_mixed_float_types_are_accepted(hybrid: Path) -> None:
    edit(hybrid, "hybrid", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float16)}))
    check(hybrid)


def test_redundant_tied_head(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "c", "dense")
    edit(folder, "dense", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    check(folder)
    edit(folder, "dense", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match="ties it to the embedding, but their values differ"):
        check(folder)


def test_one_parameter_under_two_spellings(hybrid: Path) -> None:
    edit(hybrid, "hybrid", lambda t: t.update({"language_model.model.norm.weight": t["model.norm.weight"].copy()}))
    with pytest.raises(CheckpointError, match="the same parameter as"):
        check(hybrid)


def test_flattened_patch_embedding_is_accepted(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "c", "vlm")
    name = "model.visual.patch_embed.proj.weight"
    edit(folder, "vlm", lambda t: t.update({name: t[name].reshape(64, -1)}))
    check(folder)


def test_draft_head_without_a_part(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "c", "vlm")
    edit(folder, "vlm", lambda t: t.pop("mtp.fc.weight"))
    with pytest.raises(CheckpointError, match=r"mtp\.fc\.weight"):
        check(folder)
