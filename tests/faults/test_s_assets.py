"""What comes beside the weights: tokenizer, template, generation and preprocessor configuration.

The table of faults names them for bundles (M16, M17, T08, T11); a checkpoint that would make such a bundle is refused
before any work. S30 and S34 are their numbers as files and as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.faults.harness import Case, accepted, bad, refuses
from tests.faults.spoil import Spoil, content, replaced, sparse

TOKENIZER, GENERATION, PREPROCESSOR = "tokenizer.json", "generation_config.json", "preprocessor_config.json"
JSON_FILES = (TOKENIZER, "tokenizer_config.json", GENERATION)


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    """A JSON file, changed."""

    def spoil(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        change(raw)
        (folder / name).write_text(json.dumps(raw))

    return spoil


def broken(name: str) -> tuple[Case, ...]:
    label = f"s34 {name}"
    kind = "vlm" if name == PREPROCESSOR else "hybrid"
    return (
        bad(f"{label} empty", content(b"", name), name, kind=kind),
        bad(f"{label} cut", content(b'{"a": [1, 2', name), name, kind=kind),
        bad(f"{label} a list", content(b"[]", name), name, kind=kind),
        bad(f"{label} not UTF-8", content(b'{"a": "\xff"}', name), name, kind=kind),
        bad(f"{label} 5000 deep", content(b'{"a":' * 5000 + b"1" + b"}" * 5000, name), name, kind=kind),
        bad(f"{label} 200 MB", replaced(name, sparse(200 << 20)), name, "more than the", kind=kind),
        bad(f"{label} a folder", replaced(name, lambda path: path.mkdir()), name, "not an ordinary file", kind=kind),
        bad(f"{label} a pipe", replaced(name, os.mkfifo), name, "not an ordinary file", kind=kind),
        bad(f"{label} a link outside", replaced(name, lambda p: p.symlink_to("/etc/passwd")), name, code=4, kind=kind),
    )


test_s34_files_beside_the_weights = refuses(
    *(case for name in (*JSON_FILES, PREPROCESSOR) for case in broken(name)),
    bad("s34 special_tokens_map.json cut", content(b"{", "special_tokens_map.json"), "special_tokens_map.json"),
    bad("s34 processor_config.json cut", content(b"{", "processor_config.json"), "processor_config.json"),
    bad("s34 a key twice", content(b'{"eos_token_id": 1, "eos_token_id": 2}', GENERATION), GENERATION, "twice"),
    bad("s34 template not UTF-8", content(b"\xff\xfe", "chat_template.jinja"), "chat_template.jinja", "UTF-8"),
    bad("s34 template 100 MB", content(b" " * (2 << 20), "chat_template.jinja"), "chat_template.jinja", "longer"),
    bad("s34 licence outside", replaced("LICENSE", lambda p: p.symlink_to("/etc/passwd")), "LICENSE", code=4),
    bad("s34 licence a pipe", replaced("LICENSE", os.mkfifo), "LICENSE", "not an ordinary file"),
)


def tokenizer(name: str, change: Callable[[dict[str, Any]], object], *words: str) -> Case:
    return bad(f"s34 tokenizer: {name}", edited(TOKENIZER, change), TOKENIZER, *words)


def more_tokens(raw: dict[str, Any]) -> None:
    raw["model"]["vocab"] |= {f"<|more_{i}|>": tiny.VOCABULARY + i for i in range(3)}


def added_token(raw: dict[str, Any]) -> None:
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": tiny.VOCABULARY + 7, "content": "<|late|>"})


WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
NO_PATTERN = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
test_s34_tokenizers_that_cannot_be_used = refuses(
    bad("s34 tokenizer: an empty object", content(b"{}", TOKENIZER), TOKENIZER),
    tokenizer("no model", lambda raw: raw.pop("model")),
    tokenizer("another model", lambda raw: raw.update(model=WORDS)),
    tokenizer("an unknown model", lambda raw: raw["model"].update(type="Magic")),
    tokenizer("no vocabulary", lambda raw: raw["model"].update(vocab={})),
    tokenizer("merges of unknown tokens", lambda raw: raw["model"].update(merges=[["가나", "다라"]])),
    tokenizer("merges of another kind", lambda raw: raw["model"].update(merges=[1, 2])),
    tokenizer("negative ids", lambda raw: raw["model"]["vocab"].update({"!": -5})),
    tokenizer("ids beyond the model's", more_tokens, "515 tokens, the model has 512"),
    tokenizer("an added token beyond the model's", added_token, "the model has 512"),
    tokenizer(
        "a pattern that is none",
        lambda raw: raw.update(pre_tokenizer=NO_PATTERN),
    ),
)  # fmt: skip


def generation(**changes: Any) -> Case:
    name, value = next(iter(changes.items()))
    label = f"s34 generation: {name} {str(value)[:30]}"
    return bad(label, edited(GENERATION, lambda raw: raw.update(changes)), GENERATION, name)


NO_TOKENS: tuple[Any, ...] = (512, -1, "53", 53.0, True, [53, 512], [[53]], {}, float("nan"))
test_s34_generation_values = refuses(
    *(generation(temperature=value) for value in (-1, "warm", float("nan"), float("inf"), 1e308, [1])),
    *(generation(top_p=value) for value in (0, 1.5, -0.1, float("nan"), "0.9")),
    *(generation(top_k=value) for value in (-1, 1.5, "50", True, 10**30)),
    *(generation(repetition_penalty=value) for value in (0, -1, float("nan"))),
    *(generation(max_new_tokens=value) for value in (0, -1, 10**12, "many")),
    *(generation(do_sample=value) for value in (1, "yes")),
    *(generation(eos_token_id=value) for value in NO_TOKENS),
)


def preprocessor(**changes: Any) -> Case:
    name, value = next(iter(changes.items()))
    label = f"s34 preprocessor: {name} {str(value)[:30]}"
    return bad(label, edited(PREPROCESSOR, lambda raw: raw.update(changes)), PREPROCESSOR, kind="vlm")


test_s34_preprocessor_values = refuses(
    *(preprocessor(patch_size=value) for value in (16, 0, -14, "14", 14.5)),
    *(preprocessor(merge_size=value) for value in (3, 0)),
    *(preprocessor(min_pixels=value) for value in (-1, "3136", float("nan"))),
    *(preprocessor(max_pixels=value) for value in (0, 1, "x")),
    *(preprocessor(image_std=value) for value in ([0, 0, 0], [1, 1], "x", [float("nan")] * 3)),
    *(preprocessor(image_mean=value) for value in ([1e400] * 3, [None] * 3)),
    preprocessor(rescale_factor=float("nan")),
    preprocessor(resample="magic"),
)


@pytest.mark.parametrize("name", [*JSON_FILES, "chat_template.jinja", "LICENSE"])
def test_s34_a_file_that_is_missing_is_no_fault(tmp_path: Path, name: str) -> None:
    manifest, _ = accepted(tmp_path, lambda folder: (folder / name).unlink())
    assert name not in manifest.files


def test_s34_keys_that_mean_nothing_here_are_accepted(tmp_path: Path) -> None:
    changes = {"transformers_version": "9.9.9", "assistant_confidence_threshold": float("inf"), "eos_token_id": [53, 1]}
    manifest, _ = accepted(tmp_path, edited(GENERATION, lambda raw: raw.update(changes)))
    assert GENERATION in manifest.files
