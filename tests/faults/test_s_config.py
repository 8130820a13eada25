"""S34 to S39: config.json, from which everything else is taken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.config import FULL, SLIDING
from tests.faults.harness import Case, bad, check_case, refuses
from tests.faults.spoil import DELETED, both, config, config_literal, content, replaced, sparse

FILE = "config.json"
Make = Callable[[Path], object]


def text(name: str, written: str | bytes, *words: str, **more: Any) -> Case:
    raw = written.encode() if isinstance(written, str) else written
    return bad(f"s34 {name}", content(raw, FILE), FILE, *words, **more)


def lists(folder: Path) -> None:
    """As many values as the size allows."""
    (folder / FILE).write_text('{"a": [' + "[]," * 1_300_000 + "[]]}")


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


test_s34_config_that_cannot_be_read = refuses(
    bad("s34 missing", replaced(FILE), FILE, "does not exist"),
    text("empty", "", "empty"),
    text("blank", " \n\t ", "empty"),
    text("not JSON", "{model_type: exaone4}", "not JSON"),
    text("one byte", "{", "not JSON"),
    text("a comment", '{"model_type": "exaone4"} // mine', "not JSON"),
    text("a list", "[]", "list"),
    text("null", "null", "NoneType"),
    text("a number", "4", "int"),
    text("not UTF-8", b'{"model_type": "\xff"}', "not UTF-8 at byte"),
    text("UTF-16", '{"model_type": "exaone4"}'.encode("utf-16"), "not UTF-8"),
    text("NUL bytes", bytes(100), "not JSON"),
    text("a key twice", '{"model_type": "exaone4", "model_type": "exaone4_5"}', "'model_type' appears twice"),
    text("a key twice, inside", '{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
    text("a hostile key twice", '{"\\u001b[2J": 1, "\\u001b[2J": 1}', "appears twice"),
    text("5000 deep", '{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
    text("lists 1,000,000 deep", "[" * 1_000_000, "nested too deeply"),
    text("a number of 9999 digits", '{"hidden_size": ' + "9" * 9999 + "}", "not usable JSON"),
    bad("s34 200 MB", replaced(FILE, sparse(200 << 20)), FILE, "209715200 bytes, more than the", apart=True),
    bad("s34 4 MB of lists", lists, FILE, apart=True, code=2),
    bad("s34 a folder", replaced(FILE, lambda path: path.mkdir()), FILE, "not an ordinary file"),
    bad("s34 a pipe", replaced(FILE, os.mkfifo), FILE, "not an ordinary file", apart=True),
    bad("s34 a device", replaced(FILE, lambda path: path.symlink_to("/dev/zero")), FILE, "not an ordinary file"),
    bad("s34 a link to itself", replaced(FILE, lambda path: path.symlink_to(FILE)), FILE),
    bad("s34 a folder instead of a checkpoint", emptied, FILE),
)


def valued(key: str, *values: object, part: str | None = None) -> tuple[Case, ...]:
    kind = "hybrid" if part is None else "vlm"
    return tuple(
        bad(f"s34 {key} {json.dumps(value)[:30]}", config(part, **{key: value}), FILE, key, kind=kind)
        for value in values
    )


def literal(key: str, *values: str) -> tuple[Case, ...]:
    return tuple(bad(f"s34 {key} {value}", config_literal(key, value), FILE, key) for value in values)


test_s34_values_of_the_wrong_type = refuses(
    *valued("hidden_size", "64", 64.0, 64.5, True, None, [64], {}, -64),
    *valued("vocab_size", "512", 512.5, False, [], -1),
    *valued("num_hidden_layers", "4", 4.5, True, [4]),
    *valued("num_attention_heads", "4", None, True),
    *valued("num_key_value_heads", "2", 2.5, [2]),
    *valued("head_dim", "16", 16.5),
    *valued("rms_norm_eps", "1e-5", True, [], 0, -1e-5),
    *valued("sliding_window", "8", 8.5, True, []),
    *valued("layer_types", "LLLG", {}, [SLIDING] * 3 + ["chunked_attention"], [1, 2, 3, 4], [None] * 4, [[]] * 4),
    *valued("tie_word_embeddings", "false", 0, []),
    *valued("rope_parameters", "llama3", [1], 5),
    *valued("eos_token_id", "53", 53.0, True, [53, "x"], [[53]], -1, 512, [53, 512], 10**30),
    *valued("bos_token_id", "1", 1.5, -1, 512),
    *valued("pad_token_id", "0", [0], 512),
    *valued("hidden_act", "gelu", 5, []),
    *valued("attention_bias", True, "no"),
    *literal("rms_norm_eps", "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400"),
    *literal("hidden_size", "NaN", "Infinity", "1e400", "64e0"),
    *literal("eos_token_id", "NaN", "1e400"),
)
test_s34_vision_values = refuses(
    *valued("depth", 0, -1, "4", None, 1.5, True, 10**9, part="vision_config"),
    *valued("num_heads", 0, 3, "4", part="vision_config"),
    *valued("fullatt_block_indexes", [4], [-1], ["3"], [3.0], [True], 3, None, [10**30], part="vision_config"),
    *valued("window_size", 0, 27, "112", -112, part="vision_config"),
    *valued("patch_size", 0, "14", -14, part="vision_config"),
    *valued("spatial_merge_size", 0, 1.5, part="vision_config"),
    *valued("out_hidden_size", 32, 0, part="vision_config"),
    *valued("hidden_act", "gelu", part="vision_config"),
    *(
        bad(f"s34 image_token_id {value}", config(image_token_id=value), "image_token_id", kind="vlm")
        for value in (512, -1, "67", 1.5, [67], 10**30)
    ),
    bad("s34 no image_token_id", config(image_token_id=DELETED), "image_token_id", "missing", kind="vlm"),
    bad("s34 no text_config", config(text_config=DELETED), "text_config", kind="vlm"),
    bad("s34 text_config a list", config(text_config=[]), "text_config", kind="vlm"),
    bad("s34 no vision_config", config(vision_config=DELETED), "vision_config", kind="vlm"),
    bad("s34 another text model", config("text_config", model_type="llama"), "text_config.model_type", kind="vlm"),
)


def other(name: str, *words: str, **changes: object) -> Case:
    return bad(
        f"s35 {name}", config(**changes), FILE, "EXAONE 4.0 (exaone4) and EXAONE 4.5 (exaone4_5)", *words, code=2
    )


test_s35_other_models = refuses(
    other("EXAONE 3.5", "'exaone' is not supported", model_type="exaone", architectures=["ExaoneForCausalLM"]),
    other("EXAONE 3.5 with its code", "'exaone'", model_type="exaone", auto_map={"AutoConfig": "x.ExaoneConfig"}),
    other("K-EXAONE", "'exaone_moe'", model_type="exaone_moe", architectures=["ExaoneMoEForCausalLM"]),
    other("llama", "'llama'", model_type="llama"),
    other("none", "'Exaone4ForCausalLM'", model_type=DELETED),
    other("null", model_type=None),
    other("a number", "'4'", model_type=4),
    other("a list", model_type=["exaone4"]),
    other("in capitals", "'EXAONE4'", model_type="EXAONE4"),
    other("hostile", r"\x1b[2J", model_type="\x1b[2J" * 1000),
    other("64 KB", model_type="x" * 65536),
    other("nothing at all", "'None'", model_type=DELETED, architectures=DELETED),
)


def absurd(name: str, key: str, value: object, **more: Any) -> Case:
    return bad(f"s36 {name}", config(**{key: value}), FILE, key, megabytes=100, cpu_seconds=1, **more)


def rope(name: str, key: str, value: object) -> Case:
    return bad(f"s36 {name}", config("rope_parameters", **{key: value}), FILE, f"rope_parameters.{key}")


test_s36_absurd_values = refuses(
    absurd("10^9 layers", "num_hidden_layers", 10**9, apart=True),
    absurd("10^9 layers without types", "num_hidden_layers", 10**9),
    absurd("4097 layers", "num_hidden_layers", 4097),
    absurd("no layers", "num_hidden_layers", 0),
    absurd("no heads", "num_attention_heads", 0),
    absurd("10^9 heads", "num_attention_heads", 10**9),
    absurd("no heads of keys", "num_key_value_heads", 0),
    absurd("heads of keys that do not divide", "num_key_value_heads", 3),
    absurd("a head width that no kernel takes", "head_dim", 20),
    absurd("a head width of 0", "head_dim", 0),
    absurd("a head width of 10^9", "head_dim", 10**9),
    bad("s36 heads that do not divide", config(head_dim=DELETED, num_attention_heads=5), "num_attention_heads"),
    absurd("a window of 0", "sliding_window", 0),
    absurd("a negative window", "sliding_window", -8),
    absurd("a window of 10^30", "sliding_window", 10**30),
    absurd("10^12 tokens", "vocab_size", 10**12, apart=True),
    absurd("no tokens", "vocab_size", 0),
    absurd("10^8 positions", "max_position_embeddings", 10**8),
    absurd("no positions", "max_position_embeddings", 0),
    absurd("10^9 hidden", "hidden_size", 10**9),
    absurd("10^30 inner", "intermediate_size", 10**30),
    absurd("10^9 draft layers", "num_nextn_predict_layers", 10**9),
    rope("theta 0", "rope_theta", 0),
    rope("theta negative", "rope_theta", -1e6),
    rope("theta 1e300", "rope_theta", 1e300),
    rope("theta as text", "rope_theta", "1e6"),
    bad("s36 theta missing", config("rope_parameters", rope_theta=DELETED), "rope_theta", "the key is missing"),
    rope("factor 0", "factor", 0),
    rope("equal factors", "high_freq_factor", 1.0),
    rope("positions 0", "original_max_position_embeddings", 0),
    rope("unknown", "rope_type", "yarn"),
    rope("unknown kind of type", "rope_type", ["llama3"]),
    rope("partial", "partial_rotary_factor", 0.5),
    bad("s36 theta NaN", both(config(rope_parameters=DELETED), config_literal("rope_theta", "NaN")), "rope_theta"),
    bad("s36 no theta", config(rope_parameters=DELETED), "rope_theta", "the key is missing"),
)
test_s36_all_as_large_as_allowed = refuses(
    bad(
        "s36 all as large as allowed",
        config(
            num_hidden_layers=4096, hidden_size=1 << 20, intermediate_size=1 << 22, vocab_size=1 << 24,
            head_dim=1 << 14, num_attention_heads=1 << 14, num_key_value_heads=1 << 14,
            max_position_embeddings=1 << 22, layer_types=None,
        ),
        "missing tensors", "more", apart=True, megabytes=100, cpu_seconds=1,
    ),
)  # fmt: skip


def layers(name: str, listed: list[str], *words: str, kind: str = "hybrid") -> Case:
    part = "text_config" if kind == "vlm" else None
    return bad(f"s37 {name}", config(part, layer_types=listed), FILE, "layer_types", *words, kind=kind)


test_s37_layer_types_of_another_number = refuses(
    layers("one less", [SLIDING] * 3, "3 entries for 4 layers"),
    layers("one more", [SLIDING] * 3 + [FULL] * 2, "5 entries for 4 layers"),
    layers("none", [], "0 entries for 4 layers"),
    layers("two more, with a draft head", [FULL] * 6, "6 entries for 4 layers", kind="vlm"),
    layers("a hundred thousand", [FULL] * 100_000, "100000 entries"),
)


def only(name: str) -> Callable[[Path], object]:
    """Pickled weights instead of safetensors."""
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


test_s38_code_and_pickles = refuses(
    bad("s38 auto_map", config(auto_map={"AutoModel": "code.Model"}), "auto_map", "own Python code"),
    bad("s38 an empty auto_map", config(auto_map={}), "auto_map"),
    bad("s38 auto_map null", config(auto_map=None), "auto_map"),
    bad("s38 .bin", only("pytorch_model.bin"), "pytorch_model.bin: pickled weights can run code"),
    bad("s38 .pt", only("consolidated.00.pt"), "pickled"),
    bad("s38 .pth", only("model.pth"), "pickled"),
    bad("s38 .ckpt", only("model.ckpt"), "pickled"),
    bad(
        "s38 an index of pickles",
        both(only("pytorch_model-00001-of-00001.bin"), content(b"{}", "pytorch_model.bin.index.json")),
        "pickled",
    ),
    bad("s38 GGUF", only("model.gguf"), "neither model.safetensors nor"),
)
test_s39_quantization_that_is_not_known = refuses(
    *(
        bad(f"s39 {method}", config(quantization_config={"quant_method": method}), FILE, "Supported are", code=2)
        for method in ("bitsandbytes", "mxfp4", "hqq", "", None, 5, ["gptq"], "\x1b[2J" * 50)
    ),
    bad("s39 an old AWQ layout", config(quantization_config={"quant_method": "awq", "version": "gemv"}), code=2),
    bad("s39 3 bits", config(quantization_config={"quant_method": "gptq", "bits": 3}), "bits", code=2),
    bad("s39 no object", config(quantization_config="gptq"), "quantization_config"),
)


def test_s38_python_files_of_a_checkpoint_are_not_imported(tmp_path: Path) -> None:
    mark = tmp_path / "imported"
    code = f"open({str(mark)!r}, 'w')".encode()
    names = ("modeling_exaone4.py", "configuration_exaone4.py", "__init__.py", "sitecustomize.py", "config.py")
    spoil = both(config(vocab_size=0), *(content(code, name) for name in names))
    check_case(bad("s38 python files", spoil, "vocab_size", apart=True), tmp_path)
    assert not mark.exists()
