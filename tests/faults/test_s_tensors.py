"""S17, S19, S21, S22 and S24 to S25: sound files whose tensors are not those of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from exaone_export.cli import main
from model.bundle import read_manifest
from tests import tiny
from tests.faults.harness import Case, accepted, bad, check_case, refuses
from tests.faults.spoil import (
    both,
    config,
    edited_header,
    entry,
    header,
    weights,
    with_tensor,
    without,
)

NORM = "model.norm.weight"
PROJECTION = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
KEYS = "model.layers.1.self_attn.k_proj.weight"
NEAR_ENOUGH = np.zeros(2, np.float32)


def typed(name: str, dtype: object, *words: str, size: float = 1, tensor: str = PROJECTION) -> Case:
    """A checkpoint one of whose tensors is of another type; `size` bytes each."""

    def change(raw: dict[str, Any]) -> None:
        count = int(np.prod(raw[tensor]["shape"]) * size)
        rest = [e for e in raw.values() if "data_offsets" in e and e is not raw[tensor]]
        begin, end = raw[tensor]["data_offsets"]
        for other in rest:
            if other["data_offsets"][0] >= end:
                other["data_offsets"] = [number - (end - begin) + count for number in other["data_offsets"]]
        raw[tensor] |= {"dtype": dtype, "data_offsets": [begin, begin + count]}

    def spoil(folder: Path) -> None:
        edited_header(change)(folder)
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        end = max(ref[1] for ref in _ranges(raw[8:begin]))
        path.write_bytes(raw[:begin] + raw[begin:].ljust(end, b"\0")[:end])

    return Case(name, spoil, 3, (tensor, *words))


def _ranges(text: bytes) -> list[list[int]]:
    return [entry["data_offsets"] for entry in json.loads(text).values() if "data_offsets" in entry]


test_s17_type_that_does_not_exist = refuses(
    typed("s17 X99", "X99", "the unknown type X99", size=4),
    typed("s17 in lower case", "f32", "the unknown type f32", size=4),
    typed("s17 as numpy spells it", "float32", "the unknown type float32", size=4),
    typed("s17 I4", "I4", "the unknown type I4", size=0.5),
    typed("s17 null", None, "None", size=4),
)
test_s17_type_that_is_not_supported = refuses(
    typed("s17 F4", "F4", "type F4", size=0.5),
    typed("s17 F6", "F6_E2M3", "type F6_E2M3", size=0.75),
    typed("s17 F8 without scale", "F8_E4M3"),
    typed("s17 F8 of another kind", "F8_E5M2"),
    typed("s17 U8", "U8", "type U8"),
    typed("s17 I8", "I8"),
    typed("s17 BOOL", "BOOL", "type BOOL"),
    typed("s17 I32", "I32", "type I32", size=4),
    typed("s17 I64", "I64", "type I64", size=8),
    typed("s17 F64", "F64", "type F64", size=8),
    typed("s17 C64", "C64", "type C64", size=8),
    typed("s17 a norm in F64", "F64", "type F64", size=8, tensor=NORM),
    typed("s17 an embedding in I32", "I32", "type I32", size=4, tensor="model.embed_tokens.weight"),
)


def unexpected(name: str, tensor: str, *words: str) -> Case:
    return Case(f"s19 {name}", with_tensor(tensor, NEAR_ENOUGH), 3, ("unexpected tensor", *words))


test_s19_hostile_names = refuses(
    unexpected("a way out", "../../etc/x", "../../etc/x"),
    unexpected("absolute", "/etc/passwd"),
    unexpected("NUL", "a\0b", r"a\x00b"),
    unexpected("64 KB", "x" * 65536, "xxx…"),
    unexpected("64 KB of layers", "model.layers.0." + "x" * 65536),
    unexpected("a newline", "a\nerror: forged: line: break", r"a\n"),
    unexpected("terminal escapes", "\x1b[2J\x1b]0;title\x07", r"\x1b[2J"),
    unexpected("right to left", "a\u202eb", r"\u202e"),
    unexpected("no name", ""),
    unexpected("Korean", "가중치", "가중치"),
    unexpected("known, and a newline", "model.layers.0.mlp.up_proj.weight\n"),
    unexpected("a layer number of 5000 digits", f"model.layers.{'9' * 5000}.mlp.up_proj.weight"),
    unexpected("metadata", "__metadata__ "),
    Case(
        "s19 hostile, twice",
        weights(lambda t: t.update({"model.layers.0.\x1b[2J": NEAR_ENOUGH, "layers.0.\x1b[2J": NEAR_ENOUGH})),
        3,
        ("unexpected tensors", r"\x1b[2J"),
    ),
)
DEEPER = config(num_hidden_layers=5, layer_types=None)
test_s21_missing_tensors = refuses(
    bad("s21 one", without(NORM), "missing tensors: model.norm.weight."),
    bad("s21 the head", without("lm_head.weight"), "missing tensors: lm_head.weight."),
    bad("s21 the embedding", without(EMBEDDING), "model.embed_tokens.weight"),
    bad(
        "s21 a layer", weights(lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name]),
        "model.layers.2.self_attn.q_proj.weight", "and 6 more",
    ),
    bad("s21 all", header({}), "model.embed_tokens.weight", "and 42 more"),
    bad("s21 all but one", header({NORM: entry([64], 0, 256)}, bytes(256)), "and 41 more"),
    bad("s21 a layer that the config has", DEEPER, "layers.4", "and 6 more"),
    bad("s21 a bias", without("model.visual.blocks.0.attn.qkv.bias"), "qkv.bias", kind="vlm"),
    bad("s21 half a draft head", without("mtp.fc.weight"), "mtp.fc.weight", kind="vlm"),
)  # fmt: skip
IGNORE = ("--ignore-extra",)
test_s22_extra_tensors = refuses(
    bad("s22 a bias", with_tensor("model.layers.0.self_attn.q_proj.bias", NEAR_ENOUGH), "q_proj.bias"),
    bad("s22 another model's", with_tensor("transformer.h.0.attn.weight", NEAR_ENOUGH), "transformer.h.0"),
    bad("s22 a head of another task", with_tensor("score.weight", NEAR_ENOUGH), "score.weight"),
    bad("s22 eyes in a text model", with_tensor("model.visual.merger.ln_q.weight", NEAR_ENOUGH), "visual"),
    bad("s22 an adapter", with_tensor("base_model.model.layers.0.lora_A.weight", NEAR_ENOUGH), "lora_A"),
    bad("s22 fewer layers in the config", config(num_hidden_layers=3, layer_types=None), "layers.3", "and 6 more"),
    bad("s22 six", weights(lambda t: t.update({f"x{i}": NEAR_ENOUGH for i in range(6)})), "x0, x1, x2, x3, x4 and 1"),
    bad("s22 ignored, but others are missing", both(with_tensor("x", NEAR_ENOUGH), DEEPER), "missing", options=IGNORE),
    bad(
        "s22 one parameter twice", weights(lambda t: t.update({"language_model.model.norm.weight": t[NORM]})),
        "the same parameter as", options=IGNORE,
    ),
    bad(
        "s22 a tied head of other values", weights(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
        "config.json ties it to the embedding", kind="dense",
    ),
)  # fmt: skip


def shaped(name: str, tensor: str, shape: tuple[int, ...], *words: str, kind: str = "hybrid") -> Case:
    return Case(f"s25 {name}", with_tensor(tensor, np.ones(shape, np.float32)), 3, (tensor, *words), kind=kind)


def meant(name: str, *words: str, part: str | None = None, kind: str = "hybrid", **changes: object) -> Case:
    return Case(f"s25 {name}", config(part, **changes), 3, words, kind=kind)


test_s25_shapes_that_do_not_fit = refuses(
    shaped("heads of keys", KEYS, (64, 64), "shape [64, 64], but config.json means [32, 64]"),
    shaped("transposed", PROJECTION, (64, 128), "shape [64, 128], but config.json means [128, 64]"),
    shaped("flat", PROJECTION, (64 * 128,), "[8192]"),
    shaped("one dimension more", PROJECTION, (128, 64, 1)),
    shaped("a scalar for a matrix", PROJECTION, (), "shape []"),
    shaped("a scalar for a norm", NORM, (), "shape []"),
    shaped("a matrix for a norm", NORM, (1, 64)),
    shaped("no rows", PROJECTION, (0, 64)),
    shaped("patches", "model.visual.patch_embed.proj.weight", (64, 3, 14, 14, 2), kind="vlm"),
    meant("hidden size", "embed_tokens", "[512, 64]", hidden_size=128),
    meant("hidden size of the published", "[512, 64]", "[512, 5120]", hidden_size=5120),
    meant("heads of keys in the config", "k_proj", num_key_value_heads=4),
    meant("heads", "q_proj", num_attention_heads=8),
    meant("head width", "q_proj", head_dim=32),
    meant("inner width", "gate_proj", intermediate_size=256),
    meant("vocabulary", "embed_tokens", vocab_size=1024),
    meant("vision width", "visual", part="vision_config", kind="vlm", hidden_size=128),
    meant("vision depth", "blocks.4", part="vision_config", kind="vlm", depth=5, fullatt_block_indexes=[3]),
    meant("patch", "patch_size", part="vision_config", kind="vlm", patch_size=16),
)


# Accepted, and said


def test_s22_ignored_tensors_are_in_the_manifest(tmp_path: Path) -> None:
    names = ("a\x1b", "model.layers.9.mlp.up_proj.weight", "x" * 5000, "y", "z")
    spoil = weights(lambda t: t.update(dict.fromkeys(names, NEAR_ENOUGH)))
    manifest, said = accepted(tmp_path, spoil, *IGNORE)
    shown = [r"a\x1b", "model.layers.9.mlp.up_proj.weight", "x" * 120 + "…", "y", "z"]
    assert manifest.source["left_out"] == {"extra": {"count": 5, "names": shown}}
    note = next(note for note in manifest.notes if "no part of the model" in note)
    assert note.startswith("5 tensors")
    assert note.endswith("and 2 more.")
    assert f"warning: {note}" in said


def test_s22_very_many_ignored_tensors_are_counted(tmp_path: Path) -> None:
    manifest, _ = accepted(tmp_path, weights(lambda t: t.update({f"x{i}": NEAR_ENOUGH for i in range(1500)})), *IGNORE)
    extra = manifest.source["left_out"]["extra"]
    assert (extra["count"], len(extra["names"])) == (1500, 1000)


def test_s22_draft_head_that_the_configuration_does_not_know(tmp_path: Path) -> None:
    spoil = with_tensor("mtp.fc.weight", np.ones((64, 128), np.float32))
    manifest, said = accepted(tmp_path, spoil)
    assert manifest.source["left_out"] == {"draft_head": {"count": 1, "names": ["mtp.fc.weight"]}}
    assert "1 tensor left out, of a draft head that config.json does not describe: mtp.fc.weight." in said
    assert manifest.graph("mtp") is None


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_s22_nothing_is_said_of_a_sound_checkpoint(tmp_path: Path, kind: str) -> None:
    manifest, said = accepted(tmp_path, lambda folder: None, kind=kind)
    assert set(manifest.source) == {"id", "revision", "files", "dtypes"}
    assert manifest.notes == ()
    assert "warning" not in said


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_s24_mixed_types_are_accepted_and_recorded(tmp_path: Path, dtype: Any) -> None:
    other = {"float16": "F16", "bfloat16": "BF16"}[np.dtype(dtype).name]
    manifest, said = accepted(tmp_path, weights(lambda t: t.update({NORM: t[NORM].astype(dtype)})))
    assert manifest.source["dtypes"] == {other: 1, "F32": 46}
    assert f"mixes types: its tensors are 1 of {other}, 46 of F32" in said
    assert any("mixes types" in note for note in manifest.notes)


def test_s24_notes_survive_quantizing_the_bundle(tmp_path: Path) -> None:
    manifest, _ = accepted(tmp_path, weights(lambda t: t.update({NORM: t[NORM].astype(np.float16)})))
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "int4"), "-q"]) == 0
    later = read_manifest(tmp_path / "int4")
    assert (later.notes, later.source) == (manifest.notes, manifest.source)


def test_the_harness_sees_an_accepted_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="tracing began"):
        check_case(bad("s00 nothing wrong", lambda folder: None), tmp_path)
